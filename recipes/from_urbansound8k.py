"""UrbanSound8K: ten folds of city sounds.

Salamon et al. 2014. Splits are the folds 1 to 10, groups the recordings that clips were cut from, classes in
the order of classID.
"""

from common import check
from recipes.tables import read_records, row_of, unpacked


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked")


def rows(args):
    root = unpacked(args.source, "UrbanSound8K")
    table = root / "metadata/UrbanSound8K.csv"
    all_rows, classes = [], {}
    for cells in read_records(table, "slice_file_name fsID fold classID class"):
        fold, label, number = cells["fold"], cells["class"], cells["classID"]
        check(fold and label and number.isdecimal(), f"{table}: a row is incomplete, {cells}")
        file = root / f"audio/fold{fold}" / cells["slice_file_name"]
        all_rows.append(row_of(file, root, [label], fold, cells["fsID"]))
        classes[int(number)] = label
    return all_rows, [classes[number] for number in sorted(classes)]
