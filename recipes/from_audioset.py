"""AudioSet, from its tables or AST's json.

Gemmeke et al. 2017. Files may lie anywhere below the folder, under the names that downloaders give them.
Classes are the display names, in the order of their index.
"""

import json
import re
from pathlib import Path

from audio import SUFFIXES, audio_files
from common import UserError, check
from recipes.tables import read_classes, read_table, row_of, seconds_of


def add_flags(parser):
    parser.add_argument("source", help="folder of the audio files")
    parser.add_argument(
        "--train",
        default="",
        help="tables, as in balanced_train_segments.csv,unbalanced_train_segments.csv",
    )
    parser.add_argument("--test", default="", help="tables, as in eval_segments.csv")
    parser.add_argument(
        "--class_csv", "--class-csv", required=True, help="class_labels_indices.csv"
    )


def read_json(table):
    """Yield (where, fields) as read_table does, from AST's {"data": [{"wav": path, "labels": "mid,mid"}]}."""
    try:
        text = re.sub("(?m)^#.*", "", Path(table).read_text())
        for number, item in enumerate(json.loads(text)["data"], start=1):
            name = Path(item["wav"]).stem
            yield f"{table}, item {number}", [name, "0", "10", item["labels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = '{"data": [{"wav": ..., "labels": "mid,mid"}]}'
        raise UserError(f"{table}: wants {wanted} ({error!r})") from None


def segments(args):
    """Yield (split, where, id, start, end, mids) for each line of each table: YTID, start, end, "mid,mid"."""
    for split in ("train", "test"):
        for table in filter(None, getattr(args, split).split(",")):
            read = read_json if table.endswith(".json") else read_table
            for where, fields in read(table):
                if fields[0].startswith("# "):
                    continue
                check(
                    len(fields) > 3 and all(fields[:4]),
                    f'{where}: wants YTID, start_seconds, end_seconds, "labels", not {fields}',
                )
                name, start, end, mids = fields[:4]
                start, end = seconds_of(start, end, where)
                yield split, where, name, start, end, mids.split(",")


def spellings(seconds):
    return [f"_{seconds:.3f}", f"_{seconds:.1f}", f"_{seconds:g}", f"_{round(1000 * seconds)}"]


def find_file(files, name, start, end):
    """Return the file of a segment, None if there is none. files: {name without ending: [files]}.

    Downloaders write ID, YID, ID_START or ID_START_END, with times as 30.000, 30.0, 30 or 30000 (in ms).
    """
    tails = [""]
    for first, last in zip(spellings(start), spellings(end)):
        tails += [first, first + last]

    for stem in [prefix + name + tail for tail in tails for prefix in ("", "Y")]:
        if stem in files:
            file, *twins = files[stem]
            check(
                not twins,
                f"{file} and {files[stem][-1]} have one name: which is {name}? Move one of them away",
            )
            return file
    return None


def rows(args):
    check(args.train or args.test, "--train or --test: name at least one table of clips")
    root = args.source
    classes = read_classes(args.class_csv)
    files = {}
    for file in audio_files(root, SUFFIXES | {".m4a", ".mp4", ".webm"}):
        files.setdefault(file.stem, []).append(file)

    all_rows, seen = [], {}
    for split, where, name, start, end, mids in segments(args):
        for mid in mids:
            check(mid in classes, f"{where}: label {mid!r} is not in {args.class_csv}")
        labels = [classes[mid] for mid in mids]
        file = find_file(files, name, start, end)
        row = row_of(file or Path(root, name), root, labels, split, name)
        all_rows.append(row)

        if name.startswith("#"):  # of an id that begins with = or -, a formula to a spreadsheet
            row["problem"] = f"{where}: {name} is no YouTube id (a spreadsheet has been here)"
        elif file is None:
            row["problem"] = f"{where}: no file for {name} below {root}"
        else:
            check(file not in seen, f"{where}: {name} stands in {seen.get(file)} already")
            seen[file] = where
    return all_rows, list(classes.values())
