"""Speech Commands: 35 words, or SUPERB's 12 classes.

Warden 2018. Version 2 (KS2) has 35 words, split by the lists in the archive. Version 1 (KS1) has ten words,
_unknown_, and _silence_, which is the noise files in pieces of 1 s, in train and valid alike; its test split
is an archive of its own.
"""

import hashlib
from pathlib import Path

from common import check
from recipes.tables import row_of

KS1 = "yes no up down left right on off stop go _unknown_ _silence_".split()


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked")
    parser.add_argument(
        "--version",
        type=int,
        default=2,
        choices=(1, 2),
        help="1 = SUPERB's 12 classes of v0.01, 2 = 35 words of v0.02 [2]",
    )
    parser.add_argument(
        "--test_root",
        "--test-root",
        type=Path,
        help="folder of speech_commands_test_set_v0.01, for version 1",
    )


def recordings(folder):
    """Return [(file, speaker), ...] of the wav files in a folder, sorted."""
    files = sorted(folder.glob("[!.]*.wav"))
    check(files, f"{folder}: no wav files; is this archive whole?")
    return [(file, file.name.split("_nohash_")[0]) for file in files]


def rows(args):
    root = Path(args.source)
    words = sorted(folder.name for folder in root.glob("[!._]*") if folder.is_dir())
    if args.version == 2:
        return list(ks2(root, words)), words
    return list(ks1(root, words, args.test_root)), KS1


def ks2(root, words):
    split_of = {}
    for split, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        listing = root / name
        check(
            listing.exists(),
            f"{listing}: no such file; it comes with the archive of version 0.02",
        )
        split_of |= dict.fromkeys(listing.read_text().split(), split)

    for word in words:
        for file, speaker in recordings(root / word):
            split = split_of.pop(f"{word}/{file.name}", "train")
            yield row_of(file, root, [word], split, speaker)

    for name, split in split_of.items():
        problem = f"{root / name}: listed for {split}, and not there"
        yield row_of(root / name, root, [], split, problem=problem)


def ks1(root, words, test_root):
    check(
        test_root and test_root.is_dir(),
        f"--test_root {test_root}: version 1 is tested on an archive of its own, "
        "speech_commands_test_set_v0.01; name its folder",
    )

    for word in words:
        label = word if word in KS1 else "_unknown_"
        for file, speaker in recordings(root / word):
            # the formula of the data set's authors; their test speakers, 10 to 20 %, go to nobody
            digest = int(hashlib.sha1(speaker.encode()).hexdigest(), 16)
            percent = digest % 2**27 * 100 / (2**27 - 1)
            split = "valid" if percent < 10 else "train"
            if not 10 <= percent < 20:
                yield row_of(file, root, [label], split, speaker)

    for split in ("train", "valid"):
        for file, _ in recordings(root / "_background_noise_"):
            yield row_of(file, root, ["_silence_"], split, file.stem, max_seconds=1.0)

    for label in KS1:
        for file, speaker in recordings(test_root / label):
            yield row_of(file, test_root.parent, [label], "test", speaker)
