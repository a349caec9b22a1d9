"""A table with a path column, and if there are, with label, split, group, start and end.

It has a header, in which a column may go by one of several names.
"""

import os
from pathlib import Path

from common import check
from recipes.tables import read_classes, read_table, row_of, seconds_of

COLUMNS = dict(
    path="path,file,filename,wav",
    label="label,labels,category,class",
    split="split,fold,fold_or_split",
    group="group,speaker",
)


def add_flags(parser):
    parser.add_argument(
        "source", help="table with a header; labels are separated by ; or by commas"
    )
    parser.add_argument("--root", help="folder that the paths start from [that of the table]")
    parser.add_argument("--keep", help="only these splits or folds, as in 1,2,3,4 [all]")
    parser.add_argument(
        "--classes",
        help="file of the class names in order, one a line [the labels that occur, sorted]",
    )
    for key, names in COLUMNS.items():
        parser.add_argument(
            f"--{key}_column",
            f"--{key}-column",
            help=f"header of the {key} column [the first there is of {names}]",
        )


def find_columns(header, args):
    """Return the header of the column of each key in COLUMNS, None where there is no such column."""
    columns = []
    for key, usual in COLUMNS.items():
        typed = getattr(args, f"{key}_column")
        names = typed or usual
        column = next((name for name in names.split(",") if name in header), None)

        optional = key != "path" and not typed
        check(
            column or optional,
            f"{args.source}: no column named {names}; its header is {header} (commas separate); "
            f"try --{key}_column NAME",
        )
        columns.append(column)
    return columns


def rows(args):
    lines = read_table(args.source)
    _, header = next(lines, ("", []))
    columns = find_columns(header, args)
    root = Path(args.root or Path(args.source).parent)
    classes = list(read_classes(args.classes).values()) if args.classes else None

    all_rows, seen = [], set()
    for where, fields in lines:
        cells = dict(zip(header, map(str.strip, fields)))
        path, label, split, group = (cells.get(column, "") for column in columns)
        check(path, f"{where}: no path")

        # a file may come several times, as pieces of a long recording, but each piece once
        start, end = seconds_of(cells.get("start"), cells.get("end"), where)
        piece = (os.path.normpath(path), start, end)
        check(piece not in seen, f"{where}: {path} stands there twice")
        seen.add(piece)

        names = map(str.strip, label.split(";" if ";" in label else ","))
        labels = list(filter(None, names))
        for name in labels:
            check(
                not classes or name in classes,
                f"{where}: label {name!r} is not in {args.classes}",
            )

        if not args.keep or split in args.keep.split(","):
            all_rows.append(
                row_of(root / path, root, labels, split, group, path=path, start=start, end=end)
            )

    check(all_rows, f"{args.source}: no rows, or none that --keep names")
    return all_rows, classes
