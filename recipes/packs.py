"""
Packs: how sounds are kept for training, a folder of int16, 16 kHz, mono samples. Commands: data.py.

    audio-00000.bin ...     the clips of RUN recordings each, end to end
    index.npy               where each clip is, of which recording, its checksum, and its gain:
                            int16 * gain is the sound, so that no level is too high or too low
    clips.csv, skipped.csv  path, labels, split and group of every recording; who was left out, and why
    notes.csv               what packing did to a recording: path, kind, detail
    pack.json               classes, hours, statistics of the filter bank

A shard is a run of recordings and is whole or absent: first its audio appears, then a small file that
vouches for it. So a packing that was stopped or killed goes on where it was, in the folder PACK.partial,
which gets its name when all is there.
"""

import argparse
import csv
import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import threading
import weakref
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import recipes
from audio import FRONT_END, LOG_FLOOR, MIN_SAMPLES, SAMPLE_RATE, decode, fbank, printable
from common import Lock, UserError, check, write_whole
from recipes.tables import read_text

RUN = 500  # recordings in a shard: what a killed packing does again
INDEX = np.dtype(
    [
        ("shard", "i4"),
        ("offset", "i8"),
        ("samples", "i4"),
        ("row", "i4"),
        ("crc", "u4"),
        ("gain", "f4")
    ]
)
FULL_SCALE = 2.0**-15   # the gain of sounds between 1 / 256 and 1
LOUDEST = 2.0**32       # what is louder overflows in the filter bank, and is no sound

# what the summary of a packing adds to a kind of note
MORE = {
    "cancelled": "(the loudest channel is kept)",
    "scaled": "(above 1 or below 1/256: a gain keeps the level)",
    "end beyond the file": "(times in another file? see csv --no_times)",
    "cut": "into clips of at most {:g} s",
    "without a label": "though others have one"
}

# -----------------------------------------------------------------------------
# writing


def read_row(row):
    """Read the audio of a recording: (n,) float32 at 16 kHz, and notes of what was done to it, see decode."""
    x, notes = decode(row["file"], row["start"], row["end"])
    seconds, size = len(x) / SAMPLE_RATE, os.path.getsize(row["file"])
    check(
        seconds < 60 + size / 4,
        f"{printable(row['file'])}: {seconds:.0f} s of sound in {size} bytes: its header cannot be right"
    )
    return x, notes


def write_pack(
    out, rows, read=read_row, classes=None, source="", max_seconds=10.0, workers=None
):
    """Write a pack. rows: one dict a recording (see recipes/).

    read(row) -> (n,) float32 at 16 kHz, alone or with a list of (kind, detail), notes of what was done to it.
    Recordings longer than max_seconds (or the row's own) are cut into clips. One whose read raises any
    exception, or that is shorter than a patch row (0.175 s), is left out and listed with its reason.
    """
    out = Path(out)
    check(0.175 <= max_seconds <= 60000, f"--max_seconds {max_seconds}: 0.175 (a patch) to 60000")
    check(0 <= (workers or 0) <= 1000, f"--workers {workers}: 0 to 1000 threads")
    check(rows, f"{source}: no recordings to pack")
    classes = class_list(rows, classes)

    check(out.name, "--out: has to name a folder to make")
    check(not os.path.lexists(out), f"{out} exists; remove it or choose another --out")
    folder = out.with_name(f"{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / "pack")
    index, notes, sizes = [], [], []
    with tqdm(total=len(rows), desc=f"packing {out.name}", unit="file", disable=None) as bar:
        for first in range(0, len(rows), RUN):
            run = rows[first : first + RUN]
            shard = write_shard(folder, first // RUN, run, read, max_seconds, workers, bar)
            index += map(tuple, shard["index"])
            notes += map(tuple, shard["notes"])
            sizes.append(shard["samples"])

    skipped = [(path, reason) for path, kind, reason in notes if kind == "left out"]
    if not index:
        shutil.rmtree(folder)
        raise UserError(
            f"{source}: no usable audio in {len(rows)} files, {skipped[0][1]} the first"
        )
    if any(row["labels"] for row in rows):
        notes += [(row["path"], "without a label", "") for row in rows if not row["labels"]]
    table = [
        (row["path"], ";".join(row["labels"]), row["split"], row["group"])
        for row in rows
    ]
    write_table(folder / "clips.csv", CLIPS, table)
    write_table(folder / "skipped.csv", SKIPPED, skipped)
    write_table(folder / "notes.csv", NOTES, notes)

    index = np.array(index, INDEX)
    write_whole(folder / "index.npy", lambda file: np.save(file, index))
    info = dict(
        version=2,
        id=id_of(index),
        source=printable(str(source)),
        classes=classes,
        clips=len(index),
        recordings=len(rows),
        hours=round(index["samples"].sum() / SAMPLE_RATE / 3600, 4),
        shards=sizes,
        front_end=None
    )
    # written without statistics first: opened as of no known front end, a Pack measures them itself
    write_json(folder / "pack.json", info)
    write_json(folder / "pack.json", Pack(folder).info)
    os.replace(folder, out)

    # what vouched for the shards, and what was left by packings that were killed, or were larger
    wanted = [f"audio-{number:05d}.bin" for number in range(len(sizes))]
    for path in [*out.glob("[as]*-*"), *out.glob("*.partial"), *out.glob(".*.lock")]:
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    del lock

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
    names = set(map(str.strip, read_text(path).splitlines()))
    names.discard("")
    unseen = set(names)
    for row in rows:
        file = Path(row["path"])
        hits = names.intersection(map(str.strip, (row["path"], file.name, file.stem)))
        if hits:
            row["excluded"] = f"{row['path']}: excluded by {path}"
            unseen -= hits
    count = sum("excluded" in row for row in rows)
    print(f"{path}: leaves out {count} recordings; {len(unseen)} of its {len(names)} names are not there")


def class_list(rows, classes):
    """Return the class names: those given, or the labels that occur, sorted."""
    labels = {label for row in rows for label in row["labels"]}
    classes = sorted(labels) if classes is None else list(classes)
    unknown = sorted(labels.difference(classes))
    if unknown:
        [nearest] = difflib.get_close_matches(unknown[0], classes, 1, cutoff=0) or ["none"]
        raise UserError(
            f"labels that are not in the class list: {unknown[:9]}; "
            f"the nearest to {unknown[0]!r} is {nearest!r}"
        )
    check(all(classes), "a class has no name: a label is there, but empty")
    check(";" not in "".join(classes), "a class name has a semicolon, which separates labels")
    check(len(set(classes)) == len(classes), "a class name stands in the class list twice")
    odd = [name for name in classes if name.lower() in ("nan", "none", "null", "n/a", "<na>")]
    if odd:
        print(f"a class is named {odd[0]}; where that means no label, leave its cells empty")
    for one, other in itertools.pairwise(sorted(classes, key=str.lower)):
        if one.lower() == other.lower():
            print(f"{one} and {other} are two classes, for they are written in two ways")
    return classes


def gain_for(peak):
    """Return the power of two that samples are divided by, to be int16 without loss of level.

    It is 1 / 32768 for a peak between 1 / 256 and 1; else what holds a louder sound without clipping it,
    and gives a quieter one, as there are in 24 bits, all of the 16.
    """
    if not peak or 1 / 256 <= peak <= 1:
        return FULL_SCALE
    _, exponent = math.frexp(peak)
    return FULL_SCALE * 2.0 ** max(exponent, -110)


def cut_recording(read, max_seconds, row):
    """Decode a recording.

    Returns [(clip, its checksum, gain), ...], int16, and notes, a list of (kind, detail): where there are no
    clips, of kind "left out" with the reason.
    """
    path = row["path"]
    if "excluded" in row:
        return [], [("left out", row["excluded"])]
    try:
        x = read(row)
        notes = []
        if isinstance(x, tuple):
            x, notes = x
        seconds = len(x) / SAMPLE_RATE
        check(
            len(x) >= MIN_SAMPLES,
            f"{path}: {seconds:.3f} s is shorter than one patch (0.175 s)"
        )
        peak = max(float(x.max()), -float(x.min()))
        check(peak < LOUDEST, f"{path}: its samples reach {peak:g}, which is no sound")
        gain = gain_for(peak)
        x = (x / gain).round().clip(-32768, 32767).astype("<i2")
    except UserError as error:
        return [], [("left out", str(error))]
    except Exception as error:  # of whatever kind: it is this recording's, and the others go on
        reason = f"{type(error).__name__}: {printable(str(error))}"
        return [], [("left out", f"{path}: {reason}")]

    # the rest of a long one, if it is shorter than a patch, is dropped
    longest = int(row.get("max_seconds", max_seconds) * SAMPLE_RATE)
    starts = range(0, len(x) - MIN_SAMPLES + 1, longest)
    clips = [x[start : start + longest] for start in starts]
    rest = len(x) - sum(map(len, clips))

    notes = [(kind, str(detail)) for kind, detail in notes]
    if gain != FULL_SCALE:
        notes.append(("scaled", f"its peak is {peak:.3g}"))
    if not x.any():
        notes.append(("silent", "digital silence throughout"))
    if len(clips) > 1 or rest:
        dropped = f", the last {rest / SAMPLE_RATE:.3f} s dropped" if rest else ""
        notes.append(("cut", f"{seconds:.2f} s, clips: {len(clips)}{dropped}"))
    return [(clip, zlib.crc32(clip), gain) for clip in clips], notes


def write_shard(folder, number, rows, read, max_seconds, workers, bar):
    """Write the audio of a run of recordings, and then the small file that vouches for it.

    Its content is returned: the index of the clips, how many samples they have, notes, (path, kind, detail),
    and a stamp of what it was made of: of other rows, or of files that have changed since, the shard is made
    anew.
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
        for row, (clips, notes) in enumerate(decoded):
            for clip, crc, gain in clips:
                first = shard["samples"]
                entry = (number, first, len(clip), number * RUN + row, crc, gain)
                shard["index"].append(entry)
                shard["samples"] += len(clip)
                file.write(clip)
            shard["notes"] += [(rows[row]["path"], *note) for note in notes]
            bar.update()

    write_whole(folder / f"audio-{number:05d}.bin", write)
    write_json(done, shard)
    return shard


def write_json(path, content):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def file_stamp(row):
    """Return size and time of a row's file."""
    try:
        status = os.stat(row["file"])
        return status.st_size, status.st_mtime_ns
    except (OSError, KeyError, ValueError):
        return None


def id_of(index):
    """Return what tells a pack from others: a hash of its index, which has a checksum of each clip."""
    return hashlib.sha256(index.view("u1")).hexdigest()[:16]


def write_table(path, header, rows):
    """Write a csv file, whole or not at all. Names of any bytes come back as they were."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    content = text.getvalue().encode("utf-8", "surrogatepass")
    write_whole(Path(path), lambda file: file.write(content))


def fbank_stats(pack, clips=2000):
    """Return mean and standard deviation of the filter bank of up to `clips` evenly spaced clips that sound.

    Clips of a test split are looked at only if there are no others.
    """
    heard = may_train(pack.table[1])[pack.index["row"]]
    among = np.flatnonzero(heard if heard.any() else ~heard)
    chosen = among[np.linspace(0, len(among) - 1, min(clips, len(among))).astype(int)]
    count, total, squares = 0, 0.0, 0.0
    for i in tqdm(chosen, "fbank statistics", unit="clip", disable=None, leave=False):
        x = fbank(pack.wav(i)[None]).double().numpy()
        if x.max() < LOG_FLOOR + 1e-3:  # silence says nothing about sounds
            continue
        count += x.size
        total += x.sum()
        squares += (x**2).sum()
    mean, std = LOG_FLOOR, 1.0
    if count:
        mean = float(total / count)
        std = max(1e-3, math.sqrt(abs(squares / count - mean**2)))
    else:
        print(f"{pack.path}: nothing in it sounds; its statistics are mean {mean:.2f}, std {std}")
    return dict(fbank_mean=mean, fbank_std=std, front_end=FRONT_END)


# -----------------------------------------------------------------------------
# reading


CLIPS = ["path", "labels", "split", "group"]
SKIPPED = ["path", "reason"]
NOTES = ["path", "kind", "detail"]
ONE_AT_A_TIME = threading.Lock()


def whole(condition, path, problem):
    """Raise UserError about a file of a pack unless the condition holds."""
    check(condition, f"{path}: {problem}; the pack is damaged or was changed, make it again")


def size_of(path):
    """Return the size of a file. Raises UserError if it is a link, a pipe or the like, or not there."""
    try:
        status = os.lstat(path)
    except OSError as error:
        whole(False, path, error.strerror)
    whole(stat.S_ISREG(status.st_mode), path, "a link, a folder or a pipe instead of a file")
    return status.st_size


def read_info(path):
    """Read the pack.json of a pack. Raises UserError unless it holds what it has to."""
    file = path / "pack.json"
    check(
        os.path.lexists(file),
        f"{path} is not a pack, for it has no pack.json; to make one: python data.py --help"
    )
    size_of(file)
    try:
        info = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        whole(False, file, f"cannot be read ({error})")
    whole(isinstance(info, dict), file, "holds no keys")
    version = info.get("version")
    check(version == 2, f"{file}: of version {version}, where this program has 2; make it again")

    kinds = dict(id=str, source=str, classes=list, clips=int, shards=list)
    for key, kind in kinds.items():
        whole(isinstance(info.get(key), kind), file, f"its {key!r} is not a {kind.__name__}")
    hours, classes = info.get("hours"), info["classes"]
    whole(is_number(hours) and hours >= 0, file, f"holds {hours!r} hours")
    named = all(isinstance(name, str) and name for name in classes)
    whole(named and len(set(classes)) == len(classes), file, "a class is no name, or there twice")
    counts = [type(samples) is int and 0 <= samples < 2**60 for samples in info["shards"]]
    whole(all(counts), file, "the size of a shard is no number of samples")
    return info


def is_number(x):
    return type(x) in (int, float) and math.isfinite(x)


def read_index(file, info):
    """Map the index of a pack. Raises UserError unless each of its clips can be where it says."""
    size_of(file)
    try:
        index = np.load(file, mmap_mode="r").view(np.ndarray)
    except Exception as error:
        whole(False, file, f"cannot be read ({error})")
    whole(
        index.dtype in (INDEX, np.dtype(INDEX.descr[:-1])) and index.shape == (info["clips"],),
        file,
        "not the index of the clips that pack.json counts"
    )
    sizes = np.array(info["shards"], np.int64)
    whole(len(index) and len(sizes), file, "no clips")
    whole(id_of(index) == info["id"], file, "not what was written: its hash is not the id in pack.json")

    shard, samples = index["shard"], index["samples"]
    size = sizes[shard.clip(0, len(sizes) - 1)]
    fits = (shard >= 0) & (shard < len(sizes)) & (index["row"] >= 0)
    fits &= (samples >= MIN_SAMPLES) & (index["offset"] >= 0)
    fits &= index["offset"] <= size - samples
    gain = gain_of(index)
    fits &= (gain > 0) & (gain < np.inf)
    whole(fits.all(), file, f"clip {fits.argmin()} cannot be where, or what, it is said to be")
    return index


def gain_of(index):
    """Return the gain of each clip, (clips,) float32. Packs used to have none."""
    if "gain" in index.dtype.names:
        return index["gain"].copy()
    return np.full(len(index), FULL_SCALE, np.float32)


def allow_files(count):
    """Let this process open so many files more, where its system has a limit that one may raise."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open(os.devnull, os.O_RDONLY)  # the lowest free number: about as many are open
        os.close(free)
        wanted = free + count + 256
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ImportError, ValueError, OSError):
        pass  # if it is not enough, opening says so


def read_at(file, out, position):
    """Fill `out`, contiguous, from a position in a file; return how many bytes came. For threads at once."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [out], position)
    if hasattr(os, "pread"):  # macOS
        some = os.pread(file.fileno(), out.nbytes, position)
        memoryview(out).cast("B")[: len(some)] = some
        return len(some)
    with ONE_AT_A_TIME:  # Windows
        file.seek(position)
        return file.readinto(out)


def close_all(files):
    for file in files:
        file.close()


class Pack:
    """An opened pack. Audio and index stay on disk, shared by all processes, and are read when asked for.

    Raises UserError unless it is whole, as far as can be told without reading all of it.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.info = read_info(self.path)
        self.index = read_index(self.path / "index.npy", self.info)
        self.classes = self.info["classes"]
        self.samples, self.gain = self.index["samples"].copy(), gain_of(self.index)
        size_of(self.path / "clips.csv")

        # read by position, not mapped, so that resident memory stays flat; a file is open per shard
        self.shards = []
        weakref.finalize(self, close_all, self.shards)
        allow_files(len(self.info["shards"]))
        for number, samples in enumerate(self.info["shards"]):
            file = self.path / f"audio-{number:05d}.bin"
            size = size_of(file)
            whole(size == 2 * samples, file, f"{size} bytes instead of {2 * samples}")
            try:
                self.shards.append(open(file, "rb", buffering=0))
            except OSError as error:
                raise UserError(f"{file}: cannot be opened ({error.strerror}); see ulimit -n") from None

        # the statistics of another front end say nothing about this one
        if self.info.get("front_end", [16000, 400, 160, 128]) != FRONT_END:
            self.info |= fbank_stats(self)
        mean, std = self.info.get("fbank_mean"), self.info.get("fbank_std")
        whole(
            is_number(mean) and is_number(std) and std > 0,
            self.path / "pack.json",
            f"fbank_mean {mean!r} and fbank_std {std!r} are no statistics"
        )

    def __len__(self):
        return len(self.index)

    def read_into(self, out, i, start=0):
        """Fill `out`, contiguous int16, with clip i from sample `start` on. Threads may do so at once."""
        shard, offset, *_ = self.index[i].item()
        read = read_at(self.shards[shard], out, 2 * (offset + start))
        check(read == out.nbytes, f"{self.path}: shard {shard} is shorter than it was")

    def audio(self, i):
        """Read clip i: (n,) int16."""
        out = np.empty(self.samples[i], "<i2")
        self.read_into(out, i)
        return out

    def wav(self, i):
        """Read clip i: (n,) float32, in [-1, 1] unless it was louder."""
        return torch.from_numpy(self.audio(i) * self.gain[i])

    def records(self, name, header):
        """Yield the lines of a table below its header, each a list of str."""
        path = self.path / name
        size_of(path)
        try:
            with open(path, newline="", encoding="utf-8", errors="surrogatepass") as file:
                lines = csv.reader(file)
                whole(next(lines, None) == header, path, f"its header is not {','.join(header)}")
                for fields in lines:
                    whole(len(fields) == len(header), path, f"line {lines.line_num} is cut short")
                    yield fields
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            whole(False, path, f"cannot be read ({error})")

    def rows(self):
        """Read clips.csv, a dict per recording."""
        return [dict(zip(CLIPS, fields)) for fields in self.records("clips.csv", CLIPS)]

    def names(self, clips):
        """Return the paths of the recordings that clips are of, for messages."""
        rows = self.rows()
        return [f"{self.path}/{rows[row]['path']}" for row in self.index["row"][clips]]

    def id(self):
        """Return what tells this pack from others: of its sounds, and of their labels and splits."""
        table = zlib.crc32((self.path / "clips.csv").read_bytes())
        return f"{self.info['id']}-{table:08x}"

    def skipped(self):
        """Return (path, reason) of the recordings that were left out."""
        return list(map(tuple, self.records("skipped.csv", SKIPPED)))

    def notes(self):
        """Return (path, kind, detail) of what packing did to recordings. Packs used to have none."""
        if not os.path.lexists(self.path / "notes.csv"):
            return []
        return list(map(tuple, self.records("notes.csv", NOTES)))

    @functools.cached_property
    def table(self):
        """The Labels of all recordings, and their splits, an array of str."""
        number = {name: i for i, name in enumerate(self.classes)}
        numbers, counts, splits = [], [], []
        file = self.path / "clips.csv"
        try:
            for _, labels, split, _ in self.records("clips.csv", CLIPS):
                classes = [number[name] for name in labels.split(";") if name]
                numbers += classes
                counts.append(len(classes))
                splits.append(sys.intern(split))  # two million, but few of them differ
        except KeyError as error:
            whole(False, file, f"{error} is not a class in pack.json")
        recordings = self.info.get("recordings", len(splits))  # packs used not to say
        fits = self.index["row"].max() < len(splits) and len(splits) == recordings
        whole(fits, file, f"lists {len(splits)} recordings, which are not those of the pack")
        return Labels(numbers, counts, len(self.classes)), np.array(splits)


class Labels:
    """The labels of recordings as one list of numbers: 40 MB for AudioSet, where a table has 1 GB.

    Asked for recordings, an array of n numbers, it gives their table, (n, classes) bool.
    """

    def __init__(self, numbers, counts, classes):
        self.numbers = np.array(numbers, np.int32)         # of all labels, recording after recording
        self.counts = np.array(counts, np.int32)           # labels of each recording
        self.first = np.cumsum(self.counts) - self.counts  # where those of each recording begin
        self.classes = classes

    def __len__(self):
        return len(self.counts)

    def pairs(self, recordings):
        """Return all labels of recordings: the position in `recordings` and the class of each."""
        counts = self.counts[recordings]
        position = np.repeat(np.arange(len(counts)), counts)
        # the place of each label among those of its recording: 0, 1, ...
        nth = np.arange(len(position)) - (np.cumsum(counts) - counts)[position]
        return position, self.numbers[self.first[recordings][position] + nth]

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


# a split with one of these words in its name: test, test-clean, FSD50K.eval_audio, but not contest
FOR_TESTING = re.compile(
    r"(?<![^\W\d_])(test|testing|eval|evaluation|valid|val|validation|dev)(s|set)?(?![^\W\d_])", re.I
)


def may_train(split, splits="", leave_out=""):
    """Return which recordings pre-training may hear, a mask: all but those to test or choose by.

    split: array of str; splits: hear these instead, and recordings of no split; "all" = every one;
    leave_out: and never these. Both as in "1,2".
    """
    heard = ~np.isin(split, [name for name in np.unique(split) if FOR_TESTING.search(name)])
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
        pack.classes,
        f"{pack.path} has no labels; a table has a column of them (data.py csv), or a tree of folders "
        "has one a class (data.py folder --folders)"
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
        there = ", ".join(filter(None, names)) or "none"
        check(
            train.any() and test.any(),
            f"{pack.path}: training needs the splits train and test, or folds 1, 2, ...; it has: {there}. "
            "They are a column of a table (data.py csv), or folders (data.py folder --folders splits)"
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
    options = classes, args.source, args.max_seconds, args.workers
    try:
        write_pack(args.out, rows, read, *options)
    except OSError as error:
        refused = isinstance(error, PermissionError) or error.errno == errno.EROFS
        way_out = "choose another --out" if refused else "once that is mended the same command goes on"
        raise UserError(f"{args.out}: {error.strerror or error}; {way_out}") from None


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
    changes = []
    for kind, count in Counter(kind for _, kind, _ in pack.notes()).most_common():
        more = MORE.get(kind, "").format(seconds.max())
        changes.append(f"{count} {kind} {more}".strip())
    print(
        f"{pack.path}: {len(pack)} clips of {seconds.min():.2f} to {seconds.max():.2f} s, "
        f"{info['hours']:.2f} h from {info['source']}\n"
        f"fbank mean {info['fbank_mean']:.5f} std {info['fbank_std']:.5f}\n"
        f"splits: {counts(split[recording])}\n"
        f"{len(groups)} groups\n"
        f"classes: {counts(classes) or '(none)'}"
    )
    if changes:
        which = "skipped.csv, notes.csv say which"
        print(f"of {len(labels)} recordings {', '.join(changes)}: {which}")
    for _, reason in pack.skipped()[:10]:
        print("  " + reason)


def show_stats(args):
    describe(Pack(args.pack))


def check_pack(args):
    """Raise UserError unless the audio of every clip is what it was when packed."""
    pack = Pack(args.pack)
    for table in (pack.rows, pack.skipped, pack.notes):
        table()  # is checked as it is read
    clips = tqdm(range(len(pack)), "checking", disable=None)
    damaged = [i for i in clips if zlib.crc32(pack.audio(i)) != pack.index["crc"][i]]
    if damaged:
        first = pack.names(damaged)[0]
        problem = f"{len(damaged)} clips are not what was packed, {first} the first"
        raise UserError(f"{args.pack}: {problem}; remove it and make it again")
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
