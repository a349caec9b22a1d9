"""
Classes, features or codes of sounds, by any checkpoint, ours or released. Packs are not needed.

    python -m tools.infer CLASSIFIER.pt clip.wav folder/        # the most probable classes
    python -m tools.infer CLASSIFIER.pt day.flac --per_window   # ... of windows of 10 s, one every 5 s
    python -m tools.infer ENCODER.pt clip.wav --out features    # features/clip.npy: (tokens, D)
    python -m tools.infer ENCODER.pt folder/ --pool             # folder/*.npy: (D,), mean over the recording
    python -m tools.infer TOKENIZER.pt folder/ --out codes      # codes/*.npy: (tokens,)

Tokens are 8 bands per 160 ms, low to high: row i stands at i * 160 + 87.5 ms, however long the recording.
It is heard in windows, of which no more than a few are in memory. export_program(model) makes an encoder or
classifier a program of its own, by torch.export.
"""

import os
import struct
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
from audio import (
    BANDS,
    ORDINARY,
    ROW,
    SAMPLE_RATE,
    audio_files,
    constants_on,
    printable,
    read_pieces,
    rows_in,
    windows
)
from common import UserError, check, write_whole
from model import Classifier, masked_mean
from tokenizer import Tokenizer, load_any

@dataclass
class Config:
    out: str = ""               # folder of the .npy files; none = beside the sounds
    top: int = 5                # classes to print
    class_csv: str = ""         # AudioSet's class_labels_indices.csv, to print names
    features: bool = False      # write features, also of a classifier
    layer: int = -1             # features after this block, 0 = before the first, -1 = the last
    pool: bool = False          # features averaged over time
    window: float = 10.0        # seconds into which recordings are cut, in whole patch rows (0.16 s)
    hop: float = 0.0            # seconds from a window to the next; 0 = a window, for classes half of one
    per_window: bool = False    # a result per window, not per recording
    fbank: str = ""             # mean,std of the filter bank that the model was trained on
    cfg: str = ""               # instead of a checkpoint's own configuration: a preset, .json or .yaml file
    device: str = "auto"        # auto | cpu | cuda


def find_sounds(paths):
    """Return {sound: the folder that it was found below} of files and folders."""
    roots = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in audio_files(path):
                roots.setdefault(file, path)
        else:
            roots.setdefault(path, path.parent)
    return roots


def name_results(roots, out):
    """Return {sound: its .npy}: clip.npy, or clip.wav.npy where there is a clip.flac, too.

    Folders are kept in `out`. Raises UserError, before anything is computed, where this cannot be written.
    """
    targets = {}
    for sound, root in roots.items():
        targets[sound] = Path(out or root, sound.relative_to(root)).with_suffix(".npy")

    # there are disks to which Clip and clip are the same
    count = Counter(str(target).casefold() for target in targets.values())
    sounds = {}
    for sound, target in targets.items():
        if count[str(target).casefold()] > 1:
            target = targets[sound] = target.with_name(f"{sound.name}.npy")
        other = sounds.setdefault(str(target).casefold(), sound)
        check(
            other == sound,
            f"{printable(target)} would hold {printable(other)} and {printable(sound)}; "
            "name one at a time"
        )

    for folder in sorted({target.parent for target in targets.values()}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(
                f"{printable(folder)}: cannot be written ({error.strerror}); "
                "name another folder with --out"
            ) from None
    return targets


def settle(cfg, model, path):
    """Return whether classes are asked for, and the rows of a window and from one to the next.

    Raises UserError where the model cannot give what is asked for.
    """
    features = cfg.features or cfg.pool or cfg.layer >= 0
    classifier = isinstance(model, Classifier)
    if isinstance(model, Tokenizer):
        check(
            not features,
            f"{path} is a tokenizer: --features, --layer and --pool are for encoders"
        )
    else:
        layers = getattr(model, "encoder", model).cfg.layers
        check(-1 <= cfg.layer <= layers, f"--layer {cfg.layer}: {path} has 0 to {layers}")
    if cfg.class_csv:
        check(classifier, f"{path}: no classifier head, hence no classes")
        model.reorder(cfg.class_csv)
    classes = classifier and not features

    check(0 < cfg.window <= 600, f"--window {cfg.window}: above 0 and up to 600 s")
    hop = cfg.hop or cfg.window / (1 + classes)
    check(
        0 < hop <= cfg.window,
        f"--hop {cfg.hop}: has to be above 0 and at most --window {cfg.window}"
    )
    rows, step = (max(1, round(s * SAMPLE_RATE / ROW)) for s in (cfg.window, hop))
    return classes, rows, step


# -----------------------------------------------------------------------------
# one recording


def listen(model, wav, classes, cfg):
    """Return what the model says of windows (B, n): codes (B, T), probabilities (B, K) or features."""
    if isinstance(model, Tokenizer):
        return model.encode(wav)
    if classes:
        return model.predict(wav)
    x, valid = model.features(wav, layer=cfg.layer)
    return masked_mean(x, valid) if cfg.pool else x


def batched(parts, most=8):
    """Yield lists of consecutive windows of one length."""
    batch = []
    for first, x in parts:
        if len(batch) == most or batch and len(x) != len(batch[0][1]):
            yield batch
            batch = []
        batch.append((first, x))
    yield batch


def answers(function, path, parts, device):
    """Yield first row, number of rows and function(window), on the CPU, of one window after the other."""
    for batch in batched(parts):
        wav = torch.stack([x for _, x in batch])
        values = function(wav.to(device)).cpu()
        check(
            values.isfinite().all(),
            f"{printable(path)}: the model gives NaN or infinite numbers"
        )
        for (first, x), value in zip(batch, values):
            yield first, rows_in(len(x)), value


def mean_of(parts):
    """Return the mean over windows, which weigh by their tokens."""
    total, weight = 0.0, 0
    for _, rows, value in parts:
        total = total + rows * value.double()
        weight += rows
    return (total / weight).float()


def strung(parts):
    """Yield each token of a recording once; of windows that overlap, that of the one it is deeper in."""
    held, begin = None, 0
    for first, rows, tokens in parts:
        if held is not None:
            middle = (first + begin + len(held) // BANDS) // 2
            yield held[: (middle - begin) * BANDS]
            tokens, begin = tokens[(middle - first) * BANDS :], middle
        held = tokens
    yield held


def npy_header(x, count):
    """Return the 128 bytes before `count` rows like x[0] in a .npy file."""
    shape = (count, *x.shape[1:])
    text = repr(dict(descr=x.dtype.str, fortran_order=False, shape=shape))
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + f"{text:117}\n".encode()


def write_tokens(path, parts):
    """Write tokens into a .npy file as they come, and return their number."""
    count = 0

    def write(file):
        nonlocal count
        file.write(bytes(128))
        for tokens in parts:
            x = tokens.numpy()
            file.write(x.tobytes())
            count += len(x)
        file.seek(0)
        file.write(npy_header(x, count))

    write_whole(path, write)
    return count


def print_classes(model, path, probabilities, top):
    print(path)
    for value, k in zip(*probabilities.topk(min(top, len(model.labels)))):
        print(f"    {value:6.1%}  {model.labels[k]}")


def report(model, path, target, parts, cfg):
    """Print or write what the model says of a recording. target: its .npy, None = print classes."""
    name = printable(path)
    if cfg.per_window:
        firsts, _, values = zip(*parts)
        padding = -1 if isinstance(model, Tokenizer) else 0
        result = pad_sequence(values, batch_first=True, padding_value=padding)
    elif target is None or cfg.pool:
        result = mean_of(parts)
    else:
        count = write_tokens(target, strung(parts))
        print(f"{name} -> {printable(target)}: {count} tokens")
        return

    if target:
        write_whole(target, lambda file: np.save(file, result.numpy()))
        print(f"{name} -> {printable(target)} {tuple(result.shape)}")
    elif cfg.per_window:
        for first, probabilities in zip(firsts, result):
            start = first * ROW / SAMPLE_RATE
            print_classes(model, f"{name} {start:.2f} s", probabilities, cfg.top)
    else:
        print_classes(model, name, result, cfg.top)


@torch.inference_mode()
def main(argv):
    names = list(takewhile(lambda word: not word.startswith("-"), argv))
    cfg = Config(**common.parse(Config, __doc__, argv[len(names) :], "CHECKPOINT FILES "))
    check(len(names) > 1, "which? python -m tools.infer CHECKPOINT FILES [--flag value ...]")
    checkpoint, *paths = names
    common.check_flags(cfg)
    device = common.setup(cfg.device)[2]
    model = load_any(checkpoint, cfg.cfg or None, common.mean_and_std(cfg.fbank)).to(device)
    classes, rows, hop = settle(cfg, model, checkpoint)

    roots = find_sounds(paths)
    targets = dict.fromkeys(roots) if classes else name_results(roots, cfg.out)
    skipped = 0
    for path, target in targets.items():
        notes = {}
        parts = windows(read_pieces(path, notes=notes), rows, hop)
        parts = answers(lambda wav: listen(model, wav, classes, cfg), path, parts, device)
        try:
            report(model, path, target, parts, cfg)
        except UserError as error:
            skipped += 1
            print(f"skipped: {error}", file=sys.stderr)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = printable(target or "the output")
            raise UserError(f"{where}: cannot be written ({error.strerror or error})") from None
        for kind, detail in notes.items():
            if kind not in ORDINARY:
                print(f"note: {printable(path)}: {kind} ({detail})", file=sys.stderr)

    given = ", ".join(map(printable, paths))
    check(skipped < len(targets), f"no usable audio in {given}")
    if skipped:
        print(f"{skipped} of {len(targets)} skipped", file=sys.stderr)


def run(argv):
    """Call main. What a user can do something about ends in one line on stderr."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a class's name, say, that the terminal lacks
    try:
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # who reads the lines has had enough of them, as `head` has
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit("error: the memory is full; a shorter --window needs less")
    except KeyboardInterrupt:
        sys.exit("interrupted; the files that were written are whole")


# -----------------------------------------------------------------------------


class FromWaveform(torch.nn.Module):
    """A model from the waveform on: probabilities of a Classifier, features and valid of an Encoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.forward = getattr(model, "predict", model.features)


def export_program(model):
    """Return torch.export's program of (wav (B, n), lengths (B,)) -> probabilities, or features and valid.

    model: on the CPU. Any batch, any length from two patch rows (5,360 samples) on. Save it with
    torch.export.save.
    """
    free = torch.export.Dim.DYNAMIC
    wav = torch.zeros(3, 20000)
    lengths = torch.tensor([20000, 9000, 3000])
    constants_on(wav.device)  # made before tracing
    return torch.export.export(
        FromWaveform(model.eval()),
        (wav, lengths),
        dynamic_shapes=((free, free), (free,)),
        prefer_deferred_runtime_asserts_over_guards=True
    )


if __name__ == "__main__":
    run(sys.argv[1:])
