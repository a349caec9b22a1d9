"""
Packs: how sounds are kept for training, a folder of int16, 16 kHz, mono samples. Commands: data.py.

    audio-00000.bin ...     the clips of RUN recordings each, end to end
    index.npy               where each clip is, of which recording, and its checksum
    clips.csv, skipped.csv  path, labels, split and group of every recording; reasons
    pack.json               classes, hours, statistics of the filter bank

A shard is a run of recordings and is whole or absent: first its audio appears, then a small file that
vouches for it. So a packing that was stopped or killed goes on where it was, in the folder PACK.partial,
which gets its name when all is there.
"""

import argparse
import csv
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import recipes
from audio import FRONT_END, MIN_SAMPLES, SAMPLE_RATE, fbank, read_audio
from common import UserError, check, write_whole

RUN = 500  # recordings in a shard: what a killed packing does again
INDEX = np.dtype(
    [
        ("shard", "i4"),
        ("offset", "i8"),
        ("samples", "i4"),
        ("row", "i4"),
        ("crc", "u4")
    ]
)

# -----------------------------------------------------------------------------
# writing


def read_row(row):
    """Read the audio of a recording: (n,) float32 at 16 kHz."""
    return read_audio(row["file"], row["start"], row["end"])


def write_pack(
    out, rows, read=read_row, classes=None, source="", max_seconds=10.0, workers=None
):
    """Write a pack. rows: one dict a recording (see recipes/); read(row) -> (n,) float32 at 16 kHz.

    Recordings longer than max_seconds (or the row's own) are cut into clips. One whose read raises
    UserError, or that is shorter than a patch row (0.175 s), is left out and listed with its reason.
    """
    out = Path(out)
    check(not out.exists(), f"{out} exists; remove it or choose another --out")
    check(0.175 <= max_seconds < 1e5, f"--max_seconds {max_seconds}: 0.175 (a patch) to 1e5")
    classes = class_list(rows, classes)

    folder = out.with_name(f"{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    index, notes, sizes = [], [], []
    with tqdm(total=len(rows), desc=f"packing {out.name}", unit="file", disable=None) as bar:
        for first in range(0, len(rows), RUN):
            run = rows[first : first + RUN]
            shard = write_shard(folder, first // RUN, run, read, max_seconds, workers, bar)
            index += map(tuple, shard["index"])
            notes += shard["notes"]
            sizes.append(shard["samples"])

    skipped = [(row["path"], note) for row, note in zip(rows, notes) if note]
    if not index:
        shutil.rmtree(folder)
        raise UserError(
            f"{source}: no usable audio in {len(rows)} files, {notes[:1]} the first"
        )
    write_table(folder / "skipped.csv", ["path", "reason"], skipped)
    table = [
        (row["path"], ";".join(row["labels"]), row["split"], row["group"])
        for row in rows
    ]
    write_table(folder / "clips.csv", ["path", "labels", "split", "group"], table)

    index = np.array(index, INDEX)
    write_whole(folder / "index.npy", lambda file: np.save(file, index))
    info = dict(
        version=2,
        id=hashlib.sha256(index.tobytes()).hexdigest()[:16],
        source=str(source),
        classes=classes,
        clips=len(index),
        hours=round(index["samples"].sum() / SAMPLE_RATE / 3600, 4),
        shards=sizes
    )
    write_json(folder / "pack.json", info)
    info |= fbank_stats(Pack(folder))
    write_json(folder / "pack.json", info)
    os.replace(folder, out)

    # what vouched for the shards, and what was left by packings that were killed, or were larger
    wanted = [f"audio-{number:05d}.bin" for number in range(len(sizes))]
    for path in [*out.glob("[as]*-*"), *out.glob("*.partial")]:
        if path.name not in wanted:
            path.unlink(missing_ok=True)

    pack = Pack(out)
    describe(pack)
    return pack


def in_order(function, items, workers):
    """Yield function(item) of all items, in order, made a few ahead by threads.

    Decoding, reading and copying run outside the interpreter's lock.
    """
    if not workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = []
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 3 * workers:
                    yield ahead.pop(0).result()
            while ahead:
                yield ahead.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)


def exclude(rows, path):
    """Mark the rows that a list names, a line each: path, file name or stem. They are left out and listed."""
    try:
        names = set(map(str.strip, Path(path).read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--exclude {path}: cannot be read ({error})") from None
    names.discard("")
    unseen = set(names)
    for row in rows:
        file = Path(row["path"])
        hits = names & {row["path"], file.name, file.stem}
        if hits:
            row["excluded"] = f"{row['path']}: excluded by {path}"
            unseen -= hits
    count = sum("excluded" in row for row in rows)
    print(f"{path}: leaves out {count} recordings; {len(unseen)} of its {len(names)} names are not there")


def class_list(rows, classes):
    """Return the class names: those given, or the labels that occur, sorted."""
    labels = {label for row in rows for label in row["labels"]}
    classes = sorted(labels) if classes is None else list(classes)
    unknown = labels.difference(classes)
    check(not unknown, f"labels that are not in the class list: {sorted(unknown)[:9]}")
    check(";" not in "".join(classes), "a class name has a semicolon, which separates labels")
    return classes


def cut_recording(read, max_seconds, row):
    """Decode a recording. Returns [(clip, its checksum), ...], int16, and why there are none, or ""."""
    if "excluded" in row:
        return [], row["excluded"]
    try:
        x = (read(row) * 32768).round().clip(-32768, 32767).astype("<i2")
        check(
            len(x) >= MIN_SAMPLES,
            f"{row['path']}: {len(x) / SAMPLE_RATE:.3f} s is shorter than one patch (0.175 s)"
        )
    except UserError as error:
        return [], str(error)

    # the rest of a long one, if it is shorter than a patch, is dropped
    longest = int(row.get("max_seconds", max_seconds) * SAMPLE_RATE)
    starts = range(0, len(x) - MIN_SAMPLES + 1, longest)
    clips = [x[start : start + longest] for start in starts]
    return [(clip, zlib.crc32(clip)) for clip in clips], ""


def write_shard(folder, number, rows, read, max_seconds, workers, bar):
    """Write the audio of a run of recordings, and then the small file that vouches for it.

    Its content is returned: the index of the clips, how many samples they have, a note per recording, why
    it was left out, and a stamp of what it was made of: of other rows, or of files that have changed since,
    the shard is made anew.
    """
    origin = repr([INDEX, max_seconds, rows, *map(file_stamp, rows)])
    stamp = hashlib.sha256(origin.encode()).hexdigest()
    done = folder / f"shard-{number:05d}.json"
    if done.exists():
        shard = json.loads(done.read_text())
        if shard["stamp"] == stamp:
            bar.update(len(rows))
            return shard
        done.unlink(missing_ok=True)

    shard = dict(stamp=stamp, samples=0, index=[], notes=[])

    def write(file):
        decoded = in_order(partial(cut_recording, read, max_seconds), rows, workers)
        for row, (clips, note) in enumerate(decoded, start=number * RUN):
            for clip, crc in clips:
                shard["index"].append((number, shard["samples"], len(clip), row, crc))
                shard["samples"] += len(clip)
                file.write(clip)
            shard["notes"].append(note)
            bar.update()

    write_whole(folder / f"audio-{number:05d}.bin", write)
    write_json(done, shard)
    return shard


def write_json(path, content):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def file_stamp(row):
    """Return size and time of a row's file."""
    try:
        stat = os.stat(row["file"])
        return stat.st_size, stat.st_mtime_ns
    except (OSError, KeyError):
        return None


def write_table(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def fbank_stats(pack, clips=2000):
    """Return mean and standard deviation of the filter bank of up to `clips` evenly spaced clips.

    Clips of a test split are looked at only if there are no others.
    """
    heard = may_train(pack.table[1])[pack.index["row"]]
    among = np.flatnonzero(heard if heard.any() else ~heard)
    chosen = among[np.linspace(0, len(among) - 1, min(clips, len(among))).astype(int)]
    count, total, squares = 0, 0.0, 0.0
    for i in tqdm(chosen, "fbank statistics", unit="clip", disable=None, leave=False):
        x = fbank(pack.wav(i)[None]).double().numpy()
        count += x.size
        total += x.sum()
        squares += (x**2).sum()
    mean = total / count
    std = math.sqrt(abs(squares / count - mean**2))
    return dict(fbank_mean=mean, fbank_std=std, front_end=FRONT_END)


# -----------------------------------------------------------------------------
# reading


class Pack:
    """An opened pack. Audio and index stay on disk, shared by all processes, and are read when asked for."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.info = json.loads((self.path / "pack.json").read_text())
            self.index = np.load(self.path / "index.npy", mmap_mode="r").view(np.ndarray)
            whole = self.info["version"] == 2 and len(self.index) == self.info["clips"]
        except (OSError, ValueError, KeyError, EOFError):
            whole = False
        check(
            whole,
            f"{path} is not a pack, or a damaged one or one of another version; "
            "make it: python data.py --help"
        )
        self.classes = self.info["classes"]
        self.samples = self.index["samples"].copy()

        # read by position, not mapped, so that resident memory stays flat; a file is open per shard
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.shards = []
        for number, samples in enumerate(self.info["shards"]):
            file = self.path / f"audio-{number:05d}.bin"
            size = file.stat().st_size if file.exists() else 0
            check(
                size == 2 * samples,
                f"{file}: {size} bytes instead of {2 * samples}; the pack is damaged, make it again"
            )
            self.shards.append(open(file, "rb", buffering=0))

        # the statistics of another front end say nothing about this one
        if self.info.get("front_end", [16000, 400, 160, 128]) != FRONT_END:
            self.info |= fbank_stats(self)

    def __len__(self):
        return len(self.index)

    def read_into(self, out, i, start=0):
        """Fill `out`, contiguous int16, with clip i from sample `start` on. Threads may do so at once."""
        shard, offset, *_ = self.index[i].item()
        read = os.preadv(self.shards[shard].fileno(), [out], 2 * (offset + start))
        check(read == out.nbytes, f"{self.path}: shard {shard} is shorter than it was")

    def audio(self, i):
        """Read clip i: (n,) int16."""
        out = np.empty(self.samples[i], "<i2")
        self.read_into(out, i)
        return out

    def wav(self, i):
        """Read clip i: (n,) float32 in [-1, 1]."""
        return torch.from_numpy(self.audio(i) / np.float32(32768))

    def rows(self, name="clips.csv"):
        """Read a table, a dict per recording."""
        with open(self.path / name, newline="") as file:
            return list(csv.DictReader(file))

    def skipped(self):
        """Return (path, reason) of the recordings that were left out."""
        return [tuple(row.values()) for row in self.rows("skipped.csv")]

    @functools.cached_property
    def table(self):
        """The Labels of all recordings, and their splits, an array of str."""
        number = {name: i for i, name in enumerate(self.classes)}
        numbers, counts, splits, same = [], [], [], {}
        with open(self.path / "clips.csv", newline="") as file:
            lines = csv.reader(file)
            next(lines)
            for _, labels, split, _ in lines:
                some = [number[name] for name in labels.split(";") if name]
                numbers += some
                counts.append(len(some))
                splits.append(same.setdefault(split, split))  # two million, but few of them differ
        return Labels(numbers, counts, len(self.classes)), np.array(splits)


class Labels:
    """The labels of recordings as one list of numbers: 40 MB for AudioSet, where a table has 1 GB.

    Asked for recordings, an array of n numbers, it gives their table, (n, classes) bool.
    """

    def __init__(self, numbers, counts, classes):
        self.numbers, self.counts = np.array(numbers, np.int32), np.array(counts, np.int32)
        self.first, self.classes = np.cumsum(self.counts) - self.counts, classes

    def __len__(self):
        return len(self.counts)

    def pairs(self, recordings):
        """Return all labels of recordings: the position in `recordings` and the class of each."""
        counts = self.counts[recordings]
        position = np.repeat(np.arange(len(counts)), counts)
        behind = np.arange(len(position)) - (np.cumsum(counts) - counts)[position]
        return position, self.numbers[self.first[recordings][position] + behind]

    def __getitem__(self, recordings):
        table = torch.zeros(len(recordings), self.classes, dtype=torch.bool)
        table[self.pairs(recordings)] = True
        return table


def open_packs(spec):
    """Open "packs/a:0.4,packs/b:0.6".

    Returns the packs and their shares of the sampled seconds, summing to 1; None without weights.
    """
    parts = [part.partition(":") for part in spec.split(",")]
    packs = [Pack(path) for path, _, _ in parts]
    weights = [weight for _, _, weight in parts if weight]
    if not weights:
        return packs, None
    wrong = f"--data {spec}: give every pack a positive weight, as in packs/a:0.4,packs/b:0.6, or none"
    try:
        weights = np.array(weights, float)
    except ValueError:
        raise UserError(wrong) from None
    check(
        len(weights) == len(packs) and 0 < weights.min() and weights.max() < np.inf,
        wrong
    )
    return packs, weights / weights.sum()


# -----------------------------------------------------------------------------
# who trains and who tests


FOR_TESTING = "test", "testing", "eval", "evaluation", "valid", "val", "validation", "dev"


def may_train(split, splits="", leave_out=""):
    """Return which recordings pre-training may hear, a mask: all but those to test or choose by.

    split: array of str; splits: hear these instead, and recordings of no split; "all" = every one;
    leave_out: and never these. Both as in "1,2".
    """
    heard = ~np.isin(np.char.lower(split), FOR_TESTING)
    if splits:
        heard = np.isin(split, ["", *splits.split(",")]) | (splits == "all")
    return heard & ~np.isin(split, list(filter(None, leave_out.split(","))))


def hold_out(recording, samples, share=0.05, seconds=math.inf, seed=0):
    """Return which clips are held out, a mask: those of a share of the recordings, not of the only one.

    recording, samples: (clips,) the recording that each clip is of, and its length. As soon as so many
    seconds are held out no other recording is.
    """
    recordings, number = np.unique(recording, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(recordings))
    samples = np.bincount(number, samples)[order]
    before = samples.cumsum() - samples
    count = min(math.ceil(share * len(order)), len(order) - 1)
    held = order[:count][before[:count] < seconds * SAMPLE_RATE]
    return np.isin(number, held)


def splits_of(pack, test_split="", fold="", valid_share=0.0):
    """Return {fold: (train, valid, test) numbers of recordings}, ascending.

    The only fold of a pack without folds is called "". valid may be empty; valid_share of the training
    recordings takes its place, the same ones for every seed.
    """
    check(
        pack.classes, f"{pack.path} has no labels (python data.py csv --help: --label_column)"
    )
    recordings = np.unique(pack.index["row"])  # without those that were skipped
    split = pack.table[1][recordings]
    names = sorted(set(split))
    masks = {}
    if len(names) > 1 and all(name.isdigit() for name in names):
        wanted = fold.split(",") if fold else sorted(names, key=int)
        check(
            set(wanted) <= set(names),
            f"{pack.path} has the folds {', '.join(names)}, not {fold}"
        )
        for k in wanted:
            masks[k] = split != k, split == "", split == k
    else:
        train = split == "train"
        test = split == (test_split or ("test" if "test" in names else "eval"))
        valid = np.isin(split, ["valid", "val", "validation", "dev"]) & ~test
        check(
            train.any() and test.any(),
            f"{pack.path} has the splits {names}; training needs train and test, or folds 1, 2, ..."
        )
        masks[""] = train, valid, test

    splits = {}
    for k in masks:
        train, valid, test = (recordings[mask] for mask in masks[k])
        if valid_share and not len(valid):
            held = hold_out(train, np.ones(len(train)), valid_share)
            train, valid = train[~held], train[held]
        splits[k] = train, valid, test
    return splits


# -----------------------------------------------------------------------------
# command line


def pack(recipe, args):
    """Make a pack by a recipe."""
    rows, classes = recipe.rows(args)
    if args.exclude:
        exclude(rows, args.exclude)
    read = getattr(recipe, "read", read_row)
    write_pack(args.out, rows, read, classes, args.source, args.max_seconds, args.workers)


def describe(pack):
    """Print what is in a pack."""

    def counts(values):
        names, numbers = np.unique(values, return_counts=True)
        return ", ".join(f"{name or '(none)'} {count}" for name, count in zip(names, numbers))

    info, seconds = pack.info, pack.samples / SAMPLE_RATE
    labels, split = pack.table
    recording = pack.index["row"]
    classes = np.array(pack.classes)[labels.pairs(recording)[1]]
    groups = {row["group"] for row in pack.rows()}
    skipped = pack.skipped()
    print(
        f"{pack.path}: {len(pack)} clips of {seconds.min():.2f} to {seconds.max():.2f} s, "
        f"{info['hours']:.2f} h from {info['source']}\n"
        f"fbank mean {info['fbank_mean']:.5f} std {info['fbank_std']:.5f}\n"
        f"splits: {counts(split[recording])}\n"
        f"{len(groups)} groups\n"
        f"classes: {counts(classes) or '(none)'}\n"
        f"{len(skipped)} of {len(labels)} files skipped, listed in {pack.path / 'skipped.csv'}"
    )
    for _, reason in skipped[:10]:
        print("  " + reason)


def show_stats(args):
    describe(Pack(args.pack))


def check_pack(args):
    """Raise UserError unless the audio of every clip is what it was when packed."""
    pack = Pack(args.pack)
    clips = tqdm(range(len(pack)), "checking", disable=None)
    damaged = [i for i in clips if zlib.crc32(pack.audio(i)) != pack.index["crc"][i]]
    check(
        not damaged,
        f"{args.pack}: {len(damaged)} clips are not what was packed, number {damaged[:1]} the first; "
        "remove it and make it again"
    )
    print(f"{args.pack}: every clip is as it was packed")


def main(doc, argv=None):
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, run):
        added = commands.add_parser(name, help=text.splitlines()[0], description=text)
        added.set_defaults(run=run)
        return added

    for name, recipe in recipes.commands().items():
        flags = command(name, recipe.__doc__, partial(pack, recipe))
        recipe.add_flags(flags)
        flags.add_argument("--out", required=True, help="the pack to make")
        flags.add_argument(
            "--exclude",
            help="list of recordings to leave out, a line each: path in the pack, file name or stem"
        )
        flags.add_argument(
            "--max_seconds",
            "--max-seconds",
            type=float,
            default=10.0,
            help="longer recordings are cut into clips of this length [10]"
        )
        flags.add_argument(
            "--workers",
            type=int,
            default=os.cpu_count(),
            help="threads that decode [one per core]"
        )
    command("stats", "What is in a pack.", show_stats).add_argument("pack")
    command("check", "A pack's audio against its checksums.", check_pack).add_argument("pack")

    args = parser.parse_args(argv)
    args.run(args)
