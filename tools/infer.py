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
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
from audio import SAMPLE_RATE, audio_files, constants_on, read_audio, samples_of, windows
from common import UserError, check
from model import Classifier, load
from tokenizer import Tokenizer, load_tokenizer

def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.infer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="encoder, classifier or tokenizer")
    add("files", nargs="+", help="audio files, and folders of them, of any rate and length")
    add("--out", help="folder of the .npy files [beside the sounds]")
    add("--top", type=int, default=5, help="classes to print [5]")
    add("--class_csv", "--class-csv", help="AudioSet's class_labels_indices.csv, to print names")
    add("--features", action="store_true", help="write features, also of a classifier")
    add("--layer", type=int, help="features after this block, 0 = before the first [the last]")
    add("--pool", action="store_true", help="features averaged over time")
    add("--window", type=float, default=10.0, help="seconds into which longer recordings are cut [10]")
    add("--hop", type=float, help="seconds from a window to the next [a window; for classes half of one]")
    add("--per_window", "--per-window", action="store_true", help="a result per window, not per recording")
    add("--device", default="auto", help="auto, cpu or cuda [auto]")
    return parser.parse_args(argv)

def open_model(path):
    """Return the Encoder, Classifier or Tokenizer of a checkpoint, ours or released, in eval mode."""
    ckpt = common.read_checkpoint(path)
    ours = ckpt.get("kind") in ("random_projection", "tokenizer")
    if ours or "quantize.embedding.weight" in ckpt["model"]:
        return load_tokenizer(path)
    return load(path)

def find_sounds(paths, out):
    """Return {sound: its .npy} of files and of all sounds below folders, whose tree is kept in `out`."""
    targets = {}
    for path in map(Path, paths):
        root = path if path.is_dir() else path.parent
        for file in audio_files(path) if path.is_dir() else [path]:
            target = Path(out) / file.relative_to(root) if out else file
            targets[file] = target.with_suffix(".npy")

    check(len(set(targets.values())) == len(targets),
          f"two sounds below {', '.join(paths)} would be one .npy; name folders, or one file at a time")
    return targets

def listen(model, wav, lengths, classes, layer):
    """Return what the model says of each clip: a list of codes (T,), probabilities (K,), features (T, D)."""
    if isinstance(model, Tokenizer):
        return [codes[codes >= 0] for codes in model.encode(wav, lengths)]
    if classes:
        return list(model.predict(wav, lengths))
    x, valid = model.features(wav, lengths, layer=layer)
    return [tokens[real] for tokens, real in zip(x, valid)]

def print_classes(name, probabilities, labels, top):
    print(name, flush=True)
    best = probabilities.topk(min(top, len(labels)))
    for value, k in zip(*best):
        print(f"    {value:6.1%}  {labels[k]}")

@torch.inference_mode()
def main(argv=None):
    args = parse(argv)
    device = common.setup(args.device)[2]
    model = open_model(args.checkpoint).to(device)

    # what it gives, and what cannot be asked of it
    features = args.features or args.pool or args.layer is not None
    codes = isinstance(model, Tokenizer)
    classes = isinstance(model, Classifier) and not features
    check(not (codes and features),
          f"{args.checkpoint} is a tokenizer: --features, --layer and --pool are for encoders")
    if args.layer is not None:
        layers = getattr(model, "encoder", model).cfg.layers
        check(0 <= args.layer <= layers, f"--layer {args.layer}: {args.checkpoint} has 0 to {layers}")
    if args.class_csv:
        check(isinstance(model, Classifier), f"{args.checkpoint}: no classifier head, hence no classes")
        model.reorder(args.class_csv)
    hop = args.hop or args.window / (2 if classes else 1)
    check(0 < hop <= args.window, f"--hop {hop}: has to be above 0 and at most --window {args.window}")

    sounds = find_sounds(args.files, args.out)
    bad = 0
    for path, target in sounds.items():
        try:
            wav, lengths, starts = windows(torch.from_numpy(read_audio(path)), args.window, hop)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            bad += 1
            continue
        results = []
        for some, samples in zip(wav.split(8), lengths.split(8)):
            heard = listen(model, some.to(device), samples, classes, args.layer)
            results += [x.cpu() for x in heard]

        # from windows to the recording
        if args.pool:
            results = [x.mean(0) for x in results]
        if args.per_window:
            results = pad_sequence(results, batch_first=True, padding_value=-1 if codes else 0)
        elif classes or args.pool:
            results = torch.stack(results).mean(0)
        else:
            results = torch.cat(results)

        if classes:
            for start, probabilities in zip(starts / SAMPLE_RATE, torch.atleast_2d(results)):
                name = f"{path} {start:.1f} s" if args.per_window else path
                print_classes(name, probabilities, model.labels, args.top)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, results.numpy())
            print(f"{path} -> {target} {tuple(results.shape)}", flush=True)
    check(bad < len(sounds), f"no usable audio in {', '.join(args.files)}")

# -----------------------------------------------------------------------------

class FromWaveform(torch.nn.Module):
    """A model from the waveform on: probabilities of a Classifier, features and valid of an Encoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, wav, lengths):
        classes = isinstance(self.model, Classifier)
        return self.model.predict(wav, lengths) if classes else self.model.features(wav, lengths)

def export_program(model):
    """Return torch.export's program of (wav (B, n), lengths (B,)) -> probabilities, or features and valid.

    Any batch, any length from two patch rows (5,360 samples) to ten minutes. Save it with torch.export.save.
    """
    batch = torch.export.Dim("B", max=4096)
    samples = torch.export.Dim("n", min=samples_of(2), max=600 * SAMPLE_RATE)
    device = next(model.parameters()).device
    constants_on(device)            # made before tracing
    wav = torch.zeros(3, 20000, device=device)
    lengths = torch.tensor([20000, 9000, 3000], device=device)
    with torch.no_grad():
        return torch.export.export(
            FromWaveform(model.eval()), (wav, lengths), dynamic_shapes=({0: batch, 1: samples}, {0: batch}),
            prefer_deferred_runtime_asserts_over_guards=True)

if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
