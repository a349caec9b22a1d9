"""What the recipes share: how to make a row, find files, and read tables, classes, labels and times."""

import ast
import codecs
import csv
import io
import math
import os
import re
from itertools import zip_longest
from pathlib import Path

from audio import printable
from common import UserError, check


def row_of(file, root, labels, split="", group="", **more) -> dict:
    """Return the row of a file, named as seen from root. more: other keys of the row, or other values."""
    row = dict(
        path=printable(os.path.relpath(file, root)),
        labels=list(dict.fromkeys(map(printable, labels))),
        split=split,
        group=printable(group),
        file=file,
        start=0.0,
        end=None
    )
    return row | more


SPLITS = r"(train|test|valid|val|validation|dev|eval|evaluation)(ing|_?set)?"


def split_of(name) -> str:
    """Return the name of a split or fold as packs have it: train for Training, 1 for fold_01 or 1.0."""
    for pattern in (SPLITS, r"(?:fold|cv|part|split)?[ _-]?0*(\d+)(?:\.0+)?"):
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            return match[1].lower()
    return name


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


def parts_of_name(file, pattern, example) -> tuple:
    """Return the groups of a pattern in the stem of a file's name. Raises UserError where it is another."""
    match = re.fullmatch(pattern, file.stem)
    check(match, f"{printable(file)}: not named as {example} is; move it away")
    return match.groups()


def read_text(path) -> str:
    """Read a text in UTF-8, in UTF-16 with its mark, or, which is said, in Latin-1. Raises UserError."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        print(f"{path}: is not UTF-8; read as Latin-1")
        text = content.decode("latin-1")
    check("\0" not in text, f"{path}: is no text in UTF-8, or in UTF-16 with a byte order mark")
    return text


def read_table(path, among="", **form):
    """Yield (where, fields) for each line of a csv file. where: the file and the line, for error messages.

    Spaces after commas do not count, nor do lines without anything. among: what may separate cells, of which
    that counts which the first line has most of; form: what csv.reader has to know of it. Raises UserError
    where it is no table.
    """
    text = read_text(path)
    if among:
        first = text.lstrip().partition("\n")[0]
        form["delimiter"] = max(among, key=first.count)
    lines = io.StringIO(text, newline="")
    try:
        reader = csv.reader(lines, skipinitialspace=True, strict=True, **form)
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            line = "".join(fields)
            check("\n" not in line, f"{where}: a quotation mark is open over several lines")
            if line.strip():
                yield where, fields
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise UserError(f"{where}: cannot be read as a table ({error})") from None


def read_records(path, columns, **form):
    """Yield {header: cell} for each line of a csv file; a cell that is not there is empty.

    Raises UserError where the header lacks one of the columns, whose names spaces separate, or has it twice.
    """
    lines = read_table(path, **form)
    _, header = next(lines, ("", []))
    header = list(map(str.strip, header))
    wrong = [name for name in columns.split() if header.count(name) != 1]
    check(not wrong, f"{path}: no column {', '.join(wrong)}, or several, in its header {header}")
    for _, fields in lines:
        yield dict(zip_longest(header, fields[: len(header)], fillvalue=""))


LIST = r"\[|[({]\s*['\"]"  # how a list begins that Python or JSON has written


def read_classes(path) -> dict:
    """Return the classes in order: {label as tables write it: class name}.

    The file has a name a line, or is a list as JSON writes it. Or it has columns in any order, with a header
    or without: the names, and an index, 0, 1, 2, ..., or a mid as AudioSet's /m/0jbk, which tables then
    write, or both of these.
    """
    text = read_text(path)
    index = mids = None
    if re.match(LIST, text):
        names = labels_of(text.strip(), ",", path)
    else:
        table = read_table(path, among="\t,")
        lines = [list(map(str.strip, fields)) for _, fields in table]
        names, index, mids = columns_of(lines)

    if not names:  # a line is a name, with its commas, unless all of it is in quotation marks
        whole = filter(None, map(str.strip, text.splitlines()))
        names = [fields[0] if len(fields) == 1 else line for fields, line in zip(lines, whole)]
    if index:
        counts = index == [str(number) for number in range(len(index))]
        check(counts, f"{path}: the index column does not count 0, 1, 2, ...")

    classes = dict(zip(mids or names, names))
    check(
        0 < len(classes) == len(names),
        f"{path}: wants one class name a line, each once, or the header index,mid,display_name"
    )
    return classes


def columns_of(lines) -> tuple:
    """Return the columns of a table of classes, names, index and mids, without its header; None for none."""
    columns, header = dict(names=None, index=None, mids=None), False
    if len(set(map(len, lines))) > 1:
        return None, None, None

    for first, *rest in zip(*lines):
        kind = "names"
        for candidate, pattern in (("index", r"\d+"), ("mids", r"/\w/\w+")):
            if all(re.fullmatch(pattern, cell) for cell in rest or [first]):
                kind = candidate
                header |= not re.fullmatch(pattern, first)
        if columns[kind]:  # a second one: these are names with commas
            return None, None, None
        columns[kind] = [first, *rest]

    names, index, mids = (column and column[header:] for column in columns.values())
    if not names or not (index or mids):
        return None, None, None
    return names, index, mids


def separator_of(cells) -> str:
    """Return what separates the labels in all cells of a column: the first of ; | , that is in any."""
    plain = "".join(cell for cell in cells if not re.match(LIST, cell))
    return next((mark for mark in ";|" if mark in plain), ",")


def labels_of(cell, separator, where) -> list:
    """Return the labels in a cell: names with separators, or a list as Python or JSON writes it."""
    if not re.match(LIST, cell):
        return list(filter(None, map(str.strip, cell.split(separator))))
    try:
        labels = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        labels = None
    names = isinstance(labels, (list, tuple)) and {type(label) for label in labels} <= {str, int}
    missing = re.search(r"['\"]\s+['\"]", cell)  # a comma, as where numpy prints an array
    check(
        names and not missing,
        f"{where}: {cell[:60]} begins like a list, but is none of names, as in ['a', 'b'] or a;b"
    )
    return list(map(str, labels))


def seconds_of(start, end, where) -> tuple:
    """Return two cells of a table in seconds; an empty start is 0.0, an empty end None: that of the file."""
    try:
        first = float(start or 0)
        last = float(end or first + 1)
    except ValueError:
        raise UserError(f"{where}: start and end are seconds, not {start!r}, {end!r}") from None

    check(0 <= first < last < math.inf, f"{where}: a clip cannot go from {first} s to {last} s")
    return first, last if end else None
