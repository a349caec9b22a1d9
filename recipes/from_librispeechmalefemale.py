"""LibriSpeech, male or female, in pieces of 5 s.

Panayotov et al. 2015. train-clean-100, dev-clean and test-clean, as in X-ARES, where pieces are of 5 s as
well. Groups are the speakers.
"""

import re

from common import check
from recipes.tables import read_text, recordings, row_of, unpacked

FOLDERS = dict(train="train-clean-100", valid="dev-clean", test="test-clean")


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked: LibriSpeech is in it")


def rows(args):
    root = unpacked(args.source, "LibriSpeech")
    table = root / "SPEAKERS.TXT"
    check(table.is_file(), f"{table}: no such file; each archive of LibriSpeech has it")
    # 60   | M | train-clean-100  | 20.18 | |CBW|Simon
    sexes = dict(re.findall(r"^(\d+) *\| *([MF]) ", read_text(table), re.MULTILINE))

    all_rows = []
    for split, folder in FOLDERS.items():
        for file in recordings(root / folder, "*/*/*.flac"):
            speaker = file.parts[-3]
            check(speaker in sexes, f"{file}: speaker {speaker} is not in {table}")
            sex = sexes[speaker]
            all_rows.append(row_of(file, root, [sex], split, speaker, max_seconds=5.0))
    return all_rows, ["M", "F"]
