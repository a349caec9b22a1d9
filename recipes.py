"""
How known data sets lie on disk. Each function returns (rows, classes) for data.write_pack.

A row is a dict: path (its name in the pack), labels (list of class names), split, group, file, start, end (seconds), and where needed
max_seconds (cut into pieces of this length) or problem (why it cannot be used: it is then listed as skipped).
classes None = the labels that occur, sorted.
"""
import csv
import hashlib
import json
import math
import os
import re
from pathlib import Path

from common import UserError

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff", ".au", ".w64", ".caf"}

def row_of(file, root, labels=(), split="", group="", **more):
    return dict(path=os.path.relpath(file, root), labels=list(labels), split=split, group=group, file=file, start=0.0, end=None) | more

def read_table(table, skip_comments=False):
    """A csv file -> list of (line number, fields). Spaces after commas do not count, quoted commas do not separate."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, skipinitialspace=True, strict=True)
            lines = [(reader.line_num, line) for line in reader if line and not (skip_comments and line[0].startswith("# "))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read as a table ({error})") from None
    for number, line in lines:
        if "\n" in "".join(line):
            raise UserError(f"{table}, line {number}: a quotation mark is open over several lines")
    return lines

def read_classes(path):
    """Class names in order: one a line, or AudioSet's `index,mid,display_name`. Returns (names, {mid or name: name})."""
    lines = read_table(path)
    if lines and lines[0][1][:2] == ["index", "mid"]:
        if [line[0] for _, line in lines[1:] if len(line) == 3] != [str(i) for i in range(len(lines) - 1)]:
            raise UserError(f"{path}: the index column does not count 0, 1, 2, ...")
        return [line[2] for _, line in lines[1:]], {line[1]: line[2] for _, line in lines[1:]}
    names = [",".join(line).strip() for _, line in lines]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: wants one class name a line, each once, or the header index,mid,display_name")
    return names, {name: name for name in names}

def from_csv(table, root=None, columns=None, keep=None, class_file=None):
    """A table with a header: path, and if there are label (several separated by ; or ,), split or fold, group, start, end."""
    lines = read_table(table)
    header = lines[0][1] if lines else []
    names = {"path": ["path", "file", "filename", "wav"], "label": ["label", "labels", "category", "class"],
             "split": ["split", "fold", "fold_or_split"], "group": ["group", "speaker"], "start": ["start"], "end": ["end"]}
    for name in filter(None, (columns or {}).values()):
        if name not in header:
            raise UserError(f"{table}: no column named {name}; its header is {header}")
    found = {key: next((n for n in options if n in header), None) for key, options in names.items()} | (columns or {})
    if found["path"] is None:
        raise UserError(f"{table}: no column named {', '.join(names['path'])}; its header is {header} (commas separate); "
                        "try --path_column NAME")
    place = {key: header.index(name) for key, name in found.items() if name}
    root = Path(root or Path(table).parent)
    rows, seen, classes = [], set(), read_classes(class_file)[0] if class_file else None
    for number, line in lines[1:]:
        get = lambda key: line[place[key]].strip() if key in place and place[key] < len(line) else ""
        path = get("path")
        if not path:
            raise UserError(f"{table}, line {number}: no path")
        try:
            start, end = float(get("start") or 0), float(get("end")) if get("end") else None
        except ValueError:
            raise UserError(f"{table}, line {number}: start and end are seconds, not {get('start')!r}, {get('end')!r}") from None
        if not 0 <= start < (math.inf if end is None else end) or end == math.inf:
            raise UserError(f"{table}, line {number}: a clip cannot go from {start} s to {end} s")
        if (os.path.normpath(path), start, end) in seen:
            raise UserError(f"{table}, line {number}: {path} stands there twice")
        seen.add((os.path.normpath(path), start, end))
        labels = [label.strip() for label in get("label").split(";" if ";" in get("label") else ",") if label.strip()]
        unknown = [label for label in labels if classes and label not in classes]
        if unknown:
            raise UserError(f"{table}, line {number}: label {unknown[0]!r} is not in {class_file}")
        rows.append(dict(path=path, labels=labels, split=get("split"), group=get("group"),
                         file=root / path, start=start, end=end))
    if keep:
        rows = [row for row in rows if row["split"] in keep.split(",")]
    if not rows:
        raise UserError(f"{table}: no rows" + (f" with split {keep}" if keep else ""))
    return rows, classes

def audio_below(root, suffixes=SUFFIXES):
    """Every audio file below root, sorted; hidden ones (and the ._ files that Macs leave) are none. Links are followed, once."""
    def unreadable(error):
        raise UserError(f"{error.filename}: {'no such folder' if isinstance(error, FileNotFoundError) else error.strerror}")
    files, seen = [], set()
    for folder, below, names in os.walk(root, onerror=unreadable, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        files += [Path(folder, name) for name in names if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")]
    if not files:
        raise UserError(f"{root}: no audio files below it ({' '.join(sorted(suffixes))})")
    return sorted(files)

def from_folder(root):
    """Every audio file below root; if all lie one folder deep, the folder is the class."""
    files = audio_below(root)
    stray = [p for p in files if len(p.relative_to(root).parts) != 2]
    if stray and len(stray) < len(files):
        print(f"{root}: no labels, for not every file is one folder deep ({stray[0]} is not)")
    return [row_of(p, root, [] if stray else [p.parent.name]) for p in files], None

def from_esc50(root):
    """ESC-50 (Piczak 2015): audio/ and meta/esc50.csv; five folds, classes in the order of `target`, group = source recording."""
    root = next((r for r in (Path(root), Path(root, "ESC-50-master")) if (r / "meta/esc50.csv").exists()), None) or Path(root)
    lines = [line for _, line in read_table(root / "meta/esc50.csv")]
    if (not lines or lines[0][:4] != ["filename", "fold", "target", "category"]
            or not all(len(line) > 3 and line[2].isdigit() for line in lines[1:])):
        raise UserError(f"{root / 'meta/esc50.csv'}: not ESC-50's table, filename,fold,target,category,...")
    name_of = {int(line[2]): line[3] for line in lines[1:]}
    rows = [row_of(root / "audio" / line[0], root, [line[3]], split=line[1], group=line[5] if len(line) > 5 else "")
            for line in lines[1:]]
    return rows, [name_of[target] for target in sorted(name_of)]

def from_audioset(root, tables, class_csv):
    """AudioSet (Gemmeke et al. 2017). tables: {split: [paths]} of *_segments.csv or of AST's json; class_csv: class_labels_indices.csv.

    Files are looked for anywhere below root, named as downloaders name them: ID, YID, ID_START or ID_START_END, with times as
    30.000, 30.0, 30 or 30000 (milliseconds). Classes are the display names in the order of their index.
    """
    classes, name_of = read_classes(class_csv)
    files, rows, seen = {}, [], {}
    for file in audio_below(root, SUFFIXES | {".m4a", ".mp4", ".webm"}):
        files.setdefault(file.stem, []).append(file)
    for split, paths in tables.items():
        for table in paths:
            for number, name, start, end, labels in (ast_items if str(table).endswith(".json") else segments)(table):
                times = [(form(start), form(end)) for form in (lambda s: f"_{s:.3f}", lambda s: f"_{s:.1f}",
                                                                         lambda s: f"_{s:g}", lambda s: f"_{round(1000 * s)}")]
                stems = [y + name + tail for tail in ["", *(tail for first, last in times for tail in (first, first + last))]
                         for y in ("", "Y")]
                file, *more = next((files[stem] for stem in stems if stem in files), [None])
                if more:
                    raise UserError(f"{file} and {more[0]} have one name: which is {name}? Move one of them away")
                if (name, start) in seen and not name.startswith("#"):
                    raise UserError(f"{table}, line {number}: {name} stands in {seen[name, start]} already")
                seen[name, start] = table
                unknown = [label for label in labels if label not in name_of]
                if unknown:
                    raise UserError(f"{table}, line {number}: label {unknown[0]!r} is not in {class_csv}")
                row = row_of(file or Path(root, name), root, [name_of[label] for label in labels], split, group=name)
                if name.startswith("#"):
                    row |= dict(path=f"{table}:{number}",
                                problem=f"{table}, line {number}: {name} is no YouTube id (a spreadsheet has been here)")
                elif file is None:
                    row["problem"] = f"{table}, line {number}: no file for {name} below {root}"
                rows.append(row)
    return rows, classes

def segments(table):
    """AudioSet's csv, three comment lines and `YTID, start, end, "mid,mid"` -> (line, id, start, end, labels)."""
    for number, line in read_table(table, skip_comments=True):
        try:
            name, start, end, labels = line[0], float(line[1]), float(line[2]), line[3].split(",")
        except (IndexError, ValueError):
            raise UserError(f"{table}, line {number}: wants YTID, start_seconds, end_seconds, \"labels\", "
                            f"not {','.join(line)}") from None
        if not 0 <= start < end:
            raise UserError(f"{table}, line {number}: a clip cannot go from {start} s to {end} s")
        yield number, name, start, end, labels

def ast_items(table):
    """AST's {"data": [{"wav": path, "labels": "mid,mid"}]}, with or without a leading # line -> like segments(),
    name = stem of the path."""
    try:
        text = "".join(line for line in Path(table).read_text().splitlines(True) if not line.startswith("#"))
        items = [(Path(item["wav"]).stem, item["labels"].split(",")) for item in json.loads(text)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{table}: wants {{\"data\": [{{\"wav\": ..., \"labels\": \"mid,mid\"}}]}} ({error!r})") from None
    for number, (name, labels) in enumerate(items, start=1):
        yield number, name, 0.0, 10.0, labels

KS1_WORDS = "yes no up down left right on off stop go".split()

def from_speechcommands(root, version=2, test_root=None):
    """Speech Commands (Warden 2018). Version 2: 35 words, split by the archive's lists (KS2).

    Version 1: SUPERB's 12 classes (KS1): ten words, _unknown_, and _silence_ in pieces of 1 s of the noise files, in train and
    valid alike; train and valid by the hash of the speaker, whose 10 to 20 % go to nobody; test is an archive of its own,
    test_root.
    """
    root, rows = Path(root), []
    words = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))) if root.is_dir() else []
    if not words:
        raise UserError(f"{root}: wants a folder per word")
    speaker = lambda name: re.sub(r"_nohash_.*$", "", name)
    wavs = lambda folder: sorted(p for p in folder.glob("*.wav") if not p.name.startswith("."))
    if version == 2:
        listed = {}
        for split, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
            try:
                listed |= dict.fromkeys((root / name).read_text().split(), split)
            except OSError:
                raise UserError(f"{root / name}: no such file; it comes with the archive of version 0.02") from None
        for word in words:
            rows += [row_of(p, root, [word], listed.pop(f"{word}/{p.name}", "train"), speaker(p.name)) for p in wavs(root / word)]
        rows += [row_of(root / name, root, [], split, problem=f"{root / name}: listed for {split}, and not there")
                 for name, split in listed.items()]
        return rows, words
    if test_root is None or not Path(test_root).is_dir():
        raise UserError(f"--test_root {test_root}: version 1 is tested on an archive of its own, speech_commands_test_set_v0.01; "
                        "name its folder")
    for word in words:
        for p in wavs(root / word):
            percent = int(hashlib.sha1(speaker(p.name).encode()).hexdigest(), 16) % 2**27 * 100 / (2**27 - 1)
            if not 10 <= percent < 20:
                rows.append(row_of(p, root, [word if word in KS1_WORDS else "_unknown_"], "valid" if percent < 10 else "train",
                                   speaker(p.name)))
    for split in ("train", "valid"):
        rows += [row_of(p, root, ["_silence_"], split, p.stem, max_seconds=1.0) for p in wavs(root / "_background_noise_")]
    classes = KS1_WORDS + ["_unknown_", "_silence_"]
    for name in classes:
        rows += [row_of(p, Path(test_root).parent, [name], "test", speaker(p.name)) for p in wavs(Path(test_root, name))]
    for split, name, where in (("train", "_silence_", root / "_background_noise_"), ("test", "_silence_", Path(test_root, "_silence_")),
                               ("test", "_unknown_", Path(test_root, "_unknown_"))):
        if not any(row["split"] == split and row["labels"] == [name] for row in rows):
            raise UserError(f"{where}: no wav files; is this archive whole?")
    return rows, classes

def from_iemocap(root):
    """IEMOCAP (Busso et al. 2008) as SUPERB uses it: neu, hap (with exc), ang, sad; improvised and scripted;
    fold = session, group = speaker."""
    root = next((r for r in (Path(root), Path(root, "IEMOCAP_full_release")) if (r / "Session1").is_dir()), None)
    if root is None:
        raise UserError("no Session1 ... Session5 in the folder given; name the one that holds them (IEMOCAP_full_release)")
    rows = []
    for session in range(1, 6):
        folder = root / f"Session{session}/dialog/EmoEvaluation"
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; all five sessions are needed")
        for table in sorted(folder.glob("*.txt")):
            if table.name.startswith("."):
                continue                            # Mac leftovers
            for line in table.read_text(encoding="latin-1").splitlines():
                fields = line.split("\t")
                if not line.startswith("[") or len(fields) < 3:
                    continue
                name, label = fields[1], {"exc": "hap"}.get(fields[2], fields[2])
                if label in ("neu", "hap", "ang", "sad"):
                    file = root / f"Session{session}/sentences/wav/{name.rpartition('_')[0]}/{name}.wav"
                    speaker = name[:5] + name.rpartition("_")[2][:1]         # Ses01F_impro01_M000: the man speaks
                    rows.append(row_of(file, root, [label], str(session), group=speaker))
    if not rows:
        raise UserError(f"{root}: no labelled utterances in Session*/dialog/EmoEvaluation/*.txt")
    return rows, ["neu", "hap", "ang", "sad"]
