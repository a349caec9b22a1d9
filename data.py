"""
Audio in, batches out. Any collection of sounds becomes a pack: one folder of int16, 16 kHz, mono samples.

    python data.py toy --out packs/toy                                     # built-in sounds, made in seconds
    python data.py csv meta.csv --root DIR --out packs/mine                # any table with a path column
    python data.py folder DIR --out packs/mine                             # class per folder, or an unlabelled tree
    python data.py stats packs/mine                                        # hours, classes, splits, fbank mean and std

A pack: audio-00000.bin ... (clips end to end), index.npy (where each clip is), clips.csv (path, labels, split, group),
pack.json (classes, hours, fbank statistics, skipped files with reasons). It appears under its name when it is whole.
"""
import argparse
import csv
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError
from model import BANDS, FRAME, HOP, MIN_SAMPLES, PATCH, SAMPLE_RATE, fbank, num_tokens

ROW = PATCH * HOP                   # samples from one patch row to the next
SHARD_BYTES = 4 * 2**30
SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff", ".au", ".w64", ".caf"}
INDEX = np.dtype([("shard", "i4"), ("offset", "i8"), ("samples", "i4"), ("row", "i4")])     # row: line of clips.csv

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
            f.seek(first)
            x, rate = f.read(last - first, dtype="float32", always_2d=True).mean(1), f.samplerate
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        reason = getattr(error, "error_string", str(error)).strip(". ") if os.path.exists(path) else "no such file"
        raise UserError(f"{path}: cannot be read as audio ({reason})") from None
    if not np.isfinite(x).all():
        raise UserError(f"{path}: holds NaN or infinite samples")
    return resample(x, rate)

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

def write_pack(out, rows, read, classes=None, source="", max_seconds=10.0, workers=None):
    """Write a pack. rows: list of dicts with path, labels (list), split, group; read(row) -> (n,) float32 at 16 kHz.

    Clips longer than max_seconds are cut. A row whose read raises UserError, or that is shorter than one patch row
    (0.175 s), is skipped and listed with its reason.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another --out")
    classes = sorted({label for row in rows for label in row["labels"]}) if classes is None else list(classes)
    unknown = {label for row in rows for label in row["labels"]} - set(classes)
    if unknown:
        raise UserError(f"{len(unknown)} labels are not in the class list, {sorted(unknown)[0]!r} the first")
    if any(";" in label for label in classes):
        raise UserError(f"the class name {next(c for c in classes if ';' in c)!r} holds a semicolon, which separates labels; rename it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def decode(row):
        try:
            x = read(row)
            if len(x) < MIN_SAMPLES:
                raise UserError(f"{row['path']}: {len(x) / SAMPLE_RATE:.3f} s is shorter than one patch (0.175 s)")
            return (x * 32768).round().clip(-32768, 32767).astype("<i2")
        except UserError as error:
            return str(error)

    index, skipped, rests, shard, offset, f, digest = [], [], 0, -1, SHARD_BYTES, None, hashlib.sha256()
    longest = int(max_seconds * SAMPLE_RATE)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:     # soundfile decodes outside the interpreter lock
        size = 8 * (workers or os.cpu_count())      # decoded ahead of the writing
        chunks = (rows[i:i + size] for i in range(0, len(rows), size))
        clips = (clip for chunk in chunks for clip in pool.map(decode, chunk))
        for number, clip in enumerate(tqdm(clips, total=len(rows), desc=f"packing {out.name}", unit="file", disable=None)):
            if isinstance(clip, str):
                skipped.append({"path": rows[number]["path"], "reason": clip})
                continue
            for piece in (clip[i:i + longest] for i in range(0, len(clip), longest)):
                if len(piece) < MIN_SAMPLES:        # a rest after cutting, less than a patch
                    rests += 1
                    continue
                if offset + len(piece) > SHARD_BYTES // 2:
                    shard, offset = shard + 1, 0
                    f = f and f.close()
                    f = open(partial / f"audio-{shard:05d}.bin", "wb")
                f.write(piece.tobytes())
                digest.update(piece.tobytes())
                index.append((shard, offset, len(piece), number))
                offset += len(piece)
    if f is None:
        shutil.rmtree(partial)
        raise UserError(f"{source}: no usable audio" + (f"; {len(skipped)} files skipped, the first: {skipped[0]['reason']}"
                                                         if skipped else ""))
    f.close()
    np.save(partial / "index.npy", np.array(index, INDEX))
    with open(partial / "clips.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["path", "labels", "split", "group"])
        table.writerows([r["path"], ";".join(r["labels"]), r["split"], r["group"]] for r in rows)
    info = dict(version=1, source=str(source), classes=classes, clips=len(index),
                hours=round(sum(i[2] for i in index) / SAMPLE_RATE / 3600, 4), audio_sha256=digest.hexdigest(), skipped=skipped, rests_dropped=rests)
    (partial / "pack.json").write_text(json.dumps(info))
    mean, std, used = fbank_stats(Pack(partial))
    info |= dict(fbank_mean=mean, fbank_std=std, fbank_clips=used)
    (partial / "pack.json").write_text(json.dumps(info, indent=1))
    os.replace(partial, out)
    print(f"{out}: {len(index)} clips, {info['hours']:.2f} h, {len(classes)} classes, fbank {mean:.3f} +- {std:.3f}"
          + (f"; {len(skipped)} files skipped, listed in {out / 'pack.json'}, the first: {skipped[0]['reason']}" if skipped else ""))
    return Pack(out)

def fbank_stats(pack, clips=2000):
    """Mean and standard deviation over all fbank values of up to `clips` evenly spaced clips."""
    chosen = np.unique(np.linspace(0, len(pack) - 1, min(clips, len(pack))).astype(int))
    n, total, squares = 0, 0.0, 0.0
    for i in tqdm(chosen, desc="fbank statistics", unit="clip", disable=None, leave=False):
        x = fbank(torch.from_numpy(pack.audio(i) / np.float32(32768))[None]).double()
        n, total, squares = n + x.numel(), total + x.sum().item(), squares + x.square().sum().item()
    return total / n, math.sqrt(squares / n - (total / n)**2), len(chosen)

class Pack:
    """An opened pack. Audio stays on disk (memory-mapped) and is shared between processes."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.info = json.loads((self.path / "pack.json").read_text())
            self.index = np.load(self.path / "index.npy")
        except (OSError, ValueError):
            raise UserError(f"{path} is not a pack (no readable pack.json and index.npy); make one: "
                            "python data.py folder DIR --out PACK") from None
        self.classes = self.info["classes"]
        self.samples = self.index["samples"]
        self.shards = []
        for shard in range(self.index["shard"].max() + 1):
            name = self.path / f"audio-{shard:05d}.bin"
            last = self.index[self.index["shard"] == shard][-1]
            size, due = name.stat().st_size if name.exists() else 0, 2 * int(last["offset"] + last["samples"])
            if size != due:
                raise UserError(f"{name}: {size} bytes instead of {due}; the pack is damaged, pack {self.info['source']} again")
            self.shards.append(np.memmap(name, "<i2", "r"))

    def __reduce__(self):               # a worker process opens the files itself
        return Pack, (str(self.path),)

    def __len__(self):
        return len(self.index)

    def audio(self, i, start=0, samples=None) -> np.ndarray:
        """Clip i, or `samples` of it from `start` on: (n,) int16, a view of the file."""
        clip = self.index[i]
        first = clip["offset"] + start
        last = clip["offset"] + min(clip["samples"], clip["samples"] if samples is None else start + samples)
        return self.shards[clip["shard"]][first:last]

    def table(self):
        """labels: per clip a list of class numbers; split, group: arrays of str."""
        number = {name: i for i, name in enumerate(self.classes)}
        with open(self.path / "clips.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        rows = [rows[i] for i in self.index["row"]]
        return ([[number[label] for label in r["labels"].split(";") if label] for r in rows],
                np.array([r["split"] for r in rows]), np.array([r["group"] for r in rows]))

def open_packs(spec: str):
    """ "packs/a:0.4,packs/b:0.6" -> [Pack, Pack], [0.4, 0.6]: shares of the sampled seconds; None without weights."""
    parts = [part.rpartition(":") if ":" in part else (part, ":", "") for part in spec.split(",")]
    packs = [Pack(path) for path, _, _ in parts]
    try:
        weights = [float(w) for _, _, w in parts if w]
    except ValueError:
        raise UserError(f"--data {spec}: weights are numbers, as in packs/a:0.4,packs/b:0.6") from None
    if weights and (len(weights) < len(packs) or min(weights) <= 0):
        raise UserError(f"--data {spec}: give every pack a positive weight, or none")
    return packs, np.array(weights) / sum(weights) if weights else None

# -----------------------------------------------------------------------------
# batches: what they hold is a pure function of (seed, epoch, number), whatever the number of workers

class Clips(torch.utils.data.Dataset):
    """Clips of one or more packs, numbered through. An item is asked for as (clip, *key); all chance is drawn from key.

    crop: samples of a random crop, 0 = whole clips, starting at a multiple of `align` samples.
    tokens: per pack an array of tokens, one row of 8 per patch row, and where each clip's begin; cropped alike.
    """

    def __init__(self, packs, crop=0, align=HOP, tokens=None):
        self.packs, self.crop, self.align, self.tokens = packs, crop, align, tokens
        self.first = np.cumsum([0] + [len(p) for p in packs])
        self.samples = np.concatenate([p.samples for p in packs])
        if crop:
            self.samples = np.minimum(self.samples, crop)

    def __getitem__(self, item):
        clip, *key = item
        rng = np.random.default_rng(key)
        p = np.searchsorted(self.first, clip, side="right") - 1
        i = clip - self.first[p]
        spare = int(self.packs[p].samples[i]) - self.crop if self.crop else 0
        start = rng.integers(spare // self.align + 1) * self.align if spare > 0 else 0
        wav = self.packs[p].audio(i, start, self.crop or None)
        sample = dict(clip=clip, wav=wav, noise=rng.random(num_tokens(len(wav)), dtype=np.float32))
        if self.tokens:
            first = self.tokens[p][1][i] + start // ROW * BANDS
            sample["tokens"] = self.tokens[p][0][first:first + len(sample["noise"])].astype(np.int64)
        return sample

def collate(items):
    """Dict of tensors: wav (B, n) int16 zero-padded, lengths (B,), clip (B,), noise (B, T), tokens (B, T), -1 padded.

    n ends with the last patch row of the longest clip: no frame is computed that no patch uses.
    """
    rows = max(len(item["noise"]) for item in items) // BANDS
    n = (rows * PATCH - 1) * HOP + FRAME
    wav, lengths = pad_batch([item["wav"][:n] for item in items])
    batch = dict(wav=F.pad(wav, (0, n - wav.shape[1])), lengths=lengths, clip=torch.tensor([int(i["clip"]) for i in items]))
    for key, fill in (("noise", 2.0), ("tokens", -1)):
        if key in items[0]:
            batch[key] = torch.stack([F.pad(torch.from_numpy(i[key]), (0, rows * BANDS - len(i[key])), value=fill) for i in items])
    return batch

def epoch_batches(samples, batch_samples, key, subsets=None, weights=None, multiple=1, shuffle=True):
    """One epoch as a list of arrays of clip numbers, each at most batch_samples of (padded) audio.

    samples: (clips,) lengths; subsets: per pack an array of the clips to use; weights: per pack its share of the sampled
    seconds (None: each clip once). key: ints that decide the order. multiple: clips per batch are a multiple of it
    (the number of ranks); the epoch's last batch is filled up with its first clips.
    Clips are sorted by length within stretches of some 20 batches, so that a batch has little padding.
    """
    rng = np.random.default_rng(key)
    subsets = [np.arange(len(samples))] if subsets is None else subsets
    if not sum(map(len, subsets)):
        return []
    seconds = sum(samples[s].sum(dtype=np.int64) for s in subsets)
    order, due = [], []
    for p, subset in enumerate(subsets):        # every clip gets the time it is due at; packs advance in step
        due_seconds = weights[p] * seconds if weights is not None else 0
        times = max(1, math.ceil(due_seconds / samples[subset].sum(dtype=np.int64)))
        clips = np.concatenate([rng.permutation(subset) if shuffle else subset for _ in range(times)])
        time = np.cumsum(samples[clips], dtype=np.float64)
        if weights is not None:
            n = max(1, np.searchsorted(time, due_seconds * (1 + 1e-9), side="right"))
            clips, time = clips[:n], time[:n]
        order.append(clips)
        due.append(time / time[-1])
    order = np.concatenate(order)[np.argsort(np.concatenate(due), kind="stable")]
    if multiple > 1:
        order = np.concatenate([order, np.resize(order, -len(order) % multiple)])
    mean = max(1, int(batch_samples // samples[order].mean()))
    batches = []
    size = 20 * max(1, mean // multiple) * multiple
    for stretch in np.split(order, np.arange(size, len(order), size)):
        stretch = stretch[np.argsort(-samples[stretch], kind="stable")]
        while len(stretch):
            count = max(1, int(batch_samples // samples[stretch[0]]))
            count = max(multiple, count // multiple * multiple)
            batches.append(stretch[:count])
            stretch = stretch[count:]
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches

class Stream(torch.utils.data.Sampler):
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
                yield [(batches[k][j], self.seed, epoch, position[k] + j) for j in mine]
            epoch, number = epoch + 1, 0

    def after(self, start):
        """The place of the batch that follows the one at `start`."""
        epoch, number = start
        return (epoch, number + 1) if number + 1 < len(self.plan(epoch)) else (epoch + 1, 0)

def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach the workers too; it is the training process that decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def loader(dataset, batches, workers=0):
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, worker_init_fn=ignore_signals,
                                       pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)

def to_device(batch, device):
    """Tensors to the device, without waiting for it; wav becomes float32 in [-1, 1]."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    batch["wav"] = batch["wav"].float() / 32768
    return batch

def split_batch(batch, device_seconds):
    """Micro-batches of at most device_seconds of audio each; 0 = the batch as it is."""
    size = max(1, int(device_seconds * SAMPLE_RATE // batch["wav"].shape[1])) if device_seconds else len(batch["wav"])
    return [dict(zip(batch, values)) for values in zip(*(v.split(size) for v in batch.values()))]

def fixed_batches(clips, subsets, batch_seconds, seed, most=None, number=0, share=slice(None)):
    """A loader of (the first `most`) batches whose crops and noise are the same at every pass. share: this rank's clips."""
    batches = epoch_batches(clips.samples, batch_seconds * SAMPLE_RATE, (seed, number), [np.concatenate(subsets)])
    batches = [[(i, seed, number, i) for i in batch[share]] for batch in batches[:most]]
    return loader(clips, [batch for batch in batches if batch])

def hold_out(packs, share=0.05, most=400, seed=0):
    """Split every pack's clips by source file into (train, valid) lists of global clip numbers."""
    train, valid, first = [], [], 0
    for pack in packs:
        rows = np.unique(pack.index["row"])
        held = np.random.default_rng(seed).permutation(rows)[:min(most, math.ceil(share * len(rows)))]
        mask = np.isin(pack.index["row"], held) & (len(rows) > 1)
        clips = first + np.arange(len(pack))
        train.append(clips[~mask])
        valid.append(clips[mask])
        first += len(pack)
    return train, valid

# -----------------------------------------------------------------------------
# built-in sounds

TOY_CLASSES = ["chirp_up", "chirp_down", "siren", "clicks", "pluck", "vowel", "burst", "tremolo", "trill", "drum"]

def toy_clip(rng, kind, seconds=3.0):
    """One sound of a class at random pitch, time, level and timbre, over coloured noise. (n,) float32.

    Classes differ in what happens over time; pitch ranges, loudness and colour overlap, so that the average spectrum
    says little.
    """
    n = int(seconds * SAMPLE_RATE)
    length = int(rng.uniform(0.5, 1.0) * n) // 1600 * 1600     # a length that the FFT likes
    t = np.arange(length) / SAMPLE_RATE
    pitch = 150 * 2**rng.uniform(0, 4)                  # Hz
    tone = lambda hz: sum(np.sin(2 * np.pi * h * np.cumsum(hz) / SAMPLE_RATE + rng.uniform(0, 6)) / h**rng.uniform(0.7, 2)
                          for h in range(1, 5)) * np.ones(length)
    pulses = lambda rate, jitter: np.cumsum(rng.uniform(1 - jitter, 1 + jitter, 200) * SAMPLE_RATE / rate).astype(int)
    if kind in ("chirp_up", "chirp_down"):              # a glide of one to two octaves, repeated
        phase = (t * rng.uniform(1, 3) + rng.uniform()) % 1
        x = tone(pitch * 2**(rng.uniform(1, 2) * (phase if kind == "chirp_up" else 1 - phase)))
    elif kind == "siren":                               # pitch goes up and down
        x = tone(pitch * 2**(rng.uniform(0.5, 1) * (1 + np.sin(2 * np.pi * rng.uniform(0.7, 2) * t))))
    elif kind == "trill":                               # jumps between two pitches
        x = tone(pitch * 2**(rng.uniform(0.3, 1.5) * (np.sin(2 * np.pi * rng.uniform(3, 8) * t) > 0)))
    elif kind == "tremolo":                             # steady pitch, moving level
        x = tone(pitch * np.ones(length)) * (1 + np.sin(2 * np.pi * rng.uniform(3, 8) * t))
    elif kind in ("clicks", "pluck", "drum"):           # trains of short events
        x = np.zeros(length)
        for start in pulses(rng.uniform(2, 6), 0.3):
            if start >= length:
                break
            s = np.arange(min(length - start, SAMPLE_RATE)) / SAMPLE_RATE
            if kind == "clicks":
                event = np.exp(-s * 400) * rng.standard_normal(len(s))
            elif kind == "pluck":
                event = sum(np.exp(-s * h * rng.uniform(4, 8)) * np.sin(2 * np.pi * h * pitch * s) / h for h in range(1, 6))
            else:
                event = np.exp(-s * 12) * (np.sin(2 * np.pi * pitch / 3 * (s - 0.4 * s**2).clip(0)) + 0.5 * rng.standard_normal(len(s)))
            x[start:start + len(s)] += event * rng.uniform(0.5, 1)
    elif kind == "vowel":                               # a voice: harmonics under moving formants, in syllables
        f0 = rng.uniform(90, 250) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 3) * t))
        phase, x = np.cumsum(f0) / SAMPLE_RATE, np.zeros(length)
        formants = [rng.uniform(300, 900), rng.uniform(900, 2300), rng.uniform(2300, 3200)]
        for h in range(1, 25):
            x += np.sin(2 * np.pi * h * phase) * sum(np.exp(-((h * f0[::160] - f) / 150)**2) for f in formants).repeat(160)
        x = x * (np.sin(2 * np.pi * rng.uniform(1.5, 3) * t) > rng.uniform(-0.7, 0))
    else:                                               # bursts of band-passed noise
        x = coloured(rng, length, pitch * 2) * np.sin(np.pi * t * rng.uniform(1, 4))**2
    y = np.zeros(n)
    start = rng.integers(n - length + 1)
    y[start:start + length] = coloured(rng, length, 0, x)
    y /= np.sqrt((y**2).mean()) + 1e-9
    noise = coloured(rng, n, 300 * 2**rng.uniform(0, 4), width=rng.uniform(0.7, 3))
    y = y + noise * 10**(-rng.uniform(3, 20) / 20)      # 3 to 20 dB over the background
    return (y / np.abs(y).max() * 10**(-rng.uniform(0, 30) / 20) * 0.99).astype(np.float32)

def coloured(rng, n, centre, x=None, width=0.7):
    """x (white noise if None) through a random smooth equaliser, or a band around centre Hz; unit level."""
    spectrum = np.fft.rfft(rng.standard_normal(n) if x is None else x)
    octaves = np.log2(np.fft.rfftfreq(n, 1 / SAMPLE_RATE).clip(20) / (centre or 1))
    gain = np.exp(-0.5 * (octaves / width)**2) if centre else 10**(np.interp(octaves, np.linspace(4, 13, 8), rng.uniform(-10, 10, 8)) / 20)
    x = np.fft.irfft(spectrum * gain, n)
    return x / (np.sqrt((x**2).mean()) + 1e-9)

def make_toy(out, clips=1600, seed=0):
    """Ten classes of made sounds, 3 s each, 80 minutes: 3/4 train, 1/4 test. A function of the seed."""
    rows = [dict(path=f"toy-{i:05d}", labels=[TOY_CLASSES[i % 10]], split="test" if i % 40 < 10 else "train", group="", number=i)
            for i in range(clips)]
    return write_pack(out, rows, lambda row: toy_clip(np.random.default_rng([seed, row["number"]]), row["labels"][0]),
                      TOY_CLASSES, source="toy")

# -----------------------------------------------------------------------------
# recipes

def rows_from_csv(table, root=None, columns=None, keep=None):
    """A table with a header: path, and if there are label (several separated by ; or ,), split or fold, group, start, end."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, skipinitialspace=True)
            lines, header = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: cannot be read as a table ({error})") from None
    names = {"path": ["path", "file", "filename", "wav"], "label": ["label", "labels", "category", "class"],
             "split": ["split", "fold", "fold_or_split"], "group": ["group", "speaker"], "start": ["start"], "end": ["end"]}
    found = {key: next((n for n in options if n in header), None) for key, options in names.items()} | (columns or {})
    if found["path"] is None:
        raise UserError(f"{table}: no column named {', '.join(names['path'])}; its header is {header}; try --path_column NAME")
    for name in filter(None, (columns or {}).values()):
        if name not in header:
            raise UserError(f"{table}: no column named {name}; its header is {header}")
    root = Path(root or Path(table).parent)
    rows, seen = [], set()
    for number, line in enumerate(lines, start=2):
        get = lambda key: (line[found[key]] or "").strip() if found[key] else ""
        try:
            start, end = float(get("start") or 0), float(get("end")) if get("end") else None
        except ValueError:
            raise UserError(f"{table}, line {number}: start and end are seconds, not {get('start')!r}, {get('end')!r}") from None
        if start < 0 or (end is not None and end <= start):
            raise UserError(f"{table}, line {number}: a clip cannot go from {start} s to {end} s")
        if (get("path"), start, end) in seen:
            raise UserError(f"{table}, line {number}: {get('path')} stands there twice")
        seen.add((get("path"), start, end))
        separator = ";" if ";" in get("label") else ","
        labels = [label.strip() for label in get("label").split(separator) if label.strip()]
        rows.append(dict(path=get("path"), labels=labels, split=get("split"), group=get("group"),
                         file=root / get("path"), start=start, end=end))
    if keep:
        rows = [row for row in rows if row["split"] in keep.split(",")]
    if not rows:
        raise UserError(f"{table}: no rows" + (f" with split {keep}" if keep else ""))
    return rows

def rows_from_folder(root):
    """Every audio file below root; if all lie one folder deep, the folder is the class."""
    files = sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise UserError(f"{root}: {'no audio files below it' if Path(root).is_dir() else 'no such folder'} ({' '.join(sorted(SUFFIXES))})")
    labelled = all(len(p.relative_to(root).parts) == 2 for p in files)
    return [dict(path=str(p.relative_to(root)), labels=[p.parent.name] if labelled else [], split="", group="",
                 file=p, start=0.0, end=None) for p in files]

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="built-in sounds of ten classes")
    toy.add_argument("--clips", type=int, default=1600, help="3 s each [1600]")
    toy.add_argument("--seed", type=int, default=0, help="[0]")
    table = commands.add_parser("csv", help="a table with a path column")
    table.add_argument("table")
    table.add_argument("--root", help="folder that the paths start from [that of the table]")
    table.add_argument("--keep", help="only these splits or folds, as in 1,2,3,4 [all]")
    for name in ("path", "label", "split", "group"):
        table.add_argument(f"--{name}_column", f"--{name}-column", help=f"header of the {name} column [found by name]")
    folder = commands.add_parser("folder", help="class per folder, or an unlabelled tree")
    folder.add_argument("root")
    for command in (toy, table, folder):
        command.add_argument("--out", required=True, help="the pack to make")
    for command in (table, folder):
        command.add_argument("--max_seconds", "--max-seconds", type=float, default=10.0, help="longer clips are cut [10]")
    stats = commands.add_parser("stats", help="what is in a pack")
    stats.add_argument("pack")
    args = parser.parse_args(argv)
    read = lambda row: read_audio(row["file"], row["start"], row["end"])
    if args.command == "toy":
        make_toy(args.out, args.clips, args.seed)
    elif args.command == "csv":
        columns = {n: getattr(args, f"{n}_column") for n in ("path", "label", "split", "group") if getattr(args, f"{n}_column")}
        write_pack(args.out, rows_from_csv(args.table, args.root, columns, args.keep), read, source=args.table, max_seconds=args.max_seconds)
    elif args.command == "folder":
        write_pack(args.out, rows_from_folder(args.root), read, source=args.root, max_seconds=args.max_seconds)
    else:
        pack = Pack(args.pack)
        labels, split, group = pack.table()
        counts = lambda values: ", ".join(f"{v or '(none)'} {n}" for v, n in zip(*np.unique(values, return_counts=True)))
        print(f"{args.pack}: {len(pack)} clips of {pack.samples.min() / SAMPLE_RATE:.2f} to {pack.samples.max() / SAMPLE_RATE:.2f} s, "
              f"{pack.info['hours']:.2f} h from {pack.info['source']}\nfbank mean {pack.info['fbank_mean']:.5f} std "
              f"{pack.info['fbank_std']:.5f} over {pack.info['fbank_clips']} clips\nsplits: {counts(split)}\n{len(np.unique(group))} groups\n"
              f"classes: {counts([pack.classes[c] for row in labels for c in row]) or '(none)'}\n{len(pack.info['skipped'])} files skipped, "
              f"{pack.info['rests_dropped']} rests of under 0.175 s left out when cutting long files")
        for item in pack.info["skipped"]:
            print("  " + item["reason"])

if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; no pack was made")
