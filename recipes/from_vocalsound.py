"""VocalSound: laughter, sighs, coughs, throat clearing, sneezes and sniffs.

Gong et al. 2022. The splits are the authors', by speaker.
"""

from common import check
from recipes.tables import parts_of_name, read_table, recordings, row_of, unpacked

CLASSES = "laughter sigh throatclearing cough sneeze sniff".split()
TABLES = dict(train="tr_meta.csv", valid="val_meta.csv", test="te_meta.csv")


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked, at 16 or 44 kHz")


def rows(args):
    root = unpacked(args.source, "vs_release_16k")
    splits = {}
    for split, table in TABLES.items():
        for _, fields in read_table(root / "meta" / table):
            splits[fields[0]] = split

    all_rows = []
    # audio_16k/f0003_0_cough.wav: speaker, visit, class
    for file in recordings(root, "*_[14][64]k/*_*_*.wav"):
        speaker, label = parts_of_name(file, r"(\w+)_\d+_([a-z]+)", "f0003_0_cough")
        check(speaker in splits, f"{file}: speaker {speaker} is in none of the tables in meta")
        all_rows.append(row_of(file, root, [label], splits[speaker], speaker))
    return all_rows, CLASSES
