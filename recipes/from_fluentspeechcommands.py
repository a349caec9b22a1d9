"""Fluent Speech Commands: 248 sentences, or what they ask for, 31 intents.

Lugosch et al. 2019. The splits are the authors', without a common speaker. X-ARES's label is the sentence,
and so it is here; an intent is action, object and location.
"""

from recipes.tables import read_records, row_of, unpacked

COLUMNS = dict(sentence="transcription", intent="action object location")


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked")
    parser.add_argument("--label", default="sentence", choices=COLUMNS, help="[sentence]")


def rows(args):
    root = unpacked(args.source, "fluent_speech_commands_dataset")
    columns = COLUMNS[args.label]

    all_rows = []
    for split in ("train", "valid", "test"):
        table = root / f"data/{split}_data.csv"
        for cells in read_records(table, f"path speakerId {columns}"):
            label = " ".join(map(cells.get, columns.split()))
            file = root / cells["path"]
            all_rows.append(row_of(file, root, [label], split, cells["speakerId"]))
    return all_rows, None
