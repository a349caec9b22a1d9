"""AudioSet, from its tables or AST's json.

Gemmeke et al. 2017. Files may lie anywhere below the folder, under the names that downloaders give them.
Classes are the display names, in the order of their index.
"""

import json
import re
from pathlib import Path

from audio import SUFFIXES, audio_files
from common import UserError, check
from recipes.tables import read_classes, read_table, read_text, row_of


def add_flags(parser):
    parser.add_argument("source", help="folder of the audio files")
    parser.add_argument(
        "--train",
        default="",
        help="tables, as in balanced_train_segments.csv,unbalanced_train_segments.csv"
    )
    parser.add_argument("--valid", default="", help="tables of the same kind, for validation")
    parser.add_argument("--test", default="", help="tables, as in eval_segments.csv")
    parser.add_argument(
        "--class_csv", "--class-csv", required=True, help="class_labels_indices.csv"
    )


def id_of(stem):
    """Return the YouTube id in a file's name: ID, YID, ID_START or ID_START_END. An id has one segment."""
    return re.sub(r"^Y?(.{11})(_[\d.]+){0,2}$", r"\1", stem)


def read_json(table):
    """Yield (where, fields) as read_table does, from AST's {"data": [{"wav": path, "labels": "mid,mid"}]}."""
    try:
        for number, item in enumerate(json.loads(read_text(table))["data"], start=1):
            name = id_of(Path(item["wav"]).stem)
            yield f"{table}, item {number}", [name, "0", "10", "" + item["labels"]]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        wanted = '{"data": [{"wav": ..., "labels": "mid,mid"}]}'
        raise UserError(f"{table}: wants {wanted} ({error!r})") from None


def segments(tables):
    """Yield (where, id, mids) for each line of each table: YTID, start, end, "mid,mid"."""
    for table in filter(None, tables.split(",")):
        read = read_json if table.endswith(".json") else read_table
        for where, fields in read(table):
            if fields[0].startswith("# "):
                continue
            check(
                len(fields) > 3 and all(fields),
                f'{where}: wants YTID, start_seconds, end_seconds, "labels", not {fields}'
            )
            yield where, fields[0], list(map(str.strip, fields[3].split(",")))


def rows(args):
    check(args.train or args.test, "--train or --test: name at least one table of clips")
    root = args.source
    classes = read_classes(args.class_csv)
    files = {}
    for file in audio_files(root, SUFFIXES | {".m4a", ".mp4", ".webm"}):
        twin = files.setdefault(id_of(file.stem), file)
        check(twin == file, f"{twin} and {file} have one name: move one of them away")

    all_rows, seen = [], {}
    for split in ("train", "valid", "test"):
        for where, name, mids in segments(getattr(args, split)):
            for mid in mids:
                check(mid in classes, f"{where}: label {mid!r} is not in {args.class_csv}")
            if name in files:
                check(name not in seen, f"{where}: {name} stands in {seen.get(name)} already")
                seen[name] = where

            labels = [classes[mid] for mid in mids]
            # one that is not there is listed as skipped
            file = files.get(name, Path(root, name))
            all_rows.append(row_of(file, root, labels, split, name))
    return all_rows, classes.values()
