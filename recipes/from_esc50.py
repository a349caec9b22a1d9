"""ESC-50: five folds of environmental sounds.

Piczak 2015. Splits are the folds, groups the recordings that clips were cut from, classes in the order of
`target`.
"""

from common import check
from recipes.tables import read_table, row_of, unpacked


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked")


def rows(args):
    root = unpacked(args.source, "ESC-50-master")
    all_rows, classes = [], {}
    for where, fields in read_table(root / "meta/esc50.csv"):
        check(
            len(fields) == 7,
            f"{where}: not ESC-50's table, filename,fold,target,category,esc10,src_file,take"
        )
        name, fold, target, category, _, recording, _ = fields
        if target.isdigit():  # the header has none
            file = root / "audio" / name
            all_rows.append(row_of(file, root, [category], fold, recording))
            classes[int(target)] = category
    return all_rows, [classes[target] for target in sorted(classes)]
