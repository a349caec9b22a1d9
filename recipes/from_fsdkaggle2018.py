"""FSDKaggle2018: 41 sound events.

Fonseca et al. 2018. The splits are the authors'. Labels of train were not all checked by people (column
manually_verified); all are used, as in X-ARES.
"""

from pathlib import Path

from recipes.tables import read_records, row_of

TABLES = dict(train="train_post_competition.csv", test="test_post_competition_scoring_clips.csv")


def add_flags(parser):
    parser.add_argument(
        "source",
        help="folder with FSDKaggle2018.audio_train, FSDKaggle2018.audio_test and FSDKaggle2018.meta"
    )


def rows(args):
    root = Path(args.source)
    all_rows = []
    for split, table in TABLES.items():
        folder = root / f"FSDKaggle2018.audio_{split}"
        for cells in read_records(root / "FSDKaggle2018.meta" / table, "fname label"):
            file = folder / cells["fname"]
            all_rows.append(row_of(file, root, [cells["label"]], split))
    return all_rows, None
