"""IEMOCAP: four emotions, five folds.

Busso et al. 2008, as SUPERB uses it: neu, hap (with exc), ang and sad, improvised and scripted. A fold is a
session, a group a speaker.
"""

import re

from common import check
from recipes.tables import row_of, unpacked

# [6.2901 - 8.2357]   Ses01F_impro01_M000   neu   ..., which is what the man of session 1 says
UTTERANCE = re.compile(r"^\[.*\t((\w+)_([FM])\d+)\t(neu|hap|exc|ang|sad)\t", re.MULTILINE)


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked")


def rows(args):
    root = unpacked(args.source, "IEMOCAP_full_release")
    all_rows = []
    for session in "12345":
        folder = root / f"Session{session}"
        tables = folder / "dialog/EmoEvaluation"
        check(
            tables.is_dir(),
            f"{tables}: no such folder; Session1 to Session5 are all needed, in the folder you name"
        )

        for table in sorted(tables.glob("[!.]*.txt")):
            text = table.read_text(encoding="latin-1")
            for name, dialog, sex, emotion in UTTERANCE.findall(text):
                file = folder / f"sentences/wav/{dialog}/{name}.wav"
                label = "hap" if emotion == "exc" else emotion
                all_rows.append(row_of(file, root, [label], session, name[:5] + sex))
    return all_rows, ["neu", "hap", "ang", "sad"]
