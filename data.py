"""
Audio in, batches out. Any collection of sounds becomes a pack: one folder of int16, 16 kHz, mono samples.

    python data.py folder DIR --out packs/mine                  # class per folder, or an unlabelled tree
    python data.py csv meta.csv --root DIR --out packs/mine     # any table with a path column
    python data.py esc50 ESC-50-master --out packs/esc50        # known data sets: one file each in recipes/
    python data.py toy --out packs/toy                          # built-in sounds
    python data.py stats packs/mine                             # hours, classes, splits, fbank mean and std
    python data.py check packs/mine                             # every clip against its checksum

A pack: audio-00000.bin ... (clips end to end), index.npy (where each clip is), clips.csv (path, labels,
split, group of each recording), skipped.csv (which were left out, and why), notes.csv (what else packing did
to a recording), pack.json (classes, hours, fbank statistics). It appears under its name when it is whole; a
packing that was stopped or killed goes on where it was when the same command is typed again.
"""

import hashlib
import math
import os
import sys
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from audio import (
    BANDS,
    HOP,
    ROW,
    SAMPLE_RATE,
    num_tokens,
    rows_in,
    samples_of,
    valid_tokens
)
from common import UserError, autocast, barrier, check, rank, world, write_whole
from recipes import packs
from recipes.from_toy import make_toy, toy_pack
from recipes.packs import Pack, hold_out, in_order, may_train, open_packs, write_pack

RUN = 500  # clips in a file of codes: what a killed job does again

HELD_OUT = 4000  # seconds of a pack that are never trained on, at most
EVALUATED = 10  # an evaluation hears the audio of so many steps at most: little beside the 250 between two

# -----------------------------------------------------------------------------
# clips and batches


class Clips:
    """Clips of one or more packs, numbered through.

    Asked for a list of (clip, *key), it gives a batch; all chance is drawn from the keys. With `crop`
    samples, clips are random crops of that length. codes: per pack, if there are any, what
    cached_codes returns. round_rows: batches end at a multiple of so many patch rows, or with the
    longest clip of all, so that a compiled model meets few lengths.

    Of a pack it uses samples, gain, read_into, info, index["row"] and len(): sounds that are not packed
    need a class with these.
    """

    def __init__(self, packs, crop=0):
        self.packs, self.crop, self.codes = packs, crop, []
        self.first = np.cumsum([0] + [len(pack) for pack in packs])
        self.samples = np.concatenate([pack.samples for pack in packs])
        self.gain = np.concatenate([pack.gain for pack in packs])
        if crop:
            self.samples = np.minimum(self.samples, crop)
        self.round_rows, self.most_rows = 1, rows_in(self.samples.max())

    def __getitem__(self, items):
        """Return a dict of tensors.

        wav (B, n) int16, zero-padded; gain (B,), what makes it a sound; lengths (B,) samples; clip (B,)
        numbers; noise (B, T), uniform numbers of the clip's own, for masks and the like; and codes (B, T),
        -1 padded, if there are any.
        n ends with the last patch row of the longest clip, or a few later (round_rows): no frame is
        computed that no patch uses.
        """
        numbers = np.array([clip for clip, *_ in items])
        lengths = self.samples[numbers].astype(np.int64)
        rows = rows_in(lengths.max())
        lengths = np.minimum(lengths, samples_of(rows))
        rows = min(self.most_rows, -(-rows // self.round_rows) * self.round_rows)
        wav = np.empty((len(items), samples_of(rows)), np.int16)
        noise = np.empty((len(items), rows * BANDS), np.float32)
        codes = np.full(noise.shape, -1)

        for row, (clip, *key) in enumerate(items):
            random = np.random.default_rng(key)
            self.read(clip, random, wav[row, : lengths[row]], codes[row])
            wav[row, lengths[row] :] = 0
            # the clip's own T numbers are the same in any batch
            random.random(out=noise[row], dtype=np.float32)

        batch = dict(wav=wav, lengths=lengths, clip=numbers, noise=noise)
        batch["gain"] = self.gain[numbers]
        if self.codes:
            batch["codes"] = codes
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def read(self, clip, random, wav, codes):
        """Fill wav (n,) with a clip or a random crop of it, and codes (T,) with those of its patches."""
        pack = np.searchsorted(self.first, clip, side="right") - 1
        i, start = clip - self.first[pack], 0
        surplus = self.packs[pack].samples[i] - self.crop
        if self.crop and surplus > 0:
            align = ROW if self.codes else HOP
            start = int(random.integers(surplus // align + 1)) * align
        self.packs[pack].read_into(wav, i, start)
        if self.codes:
            tokens = num_tokens(len(wav))
            first, file = start // ROW * BANDS, self.codes[pack][i // RUN]
            codes[:tokens] = file[i % RUN, first : first + tokens]


def cut(order, fits, multiple=1):
    """Cut an order of clips into batches. fits(first): how many a batch can take from there on.

    Each batch but the last has the nearest multiple of `multiple` clips (the ranks), and none has fewer.
    The last two share their clips where the last would have less than half as many as the one before.
    """
    batches, first = [], 0
    while first < len(order):
        last = first + max(multiple, round(fits(first) / multiple) * multiple)
        if len(order) - last < multiple:  # no rest that leaves a rank without a clip
            last = len(order)
        batches.append(order[first:last])
        first = last

    if len(batches) > 1 and len(batches[-1]) < len(batches[-2]) / 2:
        rest = order[-len(batches[-2]) - len(batches[-1]) :]
        half = round(len(rest) / 2 / multiple) * multiple
        batches[-2:] = rest[:half], rest[half:]
    return batches


def by_length(samples, order, batch_samples, multiple=1):
    """Cut clips into batches of some batch_samples of padded audio, from long to short. See cut."""
    order = order[np.argsort(-samples[order], kind="stable")]
    return cut(order, lambda first: int(batch_samples // samples[order[first]]), multiple)


def epoch_batches(samples, batch_samples, key, clips=None, multiple=1):
    """Return one epoch as a list of arrays of clip numbers: each clip once, a function of key (ints).

    A batch has some batch_samples of padded audio, see cut, of clips of like length, from long to short:
    they are sorted within stretches of some 20 batches. samples: (clips,) lengths.
    """
    random = np.random.default_rng(key)
    order = random.permutation(np.arange(len(samples)) if clips is None else clips)
    if not len(order):
        return []
    order = np.resize(order, max(len(order), multiple))  # fewer clips than ranks: some come twice
    clips_of_rank = max(1, round(batch_samples / samples[order].mean() / multiple))
    stretch = 20 * clips_of_rank * multiple

    batches = []
    for part in np.split(order, np.arange(stretch, len(order) - stretch // 2, stretch)):
        batches += by_length(samples, part, batch_samples, multiple)
    return [batches[i] for i in random.permutation(len(batches))]


def mixed_batches(samples, batch_samples, key, subsets, weights, multiple=1):
    """Return as many seconds as all packs have, weights[p] of them from pack p, in batches.

    Each pack is a stream of its clips (subsets[p]), shuffled, again and again. A clip is due at (samples
    of its stream up to its middle) / weight; all streams are merged by that. So any run of batches holds
    each pack's share to within a clip or two.
    """
    random = np.random.default_rng(key)
    lengths = [samples[subset].sum(dtype=np.int64) for subset in subsets]
    merged, due = [], []
    for subset, length, weight in zip(subsets, lengths, weights):
        wanted = weight * sum(lengths)
        turns = [random.permutation(subset) for _ in range(math.ceil(wanted / length))]
        stream = np.concatenate(turns)
        heard = np.cumsum(samples[stream], dtype=np.float64)
        count = max(1, (heard <= wanted * (1 + 1e-9)).sum())
        merged.append(stream[:count])
        due.append((heard - samples[stream] / 2)[:count] / weight)
    order = np.concatenate(merged)[np.argsort(np.concatenate(due), kind="stable")]
    order = np.resize(order, max(len(order), multiple))

    heard = np.concatenate([[0], np.cumsum(samples[order], dtype=np.float64)])

    def fits(first):
        full = heard[first] + batch_samples * (1 + 1e-9)
        return np.searchsorted(heard, full, side="right") - 1 - first

    batches = cut(order, fits, multiple)
    return [batch[np.argsort(-samples[batch], kind="stable")] for batch in batches]


def deal(plan, seed, place=(0, 0)):
    """Yield endlessly what this rank hears, and the place after it: a pure function of the arguments.

    plan(epoch): list of batches; place: (epoch, number of the batch) to begin with. Heard is a list of
    (clip, seed, epoch, position in epoch).
    """
    epoch, number = place
    while True:
        batches, position = plan(epoch), 0
        for this, batch in enumerate(batches):
            if this >= number:
                items = [(clip, seed, epoch, i) for i, clip in enumerate(batch.tolist(), position)]
                after = (epoch, this + 1) if this + 1 < len(batches) else (epoch + 1, 0)
                yield items[rank() :: world()], after
            position += len(batch)
        epoch, number = epoch + 1, 0


def load_batches(clips, dealt, workers=1):
    """Yield the batches of (items, place after) pairs, made ahead by threads.

    batch["next"] is the place after it, batch["seconds"] its padded audio.
    """

    def make(pair):
        items, after = pair
        batch = clips[items]
        if torch.cuda.is_available():
            batch = {name: values.pin_memory() for name, values in batch.items()}
        return batch | dict(next=after, seconds=batch["wav"].numel() / SAMPLE_RATE)

    return in_order(make, dealt, workers)


def to_device(batch, device):
    """Move a batch without waiting; wav becomes float32, by its gain (without one: that of full scale).

    Adds valid (B, T), and mask: valid, or None where no clip has padding that attention need look for.
    """
    n = batch["wav"].shape[1]
    padded = (num_tokens(batch["lengths"]) < num_tokens(n)).any()
    batch = {
        name: values.to(device, non_blocking=True) if torch.is_tensor(values) else values
        for name, values in batch.items()
    }
    wav, gain = batch["wav"].float(), packs.FULL_SCALE
    if "gain" in batch:
        gain = batch["gain"][:, None]
    valid = valid_tokens(batch["lengths"], n)
    return batch | dict(wav=wav * gain, valid=valid, mask=valid if padded else None)


def split_batch(batch, seconds, round_rows=1):
    """Split into parts of at most `seconds` of padded audio, cut to their longest clip.

    The clips of a batch go from long to short. round_rows: as in Clips.
    """
    rows = -(-rows_in(batch["lengths"]) // round_rows) * round_rows
    rows = rows.clamp(max=rows_in(batch["wav"].shape[1])).tolist()
    parts = []
    most = seconds * SAMPLE_RATE // ROW
    for part in cut(range(len(rows)), lambda first: int(most // rows[first])):
        tokens = rows[part.start] * BANDS
        width = dict(wav=samples_of(rows[part.start]), noise=tokens, codes=tokens)
        tensors = {}
        for name, values in batch.items():
            if torch.is_tensor(values):
                tensors[name] = values[part.start : part.stop]
            if name in width:
                tensors[name] = tensors[name][:, : width[name]]
        parts.append(tensors)
    return parts


def walk(pack, batches, device, text):
    """Yield batches of whole clips of a pack on the device. batches: list of arrays of clip numbers."""
    dealt = [([(clip,) for clip in batch.tolist()], None) for batch in batches]
    loaded = load_batches(Clips([pack]), dealt)
    for batch in tqdm(loaded, text, len(dealt), leave=False, disable=rank() > 0 or None):
        yield to_device(batch, device)


# -----------------------------------------------------------------------------
# what a training script samples from


class Sounds:
    """The sounds of --data: crops of training clips in batches, held-out clips, a sample.

    Batches are a pure function of (seed, epoch, number), on any number of ranks and threads. Clips that
    are there for testing are left out, see may_train.
    """

    def __init__(
        self, spec, crop_seconds, batch_seconds, seed=0, workers=1, splits="", leave_out=""
    ):
        self.packs, self.weights = open_packs(spec)
        self.chosen = [splits, leave_out]
        self.batch_seconds, self.seed, self.workers = batch_seconds, seed, workers
        self.batch_samples = batch_seconds * SAMPLE_RATE
        crop, rows = 0, round(crop_seconds * SAMPLE_RATE / ROW)
        if rows:
            crop = samples_of(rows)
            # a crop is 240 samples longer than its rows, and 16 of 2.56 s shall still fit into 41 s
            self.batch_samples *= crop / (rows * ROW)
        self.clips = Clips(self.packs, crop)

        split_of = [pack.table[1][pack.index["row"]] for pack in self.packs]
        there = sorted(set(np.concatenate(split_of).tolist()))
        for name in filter(None, f"{splits},{leave_out}".split(",")):
            check(
                name in there or name == "all",
                f"--splits, --leave_out: {spec} has no split {name}, but {', '.join(there)}"
            )

        self.train, self.valid = [], []  # per pack, clip numbers
        self.left_out, self.folds = Counter(), set()
        for pack, first, split in zip(self.packs, self.clips.first, split_of):
            recording, heard = pack.index["row"], may_train(split, splits, leave_out)
            self.left_out.update(split[~heard].tolist())
            self.folds.update(filter(str.isdigit, split[heard].tolist()))

            clips = first + np.flatnonzero(heard)
            held = hold_out(recording[heard], pack.samples[heard], seconds=HELD_OUT, seed=seed)
            self.train.append(clips[~held])
            self.valid.append(self.some(clips[held], EVALUATED * batch_seconds / len(self.packs)))
            check(
                len(self.train[-1]),
                f"{pack.path}: every clip is of a split that is not for training "
                f"({', '.join(sorted(set(split)))}); name those to hear, as in --splits test"
            )

    def some(self, clips, seconds):
        """Return at random so many seconds of clips, at least one of them."""
        clips = np.random.default_rng(self.seed).permutation(clips)
        heard = self.clips.samples[clips].cumsum() - self.clips.samples[clips]
        return np.sort(clips[heard < seconds * SAMPLE_RATE])

    def __str__(self):
        train, valid = sum(map(len, self.train)), sum(map(len, self.valid))
        names = [f"{count} of {name}" for name, count in sorted(self.left_out.items())]
        text = f"{train} clips to train on, {valid} to evaluate on, left out: {', '.join(names) or 'none'}"
        if self.folds and not self.left_out:
            text += f" (all folds are heard, {', '.join(sorted(self.folds))}; see --leave_out)"
        return text

    def ids(self):
        """Return what tells these sounds from others, for resuming: packs, and what of them is heard."""
        return [pack.id() for pack in self.packs] + self.chosen

    def mean_seconds(self):
        """Return the mean length of a crop."""
        return self.clips.samples.mean() / SAMPLE_RATE

    def names(self, clips):
        """Return the paths of the recordings that clips are of, for messages."""
        names = []
        for pack, first in zip(self.packs, self.clips.first):
            own = clips - first
            names += pack.names(own[(0 <= own) & (own < len(pack))])
        return names

    def fbank_stats(self):
        """Return mean and standard deviation of the filter bank, packs weighted as they are sampled.

        The squares of the packs' means add to the variance: they differ from pack to pack.
        """
        shares = self.weights
        if shares is None:
            shares = [max(pack.info["hours"], 1e-4) for pack in self.packs]
        means = np.array([pack.info["fbank_mean"] for pack in self.packs])
        stds = np.array([pack.info["fbank_std"] for pack in self.packs])
        mean = np.average(means, weights=shares)
        variance = np.average(stds**2 + (means - mean) ** 2, weights=shares)
        return dict(fbank_mean=float(mean), fbank_std=math.sqrt(variance))

    def plan(self, epoch, batch_samples=0):
        """Return the batches of an epoch, of all ranks."""
        samples, key = self.clips.samples, (self.seed, epoch)
        size, ranks = batch_samples or self.batch_samples, world()
        if self.weights is None:
            return epoch_batches(samples, size, key, np.concatenate(self.train), ranks)
        return mixed_batches(samples, size, key, self.train, self.weights, ranks)

    def batches(self, place=(0, 0)):
        """Yield this rank's batches without end; batch["next"] is the place to go on from after it."""
        return load_batches(self.clips, deal(self.plan, self.seed, place), self.workers)

    def parts(self, batch, device, device_seconds=0.0):
        """Split a batch into parts that the device can take (0 = all of it), and move them."""
        seconds = device_seconds or batch["seconds"]
        parts = split_batch(batch, seconds, self.clips.round_rows)
        return [to_device(part, device) for part in parts]

    def fixed(self, batches, device, number):
        """Yield this rank's part of batches, on the device, the same at every call."""
        for batch in batches:
            items = [(clip, self.seed, number, clip) for clip in batch.tolist()]
            yield to_device(self.clips[items[rank() :: world()]], device)

    def held_out(self, device):
        """Yield the held-out clips of this rank: the same crops and noise every time."""
        size, valid = 100 * SAMPLE_RATE * world(), np.concatenate(self.valid)
        batches = epoch_batches(self.clips.samples, size, (self.seed, 1), valid, world())
        return self.fixed(batches, device, number=1)

    def sample(self, device):
        """Yield up to 2,000 s of the training clips for each rank, mixed as in training, always the same."""
        batches = self.plan(0, 100 * SAMPLE_RATE * world())
        return self.fixed(batches[:20], device, number=0)


# -----------------------------------------------------------------------------
# codes of a frozen tokenizer, computed once

ANEW = "remove it, it is made again"


def cached_codes(tokenizer, pack, device, dtype="auto"):
    """Return the codes of a pack, computed by all ranks where they are not there yet.

    dtype: as in autocast; bfloat16 changes one code in two hundred. A list of mapped arrays, each of RUN
    clips, (clips, T of the longest) uint16. They lie beside the audio in codes-<hash of tokenizer, dtype and
    sounds>, in files that are whole or absent: a killed job goes on, and two jobs at once write the same.
    """
    with autocast(device, dtype):
        fast = torch.is_autocast_enabled(device.type)
    origin = f"{tokenizer.id()} {pack.info['id']} {'bfloat16' if fast else 'float32'}"
    key = hashlib.sha256(origin.encode()).hexdigest()[:16]
    folder = pack.path / f"codes-{key}"
    runs = np.split(np.arange(len(pack)), range(RUN, len(pack), RUN))
    paths = [folder / f"{number:05d}.npy" for number in range(len(runs))]
    try:
        folder.mkdir(exist_ok=True)
        share = np.array_split(range(len(runs)), world())[rank()]  # neighbours, for network disks
        for path, clips in [(paths[i], runs[i]) for i in share]:
            if not os.path.lexists(path):
                codes = codes_of(tokenizer, pack, clips, device, dtype)
                write_whole(path, lambda file: np.save(file, codes))
            most = open_codes(path, pack, clips).max()
            check(
                most < tokenizer.n_codes,
                f"{path}: holds code {most}, where there are {tokenizer.n_codes}; {ANEW}"
            )
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}; codes are kept beside the audio of a pack, "
            "in a folder that all ranks share and can write to"
        ) from None
    barrier()
    return [open_codes(path, pack, clips) for path, clips in zip(paths, runs)]


def open_codes(path, pack, clips):
    """Map the codes of successive clips. Raises UserError unless they can be these."""
    regular = path.is_file() and not path.is_symlink()
    check(regular, f"{path}: missing, or a link or a pipe instead of a file; {ANEW}")
    try:
        codes = np.load(path, mmap_mode="r").view(np.ndarray)
    except Exception as error:
        raise UserError(f"{path}: {error}; {ANEW}") from None
    longest = int(pack.samples[clips].max())
    shape = len(clips), num_tokens(longest)
    check(
        codes.dtype == np.uint16 and codes.shape == shape,
        f"{path}: {codes.dtype} of shape {codes.shape} instead of uint16 of {shape}; {ANEW}"
    )
    return codes


@torch.no_grad()
def codes_of(tokenizer, pack, clips, device, dtype):
    """Compute the codes of successive clips: (clips, T) uint16, zeros where a clip has fewer."""
    longest = num_tokens(pack.samples[clips].max())
    codes = np.zeros((len(clips), longest), np.uint16)
    batches = by_length(pack.samples, clips, 200 * SAMPLE_RATE)
    text = f"codes of {pack.path.name} from clip {clips[0]} on"
    for batch in walk(pack, batches, device, text):
        with autocast(device, dtype):
            some = tokenizer.encode(batch["wav"], batch["lengths"]).clamp(min=0).cpu()
        codes[batch["clip"].cpu().numpy() - clips[0], : some.shape[1]] = some
    return codes


def main(argv=None):
    packs.main(__doc__, argv)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be of any bytes
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        os._exit(0)  # who reads the lines has had enough of them, as `head` has
    except OSError as error:
        sys.exit(
            f"error: {error}; once that is mended (is the disk full?) the same command goes on"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
