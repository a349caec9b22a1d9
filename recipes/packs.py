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
import collections
import csv
import hashlib
import json
import math
import os
import resource
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import recipes
from audio import FRONT_END, MIN_SAMPLES, SAMPLE_RATE, fbank, read_audio
from common import UserError, check, write_whole

RUN = 500  # recordings in a shard: what a killed packing does again
INDEX = np.dtype(
    [("shard", "i4"), ("offset", "i8"), ("samples", "i4"), ("row", "i4"), ("crc", "u4")]
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
    check(
        MIN_SAMPLES <= max_seconds * SAMPLE_RATE < 2**31,
        f"--max_seconds {max_seconds}: has to be at least 0.175, the length of one patch, and finite",
    )
    classes = class_list(rows, classes)

    def decode(row):
        return cut_recording(row, read, row.get("max_seconds", max_seconds))

    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    notes = []
    with tqdm(total=len(rows), desc=f"packing {out.name}", unit="file", disable=None) as bar:
        for first in range(0, len(rows), RUN):
            run = rows[first : first + RUN]
            notes += write_shard(partial, first // RUN, run, decode, max_seconds, workers, bar)

    skipped = [
        (row["path"], note["reason"]) for row, note in zip(rows, notes) if note["reason"]
    ]
    index, ends = index_of(notes)
    if not len(index):
        shutil.rmtree(partial)
        first = f"; {len(skipped)} files skipped, the first: {skipped[0][1]}" if skipped else ""
        raise UserError(f"{source}: no usable audio{first}")
    write_whole(partial / "index.npy", lambda file: np.save(file, index))
    write_table(partial / "skipped.csv", ["path", "reason"], skipped)
    table = [(row["path"], ";".join(row["labels"]), row["split"], row["group"]) for row in rows]
    write_table(partial / "clips.csv", ["path", "labels", "split", "group"], table)

    info = dict(
        version=2,
        id=hashlib.sha256(index.tobytes()).hexdigest()[:16],
        source=str(source),
        classes=classes,
        clips=len(index),
        hours=round(index["samples"].sum() / SAMPLE_RATE / 3600, 4),
        skipped=len(skipped),
        rests_dropped=sum(note["dropped"] for note in notes),
        shards=ends,
    )
    write_json(partial / "pack.json", info)
    info |= fbank_stats(Pack(partial))
    write_json(partial / "pack.json", info)
    os.replace(partial, out)
    tidy(out, len(ends))

    print(
        f"{out}: {len(index)} clips, {info['hours']:.2f} h, {len(classes)} classes, "
        f"fbank {info['fbank_mean']:.3f} +- {info['fbank_std']:.3f} over {info['fbank_clips']} clips"
    )
    if skipped:
        print(
            f"{len(skipped)} of {len(rows)} files skipped, listed in {out / 'skipped.csv'}, "
            f"the first: {skipped[0][1]}"
        )
    return Pack(out)


def in_order(function, items, workers):
    """Yield function(item) of all items, in order, made a few ahead by threads.

    Decoding, reading and copying run outside the interpreter's lock.
    """
    if not workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = collections.deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 3 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def class_list(rows, classes):
    """Return the class names: those given, or the labels that occur, sorted."""
    labels = {label for row in rows for label in row["labels"]}
    classes = sorted(labels) if classes is None else list(classes)
    unknown = sorted(labels.difference(classes))
    check(
        not unknown, f"{len(unknown)} labels are not in the class list, {unknown[:1]} the first"
    )
    bad = [name for name in classes if ";" in name]
    check(
        not bad,
        f"the class name {bad[:1]} holds a semicolon, which separates labels; rename it",
    )
    return classes


def cut_recording(row, read, max_seconds):
    """Decode a recording: its clips, int16, and a note of them, or of the reason why there are none."""
    try:
        check("problem" not in row, row.get("problem"))
        x = (read(row) * 32768).round().clip(-32768, 32767).astype("<i2")
        seconds = len(x) / SAMPLE_RATE
        short = f"{row['path']}: {seconds:.3f} s is shorter than one patch (0.175 s)"
        check(len(x) >= MIN_SAMPLES, short)
    except UserError as error:
        return [], dict(clips=[], dropped=0, reason=str(error))

    longest = int(max_seconds * SAMPLE_RATE)
    pieces = [x[start : start + longest] for start in range(0, len(x), longest)]
    clips = [piece for piece in pieces if len(piece) >= MIN_SAMPLES]
    marks = [(len(clip), zlib.crc32(clip)) for clip in clips]
    return clips, dict(clips=marks, dropped=len(pieces) - len(clips), reason="")


def write_shard(folder, number, rows, decode, max_seconds, workers, bar):
    """Write the audio of a run of recordings, and then the small file that vouches for it.

    That holds the notes, which are returned, and a stamp of what they were made of: of other rows,
    or of files that have changed since, the shard is made anew.
    """
    stamp = hashlib.sha256(repr((INDEX, max_seconds)).encode())
    for row in rows:
        stamp.update(repr((row, file_stamp(row))).encode())
    stamp = stamp.hexdigest()
    done = folder / f"shard-{number:05d}.json"
    if done.exists():
        shard = json.loads(done.read_text())
        if shard["stamp"] == stamp:
            bar.update(len(rows))
            return shard["notes"]
        done.unlink(missing_ok=True)

    notes = []

    def write(file):
        for clips, note in in_order(decode, rows, workers):
            file.writelines(clips)
            notes.append(note)
            bar.update()

    write_whole(folder / f"audio-{number:05d}.bin", write)
    write_json(done, dict(stamp=stamp, notes=notes))
    return notes


def write_json(path, content):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def file_stamp(row):
    """Return size and time of a row's file."""
    try:
        stat = os.stat(row["file"])
        return stat.st_size, stat.st_mtime_ns
    except (OSError, KeyError):
        return None


def tidy(folder, shards):
    """Leave the audio of so many shards, and nothing of this packing or an earlier one besides."""
    wanted = [f"audio-{number:05d}.bin" for number in range(shards)]
    for path in [*folder.glob("audio-*"), *folder.glob("shard-*"), *folder.glob("*.partial")]:
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def write_table(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def index_of(notes):
    """Return where each clip is, an array of INDEX, and the samples in each shard."""
    index, ends = [], []
    for row, note in enumerate(notes):
        if row % RUN == 0:
            ends.append(0)
        for samples, crc in note["clips"]:
            index.append((len(ends) - 1, ends[-1], samples, row, crc))
            ends[-1] += samples
    return np.array(index, INDEX), ends


def fbank_stats(pack, clips=2000):
    """Return mean and standard deviation of the filter bank of up to `clips` evenly spaced clips."""
    chosen = np.linspace(0, len(pack) - 1, min(clips, len(pack))).astype(int)
    count, total, squares = 0, 0.0, 0.0
    for i in tqdm(chosen, "fbank statistics", unit="clip", disable=None, leave=False):
        x = fbank(pack.wav(i)[None]).double()
        count += x.numel()
        total += x.sum().item()
        squares += x.square().sum().item()
    mean = total / count
    std = math.sqrt(max(0.0, squares / count - mean**2))
    return dict(fbank_mean=mean, fbank_std=std, fbank_clips=len(chosen), front_end=FRONT_END)


# -----------------------------------------------------------------------------
# reading


class Pack:
    """An opened pack. Audio and index stay on disk, shared by all processes, and are read when asked for."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.info = json.loads((self.path / "pack.json").read_text())
            self.index = np.load(self.path / "index.npy", mmap_mode="r").view(np.ndarray)
            again = f"remove {path} and make it again from {self.info['source']}"
            whole = self.info["version"] == 2 and len(self.index) == self.info["clips"]
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            raise UserError(
                f"{path} is not a pack, or a damaged one (no readable pack.json and index.npy); "
                "make it: python data.py folder DIR --out PACK"
            ) from None
        check(whole, f"{path}: made by another version, or its index has lost clips; {again}")
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
                f"{file}: {size} bytes instead of {2 * samples}; the pack is damaged, {again}",
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
        check(
            read == out.nbytes,
            f"{self.path}: shard {shard} has become shorter; make the pack again",
        )

    def audio(self, i):
        """Read clip i: (n,) int16."""
        out = np.empty(self.samples[i], "<i2")
        self.read_into(out, i)
        return out

    def wav(self, i):
        """Read clip i: (n,) float32 in [-1, 1]."""
        return torch.from_numpy(self.audio(i) / np.float32(32768))

    def rows(self):
        """Read clips.csv, a dict per recording."""
        with open(self.path / "clips.csv", newline="") as file:
            return list(csv.DictReader(file))

    def table(self):
        """Return per clip a list of class numbers, and split and group as arrays of str."""
        number = {name: i for i, name in enumerate(self.classes)}
        rows = self.rows()
        labels = [[number[name] for name in row["labels"].split(";") if name] for row in rows]
        split, group = (np.array([row[key] for row in rows]) for key in ("split", "group"))
        recording = self.index["row"]
        return [labels[i] for i in recording], split[recording], group[recording]

    def skipped(self):
        """Return (path, reason) of the files that were left out."""
        with open(self.path / "skipped.csv", newline="") as file:
            return [tuple(row) for row in csv.reader(file)][1:]

    def damaged(self):
        """Return the numbers of the clips whose audio is not what it was when packed."""
        clips = tqdm(
            range(len(self)),
            f"checking {self.path.name}",
            unit="clip",
            disable=None,
            leave=False,
        )
        return [i for i in clips if zlib.crc32(self.audio(i)) != self.index["crc"][i]]


def open_packs(spec):
    """Open "packs/a:0.4,packs/b:0.6".

    Returns the packs and their shares of the sampled seconds, summing to 1; None without weights.
    """
    parts = [
        part.rpartition(":") if ":" in part else (part, ":", "") for part in spec.split(",")
    ]
    packs = [Pack(path) for path, _, _ in parts]
    try:
        weights = np.array([weight for _, _, weight in parts if weight], float)
    except ValueError:
        raise UserError(
            f"--data {spec}: weights are numbers, as in packs/a:0.4,packs/b:0.6"
        ) from None
    if not len(weights):
        return packs, None
    positive = (weights > 0) & np.isfinite(weights)
    check(
        len(weights) == len(packs) and positive.all(),
        f"--data {spec}: give every pack a positive weight, or none",
    )
    return packs, weights / weights.sum()


# -----------------------------------------------------------------------------
# who trains and who tests


def hold_out(recording, share=0.05, most=400, seed=0):
    """Return which clips are held out, a mask: those of a twentieth of the recordings, not of the only one.

    recording: (clips,) number of the recording that each clip is of.
    """
    recordings = np.unique(recording)
    count = min(most, math.ceil(share * len(recordings)), len(recordings) - 1)
    return np.isin(recording, np.random.default_rng(seed).permutation(recordings)[:count])


def splits_of(pack, test_split="", fold="", valid_share=0.0):
    """Return {fold: (train, valid, test) clip numbers}.

    The only fold of a pack without folds is called "". valid may be empty.
    """
    check(
        pack.classes,
        f"{pack.path} has no labels; pack it with a label column (python data.py csv --help)",
    )
    _, split, _ = pack.table()
    names = set(split)
    folds = sorted(names, key=int) if all(name.isdigit() for name in names) else []
    splits = {}
    if len(folds) > 1:
        wanted = fold.split(",") if fold else folds
        check(
            names.issuperset(wanted),
            f"{pack.path} has the folds {', '.join(folds)}, not {fold}",
        )
        for k in wanted:
            splits[k] = split != k, split == "", split == k
    else:
        test = test_split or first_of(["test", "eval"], names)
        valid = first_of(["valid", "val", "validation", "dev"], names - {test})
        check(
            {"train", test} <= names,
            f"{pack.path} has the splits {', '.join(sorted(names)) or '(none)'}; "
            "training needs train and test, or folds 1, 2, ...",
        )
        splits[""] = split == "train", split == valid, split == test

    for k, masks in splits.items():
        train, valid, test = map(np.flatnonzero, masks)
        if valid_share and not len(valid):  # whole recordings, the same for every seed
            held = hold_out(pack.index["row"][train], valid_share, most=len(train))
            train, valid = train[~held], train[held]
        splits[k] = train, valid, test
    return splits


def first_of(options, names):
    return next((name for name in options if name in names), None)


def targets_of(pack):
    """Return the labels as a table, (clips, classes) bool."""
    targets = torch.zeros(len(pack), len(pack.classes), dtype=torch.bool)
    for row, labels in zip(targets, pack.table()[0]):
        row[labels] = True
    return targets


# -----------------------------------------------------------------------------
# command line


def pack(args):
    """Make a pack by a recipe."""
    rows, classes = args.recipe.rows(args)
    read = getattr(args.recipe, "read", read_row)
    write_pack(args.out, rows, read, classes, args.source, args.max_seconds, args.workers)


def show_stats(args):
    """Print what is in a pack."""

    def counts(values):
        names, numbers = np.unique(values, return_counts=True)
        return (
            ", ".join(f"{name or '(none)'} {count}" for name, count in zip(names, numbers))
            or "(none)"
        )

    opened = Pack(args.pack)
    info, seconds = opened.info, opened.samples / SAMPLE_RATE
    labels, split, group = opened.table()
    classes = [opened.classes[number] for row in labels for number in row]
    print(
        f"{args.pack}: {len(opened)} clips of {seconds.min():.2f} to {seconds.max():.2f} s, "
        f"{info['hours']:.2f} h from {info['source']}\n"
        f"fbank mean {info['fbank_mean']:.5f} std {info['fbank_std']:.5f} over {info['fbank_clips']} "
        f"evenly spaced clips\n"
        f"splits: {counts(split)}\n"
        f"{len(np.unique(group))} groups\n"
        f"classes: {counts(classes)}\n"
        f"{info['skipped']} files skipped, {info['rests_dropped']} rests of under 0.175 s left out "
        "when cutting long files"
    )
    for _, reason in opened.skipped():
        print("  " + reason)


def check_pack(args):
    damaged = Pack(args.pack).damaged()
    check(
        not damaged,
        f"{args.pack}: {len(damaged)} clips are not what was packed, number {damaged[:1]} the first; "
        "remove it and make it again",
    )
    print(f"{args.pack}: every clip is as it was packed")


def main(doc, argv=None):
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, run):
        added = commands.add_parser(name, help=text.splitlines()[0], description=text)
        added.set_defaults(run=run)
        return added

    for name, recipe in recipes.commands().items():
        flags = command(name, recipe.__doc__, pack)
        flags.set_defaults(recipe=recipe)
        recipe.add_flags(flags)
        flags.add_argument("--out", required=True, help="the pack to make")
        flags.add_argument(
            "--max_seconds",
            "--max-seconds",
            type=float,
            default=10.0,
            help="longer recordings are cut into clips of this length [10]",
        )
        flags.add_argument(
            "--workers",
            type=int,
            default=os.cpu_count(),
            help="threads that decode [one per core]",
        )
    command("stats", "What is in a pack.", show_stats).add_argument("pack")
    command("check", "A pack's audio against its checksums.", check_pack).add_argument("pack")

    args = parser.parse_args(argv)
    args.run(args)
