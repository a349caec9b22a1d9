"""LibriCount: how many of 0 to 10 people speak at once.

Stoeter et al. 2018. There are no official folds (it is made of LibriSpeech's test-clean), and those of X-ARES
are only in its archives: here the five folds are a function of the file's name. Each mixture has up to ten of
the same 40 speakers, so that folds cannot be free of a test fold's speakers.
"""

import zlib

from recipes.tables import parts_of_name, recordings, row_of, unpacked


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked: test is in it")


def rows(args):
    root = unpacked(args.source, "LibriCount10-0dB")
    all_rows = []
    for file in recordings(root, "test/*_*.wav"):
        [speakers] = parts_of_name(file, r"(\d|10)_.+", "10_1234")
        fold = zlib.crc32(file.stem.encode()) % 5
        all_rows.append(row_of(file, root, [speakers], str(fold)))
    return all_rows, list(map(str, range(11)))
