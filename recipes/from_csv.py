"""A table with a path column, and if there are, with label, split, group, start and end.

It has a header, in which a column may go by one of several names; case does not count. Cells are separated
by commas, semicolons, tabs or |. A cell of labels is a list as Python or JSON writes it, ["a", "b"], or
names between one mark in the whole column: ; if there is any, else |, else commas. So names with commas are
safe beside a ; anywhere, or where --classes lists them.
"""

import os
from pathlib import Path

from common import check
from recipes.tables import (
    labels_of,
    read_classes,
    read_table,
    row_of,
    seconds_of,
    separator_of,
    split_of
)

COLUMNS = dict(
    path="path,file,filename,wav",
    label="label,labels,category,class",
    split="split,fold,fold_or_split",
    group="group,speaker"
)


def add_flags(parser):
    parser.add_argument("source", help="table with a header; labels: a;b or a,b or ['a', 'b']")
    parser.add_argument("--root", help="folder that the paths start from [that of the table]")
    parser.add_argument("--keep", help="only these splits or folds, as in 1,2,3,4 [all]")
    parser.add_argument(
        "--classes",
        help="file of the class names in order, one a line [the labels that occur, sorted]"
    )
    parser.add_argument(
        "--no_times",
        "--no-times",
        action="store_true",
        help="whole files: start and end are times in the recordings that files were cut from"
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
        names = (typed or usual).lower()
        column = next((name for name in names.split(",") if name in header), None)
        if typed or key == "path":
            problem = f"no column named {names}; its header is {header}"
            check(column, f"{args.source}: {problem}; try --{key}_column NAME")
        check(
            column is None or header.count(column) == 1,
            f"{args.source}: two columns are named {column}; give one another name"
        )
        yield column


def read_cells(args):
    """Return (where, {header: cell}) of each line, and the header of the column of each key in COLUMNS."""
    lines = read_table(args.source, among=",;\t|")
    _, header = next(lines, ("", []))
    header = [name.strip().lower() for name in header]
    columns = list(find_columns(header, args))

    table = []
    for where, fields in lines:
        check(
            not any(fields[len(header) :]),
            f"{where}: more cells than the header has; a cell with commas wants quotation marks"
        )
        table.append((where, dict(zip(header, map(str.strip, fields)))))
    return table, columns


def rows(args):
    known = read_classes(args.classes) if args.classes else {}
    table, columns = read_cells(args)
    separator = separator_of(cells.get(columns[1], "") for _, cells in table)
    root = Path(args.root or Path(args.source).parent)

    all_rows, seen = [], set()
    for where, cells in table:
        path, label, split, group = (cells.get(column, "") for column in columns)
        check(path, f"{where}: no path")
        labels = [label]
        if label not in known.values():
            labels = labels_of(label, separator, where)
        labels = [known.get(name, name) for name in labels]

        start, end = 0.0, None
        if not args.no_times:
            start, end = seconds_of(cells.get("start"), cells.get("end"), where)
        row = row_of(root / path, root, labels, split_of(split), group, start=start, end=end)

        # a file may come several times, as pieces of a long recording, but each piece once
        piece = row["path"], start, end
        twice = "stands there twice (pieces of a recording have a start and an end, by these headers)"
        check(piece not in seen, f"{where}: {path} {twice}")
        seen.add(piece)
        if not args.keep or {split, row["split"]} & set(args.keep.split(",")):
            all_rows.append(row)

    splits = sorted({cells.get(columns[2], "") for _, cells in table})
    check(all_rows, f"{args.source}: no row to keep; its splits are {', '.join(splits)}")
    check(
        any(os.path.lexists(row["file"]) for row in all_rows),
        f"{args.source}: none of its files is there, {all_rows[0]['file']} the first; "
        "--root DIR says where paths start from"
    )
    return all_rows, known.values() if known else None
