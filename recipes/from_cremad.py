"""CREMA-D: six acted emotions.

Cao et al. 2014; the emotion is the one that was to be acted. There are no official splits, and those of
X-ARES (70, 15 and 15 % of the clips, whoever speaks) are only in its archives: here speakers whose number
modulo 7 is 0 are for test, 1 for valid, 13 people each, and the other 65 for train.
"""

from recipes.tables import parts_of_name, recordings, row_of, unpacked

EMOTIONS = "ANG DIS FEA HAP NEU SAD".split()
SPLITS = {0: "test", 1: "valid"}


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set: AudioWAV is in it")


def rows(args):
    root = unpacked(args.source, "CREMA-D")
    all_rows = []
    # 1001_DFA_ANG_XX: speaker, sentence, emotion, intensity (one has but one X)
    for file in recordings(root, "AudioWAV/1*_*_*_*.wav"):
        speaker, emotion = parts_of_name(file, r"(\d+)_\w+_([A-Z]+)_\w+", "1001_DFA_ANG_XX")
        split = SPLITS.get(int(speaker) % 7, "train")
        all_rows.append(row_of(file, root, [emotion], split, speaker))
    return all_rows, EMOTIONS
