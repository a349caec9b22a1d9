"""Speech Commands: 35 words, SUPERB's 12 classes, or X-ARES's 30 words.

Warden 2018. Version 2 (KS2) has 35 words, split by the lists in the archive. Version 1 (KS1) has ten words,
_unknown_, and _silence_, which is the noise files in pieces of 1 s, in train and valid alike; its test split
is an archive of its own. With --words 30, as in X-ARES, it is treated as version 2 is.
"""

import hashlib
from pathlib import Path

from common import check
from recipes.tables import read_text, recordings, row_of

KS1 = "yes no up down left right on off stop go _unknown_ _silence_".split()


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked")
    parser.add_argument(
        "--version",
        type=int,
        default=2,
        choices=(1, 2),
        help="1 = SUPERB's 12 classes of v0.01, 2 = 35 words of v0.02 [2]"
    )
    parser.add_argument(
        "--words",
        type=int,
        default=12,
        choices=(12, 30),
        help="of version 1: SUPERB's 12 classes, or the 30 words that it has [12]"
    )
    parser.add_argument(
        "--test_root",
        "--test-root",
        type=Path,
        help="folder of speech_commands_test_set_v0.01, for version 1"
    )


def speaker_of(file):
    return file.stem.split("_nohash_")[0]


def rows(args):
    root = Path(args.source)
    files = recordings(root, "[!._]*/*.wav")
    if args.version == 2 or args.words == 30:
        return list(ks2(root, files)), None
    return list(ks1(root, files, args.test_root)), KS1


def ks2(root, files):
    split_of = dict.fromkeys(files, "train")
    for split, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        listing = root / name
        check(listing.exists(), f"{listing}: no such file; the archive has one")
        for line in read_text(listing).split():
            split_of[root / line] = split  # one that is not there will be listed as skipped

    for file, split in split_of.items():
        yield row_of(file, root, [file.parent.name], split, speaker_of(file))


def ks1(root, files, test_root):
    check(
        test_root, "--version 1 needs a --test_root, for it is tested on an archive of its own"
    )
    for file in files:
        word, speaker = file.parent.name, speaker_of(file)
        label = word if word in KS1 else "_unknown_"
        # the formula of the data set's authors; their test speakers, 10 to 20 %, go to nobody
        digest = int(hashlib.sha1(speaker.encode()).hexdigest(), 16)
        percent = digest % 2**27 * 100 / (2**27 - 1)
        split = "valid" if percent < 10 else "train"
        if not 10 <= percent < 20:
            yield row_of(file, root, [label], split, speaker)

    for split in ("train", "valid"):
        for file in recordings(root / "_background_noise_"):
            yield row_of(file, root, ["_silence_"], split, file.stem, max_seconds=1.0)

    for label in KS1:
        for file in recordings(test_root / label):
            yield row_of(file, test_root.parent, [label], "test", speaker_of(file))
