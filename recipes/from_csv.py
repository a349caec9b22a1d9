"""A table with a path column, and if there are, with label, split, group, start and end.

It has a header, in which a column may go by one of several names.
"""

from pathlib import Path

from common import check
from recipes.tables import read_classes, read_table, row_of, seconds_of

COLUMNS = dict(
    path="path,file,filename,wav",
    label="label,labels,category,class",
    split="split,fold,fold_or_split",
    group="group,speaker"
)


def add_flags(parser):
    parser.add_argument(
        "source", help="table with a header; labels are separated by ; or by commas"
    )
    parser.add_argument("--root", help="folder that the paths start from [that of the table]")
    parser.add_argument("--keep", help="only these splits or folds, as in 1,2,3,4 [all]")
    parser.add_argument(
        "--classes",
        help="file of the class names in order, one a line [the labels that occur, sorted]"
    )
    for key, names in COLUMNS.items():
        parser.add_argument(
            f"--{key}_column",
            f"--{key}-column",
            help=f"header of the {key} column [the first there is of {names}]"
        )


def find_columns(header, args):
    """Yield the header of the column of each key in COLUMNS, None where there is no such column."""
    for key, usual in COLUMNS.items():
        typed = getattr(args, f"{key}_column")
        names = typed or usual
        column = next((name for name in names.split(",") if name in header), None)
        if typed or key == "path":
            problem = f"no column named {names}; its header is {header} (commas separate)"
            check(column, f"{args.source}: {problem}; try --{key}_column NAME")
        yield column


def rows(args):
    lines = read_table(args.source)
    _, header = next(lines, ("", []))
    columns = list(find_columns(header, args))
    root = Path(args.root or Path(args.source).parent)

    all_rows, seen = [], set()
    for where, fields in lines:
        cells = dict(zip(header, map(str.strip, fields)))
        path, label, split, group = (cells.get(column, "") for column in columns)
        separator = ";" if ";" in label else ","
        names = map(str.strip, label.split(separator))
        labels = list(filter(None, names))
        start, end = seconds_of(cells.get("start"), cells.get("end"), where)
        row = row_of(root / path, root, labels, split, group, start=start, end=end)

        # a file may come several times, as pieces of a long recording, but each piece once
        piece = row["path"], start, end
        check(piece not in seen, f"{where}: {path} stands there twice")
        seen.add(piece)
        if not args.keep or split in args.keep.split(","):
            all_rows.append(row)

    classes = read_classes(args.classes).values() if args.classes else None
    return all_rows, classes
