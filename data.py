"""
Audio in, batches out. Any collection of sounds becomes a pack: one folder of int16, 16 kHz, mono samples.

    python data.py folder DIR --out packs/mine                          # class per folder, or an unlabelled tree
    python data.py csv meta.csv --root DIR --out packs/mine             # any table with a path column
    python data.py esc50 ESC-50-master --out packs/esc50                # known data sets: audioset, esc50, speechcommands, iemocap
    python data.py toy --out packs/toy                                  # built-in sounds
    python data.py stats packs/mine                                     # hours, classes, splits, fbank mean and std
    python data.py check packs/mine                                     # every clip against its checksum

A pack: audio-00000.bin ... (clips end to end), index.npy (where each clip is), clips.csv (path, labels, split, group),
skipped.csv (with reasons), pack.json (classes, hours, fbank statistics). It appears under its name when it is whole;
a packing that was stopped or killed goes on where it was when the same command is typed again.
"""
import argparse
import collections
import csv
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

import recipes
import toy
from common import UserError
from model import BANDS, FRAME, HOP, MIN_SAMPLES, PATCH, SAMPLE_RATE, fbank, num_tokens

ROW = PATCH * HOP                   # samples from one patch row to the next
SHARD_BYTES = 4 * 2**30
STRETCH = 600                       # seconds of a long file that are read at a time
SYNC_SECONDS = 5                    # between the journal's entries while packing
INDEX = np.dtype([("shard", "i4"), ("offset", "i8"), ("samples", "i4"), ("row", "i4"), ("crc", "u4")])      # row: line of clips.csv

# -----------------------------------------------------------------------------
# reading audio

def resample(x: np.ndarray, rate: int) -> np.ndarray:
    """(n,) float32 at `rate` -> 16 kHz. With soxr if it is installed, else a Hann-windowed sinc, one phase per output."""
    if rate == SAMPLE_RATE:
        return x
    try:
        import soxr
        return soxr.resample(x, rate, SAMPLE_RATE)
    except ImportError:
        pass
    up, down = SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE), rate // math.gcd(rate, SAMPLE_RATE)
    cutoff = 0.95 * min(1.0, up / down)             # of the input's Nyquist frequency
    half = math.ceil(32 / cutoff)                   # 32 zero crossings on either side
    if up * (2 * half + down) > 2e7:
        raise UserError(f"a sampling rate of {rate} Hz needs soxr: pip install soxr")
    t = np.arange(-half, half + down + 1)[None] - np.arange(up)[:, None] * down / up        # (phase, tap), input samples
    kernel = cutoff * np.sinc(cutoff * t) * np.where(np.abs(t) < half, np.cos(np.pi * t / 2 / half)**2, 0)
    padded = F.pad(torch.from_numpy(x)[None, None], (half, half + down))
    y = F.conv1d(padded, torch.from_numpy(kernel)[:, None].float(), stride=down)            # (1, phase, n / down)
    return y[0].T.flatten()[:math.ceil(len(x) * up / down)].numpy()

def read_audio(path, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """One file, or its seconds start..end -> (n,) float32 at 16 kHz, mean of its channels. Raises UserError."""
    try:
        with soundfile.SoundFile(path) as f:
            first = round(start * f.samplerate)
            last = f.frames if end is None else min(f.frames, round(end * f.samplerate))
            if not 0 <= first < last:
                raise UserError(f"{path}: no audio between {start} s and {'the end' if end is None else f'{end} s'} "
                                f"(the file has {f.frames / f.samplerate:.2f} s)")
            pieces, rate, stretch = [], f.samplerate, STRETCH * f.samplerate
            for a in range(first, last, stretch):       # a long file by stretches, a second of context on either side
                b = min(last, a + stretch)
                low = max(first, a - rate)
                f.seek(low)
                x = f.read(min(last, b + rate) - low, dtype="float32", always_2d=True).mean(1)
                if not np.isfinite(x).all():
                    raise UserError(f"{path}: holds NaN or infinite samples")
                skip = (a - low) // rate * SAMPLE_RATE
                pieces.append(resample(x, rate)[skip:skip + math.ceil((b - a) * SAMPLE_RATE / rate)])
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        reason = getattr(error, "error_string", str(error)).strip(". ") if os.path.exists(path) else "no such file"
        raise UserError(f"{path}: cannot be read as audio ({reason})") from None
    return np.concatenate(pieces)

def pad_batch(clips: list) -> tuple[torch.Tensor, torch.Tensor]:
    """List of (n_i,) -> zero-padded (B, max n), lengths (B,)."""
    wav = np.zeros((len(clips), max(map(len, clips))), clips[0].dtype)
    for row, clip in zip(wav, clips):
        row[:len(clip)] = clip
    return torch.from_numpy(wav), torch.tensor([len(clip) for clip in clips])

def load_audio(paths) -> tuple[torch.Tensor, torch.Tensor]:
    """A path or a list -> wav (B, n) float32 in [-1, 1] at 16 kHz, zero-padded; lengths (B,) in samples."""
    return pad_batch([read_audio(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)])

# -----------------------------------------------------------------------------
# packs

def in_order(function, items, workers):
    """function(item) for all items by threads (what decodes, reads and copies runs outside the interpreter lock), in order,
    a few ahead."""
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

def write_pack(out, rows, read, classes=None, source="", max_seconds=10.0, workers=None):
    """Write a pack. rows: list of dicts with path, labels (list), split, group, ... (recipes.py); read(row) -> (n,) float32 at 16 kHz.

    Clips longer than max_seconds (or the row's own) are cut. A row whose read raises UserError, or that is shorter than one
    patch row (0.175 s), is skipped and listed with its reason. While it is made, the pack is out.partial, with a journal: a line per
    row whose audio is safely on disk: its stamp, and [[samples, crc], ...] or the reason for skipping it. A packing that was
    killed goes on there.
    """
    out, workers = Path(out), workers or os.cpu_count()
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another --out")
    if not MIN_SAMPLES <= max_seconds * SAMPLE_RATE < 2**31:
        raise UserError(f"--max_seconds {max_seconds}: has to be at least 0.175, the length of one patch, and finite")
    classes = sorted({label for row in rows for label in row["labels"]}) if classes is None else list(classes)
    unknown = {label for row in rows for label in row["labels"]} - set(classes)
    if unknown:
        raise UserError(f"{len(unknown)} labels are not in the class list, {sorted(unknown)[0]!r} the first")
    if any(";" in label for label in classes):
        raise UserError(f"the class name {next(c for c in classes if ';' in c)!r} holds a semicolon, which separates labels; rename it")

    def stamp(row):
        """Size and time of the row's file: on resuming, a file that has changed since is read again, and all after it."""
        try:
            stat = os.stat(row["file"])
            return [stat.st_size, stat.st_mtime_ns]
        except (OSError, KeyError):
            return None

    def decode(row):
        """Stamp and [(int16 audio, crc), ...], or the reason why there is none. A rest after cutting, less than a patch,
        has crc None."""
        now = stamp(row)
        try:
            if "problem" in row:
                raise UserError(row["problem"])
            x = (read(row) * 32768).round().clip(-32768, 32767).astype("<i2")
            if len(x) < MIN_SAMPLES:
                raise UserError(f"{row['path']}: {len(x) / SAMPLE_RATE:.3f} s is shorter than one patch (0.175 s)")
            longest = int(row.get("max_seconds", max_seconds) * SAMPLE_RATE)
            pieces = [x[i:i + longest] for i in range(0, len(x), longest)]
            return now, [(piece, zlib.crc32(piece) if len(piece) >= MIN_SAMPLES else None) for piece in pieces]
        except UserError as error:
            return now, str(error)

    # what an unfinished packing of the same rows has done
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    journal = open(partial / "journal", "a+b")
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{partial}: another data.py is at it; wait for it, or choose another --out") from None
    journal.seek(0)
    request = hashlib.sha256(repr((INDEX, SHARD_BYTES, classes, source, max_seconds)).encode())
    for row in rows:
        request.update(repr(row).encode())
    request = request.hexdigest()
    first, *lines = journal.read().split(b"\n")[:-1] or [b""]       # what follows the last newline was cut short
    lines = lines[:next((i for i, (line, row) in enumerate(zip(lines, rows)) if json.loads(line)[0] != stamp(row)), len(rows))]
    if first != request.encode():
        lines = []
        for path in partial.glob("audio-*.bin"):
            path.unlink()
        journal.truncate(0)
        journal.write(request.encode() + b"\n")
    journal.truncate(len(request) + 1 + sum(len(line) + 1 for line in lines))
    if lines:
        print(f"{partial}: {len(lines)} of {len(rows)} files are done, going on")

    index, skipped, rests, pending, shard, offset, audio, synced = [], [], 0, [], 0, 0, None, time.time()

    def sync():
        """The audio first, then the lines that vouch for it."""
        if audio:
            audio.flush()
            os.fsync(audio.fileno())
        text = b"".join(json.dumps(line).encode() + b"\n" for line in pending)
        pending.clear()                 # first: a sync that is interrupted is called again
        journal.write(text)
        journal.flush()
        os.fsync(journal.fileno())

    results = itertools.chain(map(json.loads, lines), in_order(decode, rows[len(lines):], workers))
    try:
        for number, (when, result) in enumerate(tqdm(results, total=len(rows), desc=f"packing {out.name}", unit="file", disable=None)):
            fresh, pieces = number >= len(lines), [] if isinstance(result, str) else result
            for piece, crc in pieces:
                samples = len(piece) if fresh else piece
                if crc is None:
                    rests += 1
                    continue
                if 2 * (offset + samples) > SHARD_BYTES:
                    sync()
                    shard, offset, audio = shard + 1, 0, audio and audio.close()
                if fresh:
                    if not audio:
                        audio = open(partial / f"audio-{shard:05d}.bin", "ab")
                        audio.truncate(2 * offset)              # what no line vouches for
                    audio.write(piece)
                index.append((shard, offset, samples, number, crc))
                offset += samples
            if isinstance(result, str):
                skipped.append((rows[number]["path"], result))
            if fresh:
                pending.append((when, result if isinstance(result, str) else [(len(piece), crc) for piece, crc in pieces]))
            if time.time() > synced + SYNC_SECONDS:
                sync()
                synced = time.time()
    finally:
        sync()
    if not index:
        shutil.rmtree(partial)
        raise UserError(f"{source}: no usable audio"
                        + (f"; {len(skipped)} files skipped, the first: {skipped[0][1]}" if skipped else ""))
    if audio:
        audio.close()
    index = np.array(index, INDEX)
    np.save(partial / "index.npy", index)
    with open(partial / "clips.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["path", "labels", "split", "group"])
        table.writerows([r["path"], ";".join(r["labels"]), r["split"], r["group"]] for r in rows)
    with open(partial / "skipped.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["path", "reason"])
        table.writerows(skipped)
    info = dict(version=2, id=hashlib.sha256(index.tobytes()).hexdigest()[:16], source=str(source), classes=classes, clips=len(index),
                hours=round(index["samples"].sum() / SAMPLE_RATE / 3600, 4), skipped=len(skipped), rests_dropped=rests,
                shards=[int(index["samples"][index["shard"] == s].sum()) for s in range(shard + 1)])
    (partial / "pack.json").write_text(json.dumps(info))
    for path in partial.glob("audio-*.bin"):                    # what no line vouches for
        number = int(path.stem.removeprefix("audio-"))
        path.unlink() if number > shard else os.truncate(path, 2 * info["shards"][number])
    mean, std, used = fbank_stats(Pack(partial))
    info |= dict(fbank_mean=mean, fbank_std=std, fbank_clips=used)
    (partial / "pack.json").write_text(json.dumps(info, indent=1))
    (partial / "journal").unlink()
    os.replace(partial, out)
    print(f"{out}: {len(index)} clips, {info['hours']:.2f} h, {len(classes)} classes, fbank {mean:.3f} +- {std:.3f} over {used} clips"
          + (f"; {len(skipped)} of {len(rows)} files skipped, listed in {out / 'skipped.csv'}, the first: {skipped[0][1]}"
             if skipped else ""))
    return Pack(out)

def fbank_stats(pack, clips=2000):
    """Mean and standard deviation over all fbank values of up to `clips` evenly spaced clips, and how many."""
    chosen = np.unique(np.linspace(0, len(pack) - 1, min(clips, len(pack))).astype(int))
    n, total, squares = 0, 0.0, 0.0
    for i in tqdm(chosen, desc="fbank statistics", unit="clip", disable=None, leave=False):
        x = fbank(torch.from_numpy(pack.audio(i) / np.float32(32768))[None]).double()
        n, total, squares = n + x.numel(), total + x.sum().item(), squares + x.square().sum().item()
    return total / n, math.sqrt(squares / n - (total / n)**2), len(chosen)

class Numbers:
    """Numbers in a file, read by position: nothing stays mapped, so resident memory stays flat and processes share the page cache."""

    def __init__(self, path, dtype, count):
        self.path, size = str(path), count * np.dtype(dtype).itemsize
        try:
            self.file = open(path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if os.fstat(self.file.fileno()).st_size != size:
            raise UserError(f"{path}: {os.fstat(self.file.fileno()).st_size} bytes instead of {size}")

    def read_into(self, out, first):
        """Fill `out`, a contiguous array, from number `first` on. Threads may read at the same time."""
        if os.preadv(self.file.fileno(), [out], int(first) * out.itemsize) != out.nbytes:
            raise UserError(f"{self.path}: ends before number {first + len(out)}")

class Pack:
    """An opened pack. index (clips,) stays on disk, mapped and shared between processes; so does the audio, read as it is asked for."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.info = json.loads((self.path / "pack.json").read_text())
            self.index = np.load(self.path / "index.npy", mmap_mode="r").view(np.ndarray)
            again = f"remove {path} and make it again from {self.info['source']}"
            whole = self.info["version"] == 2 and len(self.index) == self.info["clips"]
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            raise UserError(f"{path} is not a pack, or a damaged one (no readable pack.json and index.npy); make it: "
                            "python data.py folder DIR --out PACK") from None
        if not whole:
            raise UserError(f"{path}: made by another version, or its index has lost clips; {again}")
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))        # a file per shard of 37 hours
        self.classes = self.info["classes"]
        self.samples = self.index["samples"].copy()
        try:
            self.shards = [Numbers(self.path / f"audio-{s:05d}.bin", "<i2", n) for s, n in enumerate(self.info["shards"])]
        except UserError as error:
            raise UserError(f"{error}; the pack is damaged, {again}") from None

    def __len__(self):
        return len(self.index)

    def read_into(self, out, i, start=0):
        """Fill `out`, contiguous int16, with clip i from sample `start` on."""
        shard, offset = self.index[i].item()[:2]
        self.shards[shard].read_into(out, offset + start)

    def audio(self, i, start=0, samples=None) -> np.ndarray:
        """Clip i, or `samples` of it from `start` on: (n,) int16."""
        rest = int(self.samples[i]) - start
        out = np.empty(rest if samples is None else min(rest, samples), "<i2")
        self.read_into(out, i, start)
        return out

    def table(self):
        """labels: per clip a list of class numbers; split, group: arrays of str."""
        number = {name: i for i, name in enumerate(self.classes)}
        with open(self.path / "clips.csv", newline="") as f:
            rows = csv.reader(f)
            next(rows)
            labels, split, group = zip(*(([number[name] for name in labels.split(";") if name], s, g) for _, labels, s, g in rows))
        row = self.index["row"]
        return [labels[i] for i in row], np.array(split)[row], np.array(group)[row]

    def skipped(self):
        """(path, reason) of the files that were left out."""
        with open(self.path / "skipped.csv", newline="") as f:
            return [tuple(row) for row in csv.reader(f)][1:]

    def damaged(self):
        """Numbers of the clips whose audio is not what it was when packed."""
        clips = tqdm(range(len(self)), desc=f"checking {self.path.name}", unit="clip", disable=None, leave=False)
        return [i for i in clips if zlib.crc32(self.audio(i)) != self.index["crc"][i]]

def open_packs(spec: str):
    """ "packs/a:0.4,packs/b:0.6" -> [Pack, Pack], [0.4, 0.6]: shares of the sampled seconds; None without weights."""
    parts = [part.rpartition(":") if ":" in part else (part, ":", "") for part in spec.split(",")]
    packs = [Pack(path) for path, _, _ in parts]
    try:
        weights = [float(w) for _, _, w in parts if w]
    except ValueError:
        raise UserError(f"--data {spec}: weights are numbers, as in packs/a:0.4,packs/b:0.6") from None
    if weights and (len(weights) < len(packs) or not all(0 < w < math.inf for w in weights)):
        raise UserError(f"--data {spec}: give every pack a positive weight, or none")
    return packs, np.array(weights) / sum(weights) if weights else None

# -----------------------------------------------------------------------------
# batches: what they hold is a pure function of (seed, epoch, number), whatever the number of threads that make them

class Clips:
    """Clips of one or more packs, numbered through. Asked for a list of (clip, *key), it gives a batch;
    all chance is drawn from the keys.

    crop: samples of a random crop, 0 = whole clips, starting at a multiple of `align` samples.
    tokens: per pack the Numbers of its tokens, one row of 8 per patch row, and where each clip's begin; cropped alike.
    """

    def __init__(self, packs, crop=0, align=HOP, tokens=None):
        self.packs, self.crop, self.align, self.tokens = packs, crop, align, tokens
        self.first = np.cumsum([0] + [len(p) for p in packs])
        self.samples = np.concatenate([p.samples for p in packs])
        if crop:
            self.samples = np.minimum(self.samples, crop)

    def __getitem__(self, items):
        """Dict of tensors: wav (B, n) int16 zero-padded, lengths (B,), clip (B,), noise (B, T), tokens (B, T), -1 padded.

        n ends with the last patch row of the longest clip: no frame is computed that no patch uses.
        """
        clips = np.array([item[0] for item in items])
        pack_of = np.searchsorted(self.first, clips, side="right") - 1
        lengths = self.samples[clips]
        count = num_tokens(torch.from_numpy(lengths)).numpy()
        T = count.max()
        n = (T // BANDS * PATCH - 1) * HOP + FRAME
        lengths = np.minimum(lengths, n)
        wav, noise = np.empty((len(items), n), np.int16), np.empty((len(items), T), np.float32)
        tokens = np.full((len(items), T), -1, np.int64)
        for row, ((clip, *key), p, samples, most) in enumerate(zip(items, pack_of.tolist(), lengths.tolist(), count.tolist())):
            pack, i, rng, start = self.packs[p], clip - int(self.first[p]), np.random.default_rng(key), 0
            if self.crop and pack.samples[i] > self.crop:
                start = int(rng.integers((pack.samples[i] - self.crop) // self.align + 1)) * self.align
            pack.read_into(wav[row, :samples], i, start)
            wav[row, samples:] = 0
            noise[row] = rng.random(T, dtype=np.float32)           # for the clip's own tokens the same in any batch
            if self.tokens:
                numbers, offsets = self.tokens[p]
                numbers.read_into(mine := np.empty(most, "<u2"), offsets[i] + start // ROW * BANDS)
                tokens[row, :most] = mine
        batch = dict(wav=wav, lengths=lengths.astype(np.int64), clip=clips, noise=noise) | (dict(tokens=tokens) if self.tokens else {})
        return {key: torch.from_numpy(value) for key, value in batch.items()}

def epoch_batches(samples, batch_samples, key, subsets=None, weights=None, multiple=1, shuffle=True):
    """One epoch as a list of arrays of clip numbers.

    samples: (clips,) lengths; subsets: per pack an array of the clips to use; key: ints that decide the order. multiple: of it is the
    number of clips in each batch but the last (it is the number of ranks). Clips in a batch go from long to short.
    Without weights each clip comes once, in batches of at most batch_samples of padded audio, of clips of like length: sorted within
    stretches of some 20 batches. With weights, each pack's share of the seconds, the batches are mixed: see mixed_batches.
    """
    if weights is not None:
        return mixed_batches(samples, batch_samples, key, subsets, weights, multiple)
    rng = np.random.default_rng(key)
    order = np.arange(len(samples)) if subsets is None else np.concatenate(subsets)
    if not len(order):
        return []
    order = rng.permutation(order) if shuffle else order
    order = np.resize(order, max(len(order), multiple))
    batches, size = [], 20 * max(1, int(batch_samples / samples[order].mean() / multiple)) * multiple
    for stretch in np.split(order, np.arange(size, len(order) - multiple + 1, size)):
        stretch = stretch[np.argsort(-samples[stretch], kind="stable")]
        while len(stretch):
            count = max(multiple, int(batch_samples // samples[stretch[0]]) // multiple * multiple)
            count = count if len(stretch) - count >= multiple else len(stretch)         # no rest that leaves a rank without a clip
            batches.append(stretch[:count])
            stretch = stretch[count:]
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches

def mixed_batches(samples, batch_samples, key, subsets, weights, multiple=1):
    """As many seconds as all packs have, weights[p] of them from pack p: batches of batch_samples of audio.

    Each pack is a stream of its clips, shuffled, again and again. A clip is due at (seconds of its stream so far) / weight;
    all streams are merged by that. So any run of batches holds each pack's share to within a clip or two.
    """
    total = sum(samples[s].sum(dtype=np.int64) for s in subsets)
    streams, due = [], []
    for p, (subset, weight) in enumerate(zip(subsets, weights)):
        passes = math.ceil(weight * total / samples[subset].sum(dtype=np.int64))
        stream = np.concatenate([batch for t in range(passes)
                                 for batch in epoch_batches(samples, weight * batch_samples, (*key, p, t), [subset])])
        seconds = np.cumsum(samples[stream], dtype=np.float64)
        stream = stream[:max(1, np.searchsorted(seconds, weight * total * (1 + 1e-9), side="right"))]
        streams.append(stream)
        due.append((seconds[:len(stream)] - samples[stream] / 2) / weight)
    order = np.concatenate(streams)[np.argsort(np.concatenate(due), kind="stable")]
    order = np.resize(order, max(len(order), multiple))
    seconds = np.cumsum(samples[order], dtype=np.float64)
    batches, first = [], 0
    while first < len(order):
        last = np.searchsorted(seconds, (seconds[first - 1] if first else 0) + batch_samples * (1 + 1e-9), side="right")
        last = first + max(multiple, (last - first) // multiple * multiple)
        last = last if len(order) - last >= multiple else len(order)
        batches.append(order[first:last][np.argsort(-samples[order[first:last]], kind="stable")])
        first = last
    return batches

class Stream:
    """Endless batches of this rank from (epoch, number) on: lists of (clip, seed, epoch, position in epoch)."""

    def __init__(self, plan, seed, start=(0, 0), rank=0, world=1):
        self.plan = functools.lru_cache(2)(plan)
        self.seed, self.start, self.rank, self.world = seed, start, rank, world

    def __iter__(self):
        epoch, number = self.start
        while True:
            batches = self.plan(epoch)
            position = np.cumsum([0] + [len(b) for b in batches])
            for k in range(number, len(batches)):
                mine = range(self.rank, len(batches[k]), self.world)
                yield [(int(batches[k][j]), self.seed, epoch, int(position[k]) + j) for j in mine]
            epoch, number = epoch + 1, 0

    def after(self, start):
        """The place of the batch that follows the one at `start`."""
        epoch, number = start
        return (epoch, number + 1) if number + 1 < len(self.plan(epoch)) else (epoch + 1, 0)

class Loader:
    """Batches of clips, made ahead of time by `workers` threads (0 = as they are asked for).

    batches: an iterable of lists of (clip, *key), or a list of them, which can be gone through again and again.
    """

    def __init__(self, clips, batches, workers=0):
        self.clips, self.batches, self.workers = clips, batches, workers

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return in_order(self.make, self.batches, self.workers)

    def make(self, items):
        batch = self.clips[items]
        return {key: value.pin_memory() for key, value in batch.items()} if torch.cuda.is_available() else batch

def to_device(batch, device):
    """Tensors to the device, without waiting for it; wav becomes float32 in [-1, 1]. full: no clip has padding tokens."""
    full = bool((num_tokens(batch["lengths"]) == num_tokens(batch["wav"].shape[1])).all())
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()} | dict(full=full)
    batch["wav"] = batch["wav"].float() / 32768
    return batch

def split_batch(batch, seconds):
    """Micro-batches of at most `seconds` of padded audio each, cut to their longest clip. Clips go from long to short."""
    T, parts, first = num_tokens(batch["lengths"]), [], 0
    while first < len(T):
        rows = int(T[first]) // BANDS
        last = first + max(1, int(seconds * SAMPLE_RATE // (rows * ROW)))
        width = dict(wav=(rows * PATCH - 1) * HOP + FRAME, noise=rows * BANDS, tokens=rows * BANDS)
        parts.append({key: value[first:last, :width[key]] if key in width else value[first:last] for key, value in batch.items()})
        first = last
    return parts

def fixed_batches(clips, subsets, batch_seconds, seed, most=None, number=0, share=slice(None)):
    """A Loader of (the first `most`) batches whose crops and noise are the same at every pass. share: this rank's clips."""
    batches = epoch_batches(clips.samples, batch_seconds * SAMPLE_RATE, (seed, number), [np.concatenate(subsets)])
    batches = [[(i, seed, number, i) for i in batch[share].tolist()] for batch in batches[:most]]
    return Loader(clips, [batch for batch in batches if batch])

def hold_out(packs, share=0.05, most=400, seed=0):
    """Split every pack's clips by source file into (train, valid) lists of global clip numbers."""
    train, valid, first = [], [], 0
    for pack in packs:
        row = pack.index["row"]
        rows = np.unique(row)
        held = np.zeros(rows[-1] + 1, bool)
        held[np.random.default_rng(seed).permutation(rows)[:min(most, math.ceil(share * len(rows)))]] = len(rows) > 1
        mask, clips = held[row], first + np.arange(len(pack))
        train.append(clips[~mask])
        valid.append(clips[mask])
        first += len(pack)
    return train, valid

# -----------------------------------------------------------------------------
# command line

def make_toy(out, clips=1600, seed=0):
    """Ten classes of made sounds, 3 s each, 80 minutes: 3/4 train, 1/4 test. A function of the seed."""
    rows = [dict(path=f"toy-{i:05d}", labels=[toy.CLASSES[i % 10]], split="test" if i % 40 < 10 else "train", group="", key=[seed, i])
            for i in range(clips)]
    return write_pack(out, rows, lambda row: toy.toy_clip(np.random.default_rng(row["key"]), row["labels"][0]), toy.CLASSES,
                      source="toy")

def show(path):
    pack = Pack(path)
    labels, split, group = pack.table()
    counts = lambda values: ", ".join(f"{v or '(none)'} {n}" for v, n in zip(*np.unique(values, return_counts=True)))
    print(f"{path}: {len(pack)} clips of {pack.samples.min() / SAMPLE_RATE:.2f} to {pack.samples.max() / SAMPLE_RATE:.2f} s, "
          f"{pack.info['hours']:.2f} h from {pack.info['source']}\nfbank mean {pack.info['fbank_mean']:.5f} std "
          f"{pack.info['fbank_std']:.5f} over {pack.info['fbank_clips']} evenly spaced clips\nsplits: {counts(split)}\n"
          f"{len(np.unique(group))} groups\n"
          f"classes: {counts([pack.classes[c] for row in labels for c in row]) or '(none)'}\n{pack.info['skipped']} files skipped, "
          f"{pack.info['rests_dropped']} rests of under 0.175 s left out when cutting long files")
    for _, reason in pack.skipped():
        print("  " + reason)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = {name: commands.add_parser(name, help=text, description=text) for name, text in dict(
        toy="built-in sounds of ten classes", csv="a table with a path column", folder="class per folder, or an unlabelled tree",
        esc50="ESC-50: five folds of environmental sounds", audioset="AudioSet, from its tables or AST's json",
        speechcommands="Speech Commands: 35 words, or SUPERB's 12 classes", iemocap="IEMOCAP: four emotions, five folds",
        stats="what is in a pack", check="a pack's audio against its checksums").items()}
    command["toy"].add_argument("--clips", type=int, default=1600, help="3 s each [1600]")
    command["toy"].add_argument("--seed", type=int, default=0, help="[0]")
    command["csv"].add_argument("table", help="with a header; labels are separated by ; or by commas")
    command["csv"].add_argument("--root", help="folder that the paths start from [that of the table]")
    command["csv"].add_argument("--keep", help="only these splits or folds, as in 1,2,3,4 [all]")
    command["csv"].add_argument("--classes", help="file of the class names in order, one a line [the labels that occur, sorted]")
    for name in ("path", "label", "split", "group"):
        command["csv"].add_argument(f"--{name}_column", f"--{name}-column", help=f"header of the {name} column [found by name]")
    for name in ("folder", "esc50", "audioset", "speechcommands", "iemocap"):
        command[name].add_argument("root", help="folder of the audio files" if name in ("folder", "audioset")
                                   else "folder of the data set, unpacked")
    command["audioset"].add_argument("--train", help="tables, as in balanced_train_segments.csv,unbalanced_train_segments.csv")
    command["audioset"].add_argument("--test", help="tables, as in eval_segments.csv")
    command["audioset"].add_argument("--class_csv", "--class-csv", required=True, help="class_labels_indices.csv")
    command["speechcommands"].add_argument("--version", type=int, default=2, choices=(1, 2),
                                           help="1 = SUPERB's 12 classes of v0.01, 2 = 35 words of v0.02 [2]")
    command["speechcommands"].add_argument("--test_root", "--test-root", help="folder of speech_commands_test_set_v0.01, for version 1")
    for name in ("csv", "folder", "esc50", "audioset", "speechcommands", "iemocap"):
        command[name].add_argument("--max_seconds", "--max-seconds", type=float, default=10.0, help="longer clips are cut [10]")
        command[name].add_argument("--workers", type=int, help="threads that decode [one per core]")
    for name in ("toy", "csv", "folder", "esc50", "audioset", "speechcommands", "iemocap"):
        command[name].add_argument("--out", required=True, help="the pack to make")
    for name in ("stats", "check"):
        command[name].add_argument("pack")
    args = parser.parse_args(argv)
    split = lambda tables: tables.split(",") if tables else []
    if args.command == "toy":
        if args.seed < 0 or args.clips < 1:
            raise UserError("--seed is not negative, and --clips is at least 1")
        return make_toy(args.out, args.clips, args.seed)
    if args.command == "stats":
        return show(args.pack)
    if args.command == "check":
        damaged = Pack(args.pack).damaged()
        if damaged:
            raise UserError(f"{args.pack}: {len(damaged)} clips are not what was packed, number {damaged[0]} the first; "
                            "remove it and make it again")
        return print(f"{args.pack}: every clip is as it was packed")
    if args.command == "csv":
        columns = {n: getattr(args, f"{n}_column") for n in ("path", "label", "split", "group") if getattr(args, f"{n}_column")}
        rows, classes = recipes.from_csv(args.table, args.root, columns, args.keep, args.classes)
    elif args.command == "audioset":
        if not (args.train or args.test):
            raise UserError("--train or --test: name at least one table of clips")
        rows, classes = recipes.from_audioset(args.root, dict(train=split(args.train), test=split(args.test)), args.class_csv)
    elif args.command == "speechcommands":
        rows, classes = recipes.from_speechcommands(args.root, args.version, args.test_root)
    else:
        rows, classes = getattr(recipes, f"from_{args.command}")(args.root)
    write_pack(args.out, rows, lambda row: read_audio(row["file"], row["start"], row["end"]), classes,
               args.table if args.command == "csv" else args.root, args.max_seconds, args.workers)

if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; once that is mended (is the disk full?) the same command goes on where it was")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
