"""FSD50K: sound events of 200 classes, several a recording.

Fonseca et al. 2022. The splits are the authors': train and val of the dev set, and the eval set for testing.
Classes are in the order of vocabulary.csv.
"""

from pathlib import Path

from common import check
from recipes.tables import read_records, read_table, row_of


def add_flags(parser):
    parser.add_argument(
        "source",
        help="folder with FSD50K.dev_audio, FSD50K.eval_audio and FSD50K.ground_truth"
    )


def rows(args):
    root = Path(args.source)
    tables = root / "FSD50K.ground_truth"
    classes = []
    for where, fields in read_table(tables / "vocabulary.csv"):
        check(len(fields) == 3, f"{where}: not number,class,mid, but {fields}")
        if fields[0].isdecimal():  # a header is not
            classes.append(fields[1])

    all_rows = []
    for cells in read_records(tables / "dev.csv", "fname labels split"):
        file = root / f"FSD50K.dev_audio/{cells['fname']}.wav"
        split = "valid" if cells["split"] == "val" else "train"
        all_rows.append(row_of(file, root, cells["labels"].split(","), split))

    # the table of the eval set has no column split
    for cells in read_records(tables / "eval.csv", "fname labels"):
        file = root / f"FSD50K.eval_audio/{cells['fname']}.wav"
        all_rows.append(row_of(file, root, cells["labels"].split(","), "test"))
    return all_rows, classes
