"""VoxLingua33: the 33 languages of VoxLingua107 that its dev set has.

Valk and Alumaee 2021. dev is for test. X-ARES trains on a part of the training set, which only its archives
name: here it is all of it, or --most recordings a language, evenly spaced. Groups are the videos.
"""

from pathlib import Path

from common import check
from recipes.tables import parts_of_name, recordings, row_of, unpacked

LANGUAGES = (
    "ar az da de el en es et fa fi fr hr hu hy is it ja "
    "lt lv mk nl nn no pl pt ru sl sr sv tr uk ur zh"
).split()


def add_flags(parser):
    parser.add_argument("source", help="folder with ar, az, ... (or train/ar, ...) and dev/ar, ...")
    parser.add_argument(
        "--most", type=int, default=0, help="training recordings of a language [0 = all]"
    )


def rows(args):
    check(args.most >= 0, f"--most {args.most}: is not negative")
    root = Path(args.source)
    train = unpacked(root, "train")
    all_rows = []
    for language in LANGUAGES:
        files = recordings(train / language, "*---*.wav")
        most = min(args.most or len(files), len(files))
        parts = dict(
            train=[files[i * len(files) // most] for i in range(most)],
            test=recordings(root / "dev" / language, "*---*.wav")
        )
        for split, some in parts.items():
            for file in some:
                # the video, and where in it
                name = "aBcDeFgHiJk__U__S14---0101.220-0108.010"
                [video] = parts_of_name(file, r"(.+?)(?:__U__.*)?---[\d.-]+", name)
                all_rows.append(row_of(file, root, [language], split, video))
    return all_rows, LANGUAGES
