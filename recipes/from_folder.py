"""Class per folder, or an unlabelled tree: every audio file below a folder.

If all files lie one folder deep, the folder is the class; folders that look like something else are asked
about. --folders says what they are.
"""

import re

from audio import audio_files
from common import check
from recipes.tables import SPLITS, row_of, split_of

# what names of folders look like, and the recipe that knows such a data set
LOOKS = {
    r"fsd50k\.(dev|eval)_audio": ("splits", "fsd50k"),
    rf"(.*[._ -])?{SPLITS}([._ -].*)?": ("splits", ""),
    r"fold[ _-]?\d+": ("splits", "urbansound8k"),
    r"(cv|part|split)?[ _-]?\d+": ("splits", ""),
    r"actor[ _-]?\d+": ("groups", "ravdess"),
    r"session[ _-]?\d+": ("groups", "iemocap"),
    r"(speaker|spk|subject|person|participant|user|id|s|p)[ _-]?\d+": ("groups", ""),
    r"audiowav": ("nothing", "cremad")
}


def add_flags(parser):
    parser.add_argument("source", help="folder of the audio files")
    parser.add_argument(
        "--folders",
        choices=["classes", "splits", "groups", "nothing"],
        help="what the folders below it are; with splits or groups, a folder in them is a class"
    )


def looks(names):
    """Return what folders of these names seem to be, and a recipe that may know them, or ""."""
    for pattern, answer in LOOKS.items():
        if names and all(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
            return answer
    return ("nothing", "") if len(names) == 1 else ("classes", "")


def rows(args):
    root, files = args.source, audio_files(args.source)
    below = [file.relative_to(root).parts[:-1] for file in files]
    names = sorted({parts[-1] for parts in below if parts})
    kind, recipe = looks(names)
    known = f"; python data.py {recipe} may know this data set" if recipe else ""
    means = args.folders

    if not means and all(len(parts) == 1 for parts in below):
        check(
            kind == "classes",
            f"{root}: are folders named {', '.join(names[:3])} classes, or {kind}? "
            f"Say --folders {kind}, or --folders classes{known}"
        )
        means = "classes"
    elif not means and names:
        print(f"{root}: no labels, for not every file is one folder deep; see --folders{known}")

    all_rows = []
    for file, parts in zip(files, below):
        row = dict(labels=[], split="", group="")
        if means == "classes" and parts:
            row["labels"] = parts[-1:]
        elif means in ("splits", "groups") and parts:
            row["labels"] = parts[1:][-1:]
            row[means[:-1]] = parts[0] if means == "groups" else split_of(parts[0])
        all_rows.append(row_of(file, root, **row))
    return all_rows, None
