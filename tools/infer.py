"""
Classes, features or codes of sounds, by any checkpoint, ours or released. Packs are not needed.

    python -m tools.infer CLASSIFIER.pt clip.wav folder/        # the most probable classes
    python -m tools.infer CLASSIFIER.pt day.flac --per_window   # ... of every 10 s
    python -m tools.infer ENCODER.pt clip.wav --out features    # features/clip.npy: (tokens, D)
    python -m tools.infer ENCODER.pt folder/ --pool             # folder/*.npy: (D,), mean over the recording
    python -m tools.infer TOKENIZER.pt folder/ --out codes      # codes/*.npy: (tokens,)

Tokens are 8 bands per 160 ms, low to high. export_program(model) makes an encoder or classifier a program of
its own, by torch.export.
"""

import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
from audio import SAMPLE_RATE, audio_files, constants_on, read_audio, windows
from common import UserError, check
from model import Classifier, load, masked_mean
from tokenizer import Tokenizer, load_tokenizer

@dataclass
class Config:
    out: str = ""               # folder of the .npy files; none = beside the sounds
    top: int = 5                # classes to print
    class_csv: str = ""         # AudioSet's class_labels_indices.csv, to print names
    features: bool = False      # write features, also of a classifier
    layer: int = -1             # features after this block, 0 = before the first, -1 = the last
    pool: bool = False          # features averaged over time
    window: float = 10.0        # seconds into which longer recordings are cut
    hop: float = 0.0            # seconds from a window to the next; 0 = a window, for classes half of one
    per_window: bool = False    # a result per window, not per recording
    device: str = "auto"        # auto | cpu | cuda


def open_model(path):
    """Return the Encoder, Classifier or Tokenizer of a checkpoint, ours or released, in eval mode."""
    names = common.read_checkpoint(path)["model"].keys()
    codebooks = {"codebook", "codebook.weight", "quantize.embedding.weight"}
    return load(path) if names.isdisjoint(codebooks) else load_tokenizer(path)


def find_sounds(paths, out):
    """Return {.npy: its sound} of files and of all sounds below folders, whose tree is kept in `out`."""
    sounds = {}
    for path in map(Path, paths):
        files = [path]
        root = path.parent
        if path.is_dir():
            files = audio_files(path)
            root = path
        for file in files:
            target = Path(out or root, file.relative_to(root)).with_suffix(".npy")
            check(
                target not in sounds,
                f"{target} would hold {sounds.get(target)} and {file}; name one at a time"
            )
            sounds[target] = file
    return sounds


def listen(model, wav, lengths, classes, cfg):
    """Return what the model says of each clip: codes (T,), probabilities (K,) or features."""
    if isinstance(model, Tokenizer):
        return [codes[codes >= 0] for codes in model.encode(wav, lengths)]
    if classes:
        return model.predict(wav, lengths)
    x, valid = model.features(wav, lengths, cfg.layer)
    if cfg.pool:
        return masked_mean(x, valid)
    return [tokens[keep] for tokens, keep in zip(x, valid)]


def settle(cfg, model, path):
    """Return whether classes are asked for; raise UserError where the model cannot give what is asked for."""
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
    cfg.hop = cfg.hop or cfg.window / (1 + classes)
    check(
        0 < cfg.hop <= cfg.window,
        f"--hop {cfg.hop}: has to be above 0 and at most --window {cfg.window}"
    )
    return classes


@torch.inference_mode()
def main(argv):
    names = list(takewhile(lambda word: not word.startswith("-"), argv))
    cfg = Config(**common.parse(Config, __doc__, argv[len(names) :]))
    check(names, "which? python -m tools.infer CHECKPOINT FILES [--flag value ...]")
    checkpoint, *paths = names
    device = common.setup(cfg.device)[2]
    model = open_model(checkpoint).to(device)
    classes = settle(cfg, model, checkpoint)

    sounds = find_sounds(paths, cfg.out)
    done = 0
    for target, path in sounds.items():
        try:
            wav = torch.from_numpy(read_audio(path))
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        done += 1

        # window by window
        wav, lengths, starts = windows(wav, cfg.window, cfg.hop)
        results = []
        for part, samples in zip(wav.split(8), lengths.split(8)):
            heard = listen(model, part.to(device), samples, classes, cfg)
            results += [x.cpu() for x in heard]

        # from windows to the recording
        if cfg.per_window:
            padding = -1 if isinstance(model, Tokenizer) else 0
            results = pad_sequence(results, batch_first=True, padding_value=padding)
        elif classes or cfg.pool:
            results = torch.stack(results).mean(0)
        else:
            results = torch.cat(results)

        if classes:
            for start, probabilities in zip(starts, torch.atleast_2d(results)):
                print(f"{path} {start / SAMPLE_RATE:.1f} s" if cfg.per_window else path)
                best = probabilities.topk(min(cfg.top, len(model.labels)))
                for value, k in zip(*best):
                    print(f"    {value:6.1%}  {model.labels[k]}")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, results.numpy())
            print(f"{path} -> {target} {tuple(results.shape)}")
    check(done, f"no usable audio in {', '.join(paths)}")


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
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
