"""GTZAN: music of ten genres.

Tzanetakis and Cook 2002. There are no official folds, and those of X-ARES are only in its archives: here fold
0 to 9 is the track number modulo 10, ten tracks a genre. Some artists are in several folds. jazz.00054 is
damaged and will be skipped.
"""

from recipes.tables import parts_of_name, recordings, row_of, unpacked


def add_flags(parser):
    parser.add_argument("source", help="folder of the genres' folders, unpacked")


def rows(args):
    root = unpacked(args.source, "genres")

    all_rows = []
    # blues/blues.00000.wav, or .au in older archives
    for file in recordings(root, "*/*.000*.*"):
        [fold] = parts_of_name(file, r"\w+\.000\d(\d)", "blues.00000")
        all_rows.append(row_of(file, root, [file.parent.name], fold))
    return all_rows, None
