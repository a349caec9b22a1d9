"""What the recipes share: how to make a row, find files, and read tables, lists of classes and times."""

import csv
import math
import os
from itertools import zip_longest
from pathlib import Path

from common import UserError, check


def row_of(file, root, labels, split="", group="", **more) -> dict:
    """Return the row of a file, named as seen from root. more: other keys of the row, or other values."""
    row = dict(
        path=os.path.relpath(file, root),
        labels=labels,
        split=split,
        group=group,
        file=file,
        start=0.0,
        end=None
    )
    return row | more


def unpacked(source, archive) -> Path:
    """Return the folder that an archive unpacks to: source itself, or the one of that name in it."""
    inner = Path(source, archive)
    return inner if inner.exists() else Path(source)


def recordings(folder, pattern="*.wav") -> list:
    """Return the files of a pattern below a folder, sorted, without hidden ones. Raises UserError if none."""
    files = sorted(
        file for file in Path(folder).glob(pattern) if not file.name.startswith(".")
    )
    check(files, f"{folder}: no {pattern} in it; name the folder that the archives unpack to")
    return files


def read_table(path, **form):
    """Yield (where, fields) for each line of a csv file. where: the file and the line, for error messages.

    Spaces after commas do not count. form: what csv.reader has to know of it. Raises UserError where it is
    no table.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True, **form)
            for fields in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                check(
                    "\n" not in "".join(fields),
                    f"{where}: a quotation mark is open over several lines"
                )
                yield where, fields
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a table ({reason})") from None


def read_records(path, columns, **form):
    """Yield {header: cell} for each line of a csv file; a cell that is not there is empty.

    Raises UserError where the header lacks one of the columns, whose names spaces separate.
    """
    lines = read_table(path, **form)
    _, header = next(lines, ("", []))
    missing = set(columns.split()).difference(header)
    check(not missing, f"{path}: no column {', '.join(sorted(missing))} in its header {header}")
    for _, fields in lines:
        yield dict(zip_longest(header, fields[: len(header)], fillvalue=""))


def read_classes(path) -> dict:
    """Return the classes in order: {label as tables write it: class name}.

    The file has a name a line, or is AudioSet's index,mid,display_name, whose tables write the mid.
    """
    lines = [fields for _, fields in read_table(path)]
    if lines[:1] == [["index", "mid", "display_name"]]:
        lines = lines[1:]
        for number, fields in enumerate(lines):
            check(
                fields.pop(0) == str(number) and len(fields) == 2,
                f"{path}: the index column does not count 0, 1, 2, ..."
            )
    else:
        lines = [[",".join(fields).strip()] for fields in lines]

    classes = {fields[0]: fields[-1] for fields in lines}
    check(
        0 < len(classes) == len(lines),
        f"{path}: wants one class name a line, each once, or the header index,mid,display_name"
    )
    return classes


def seconds_of(start, end, where) -> tuple:
    """Return two cells of a table in seconds; an empty start is 0.0, an empty end None: that of the file."""
    try:
        first = float(start or 0)
        last = float(end or first + 1)
    except ValueError:
        raise UserError(f"{where}: start and end are seconds, not {start!r}, {end!r}") from None

    check(0 <= first < last < math.inf, f"{where}: a clip cannot go from {first} s to {last} s")
    return first, last if end else None
