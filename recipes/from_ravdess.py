"""RAVDESS: eight acted emotions in speech.

Livingstone and Russo 2018. There are no official folds, and those of X-ARES are only in its archives: here
the four folds are actors 1 to 6, 7 to 12 and so on, three women and three men each. Songs are left out.
"""

from recipes.tables import parts_of_name, recordings, row_of, unpacked

EMOTIONS = "neutral calm happy sad angry fearful disgust surprised".split()


def add_flags(parser):
    parser.add_argument("source", help="folder with Actor_01 to Actor_24")


def rows(args):
    root = unpacked(args.source, "Audio_Speech_Actors_01-24")
    all_rows = []
    # audio only, speech (02 is song), angry, ..., actor
    for file in recordings(root, "Actor_*/03-01-*.wav"):
        pattern = r"03-01-0([1-8])-\d\d-\d\d-\d\d-([01]\d|2[0-4])"
        number, actor = parts_of_name(file, pattern, "03-01-05-01-02-01-12")
        fold = (int(actor) - 1) // 6
        emotion = EMOTIONS[int(number) - 1]
        all_rows.append(row_of(file, root, [emotion], str(fold), f"Actor_{actor}"))
    return all_rows, EMOTIONS
