"""RAVDESS: eight acted emotions in speech.

Livingstone and Russo 2018. There are no official folds, and those of X-ARES are only in its archives: here
the four folds are actors 1 to 6, 7 to 12 and so on, three women and three men each. Songs are left out.
"""

from recipes.tables import recordings, row_of, unpacked

EMOTIONS = "neutral calm happy sad angry fearful disgust surprised".split()


def add_flags(parser):
    parser.add_argument("source", help="folder with Actor_01 to Actor_24")


def rows(args):
    root = unpacked(args.source, "Audio_Speech_Actors_01-24")
    all_rows = []
    # 03-01-05-...: audio only, speech (02 is song), angry
    for file in recordings(root, "Actor_*/03-01-*.wav"):
        actor = file.parent.name
        fold = (int(actor[-2:]) - 1) // 6
        number = int(file.stem[6:8])
        emotion = EMOTIONS[number - 1]
        all_rows.append(row_of(file, root, [emotion], str(fold), actor))
    return all_rows, EMOTIONS
