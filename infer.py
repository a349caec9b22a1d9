"""
Labels, embeddings or features of sounds from any checkpoint, ours or released.

    python model.py CLASSIFIER.pt clip.wav folder/              # the most probable classes
    python model.py CLASSIFIER.pt day.flac --per_window         # ... of every 10 s
    python model.py ENCODER.pt clip.wav --out features          # features/clip.npy: (tokens, D), 8 bands per 160 ms
    python model.py ENCODER.pt folder/ --pool                   # folder/*.npy: (D,), mean over the recording
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import read_audio
from model import SAMPLE_RATE, CheckpointError, Classifier, load, windows
from recipes import SUFFIXES

def sound_files(paths, out):
    """(file, .npy beside it or in out) for files and all audio files below folders; a folder's tree is kept in out."""
    found = []
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        found += [(file, (Path(out) / file.relative_to(root) if out else file).with_suffix(".npy")) for file in files]
    targets = [target for _, target in found]
    twice = next((t for t in targets if targets.count(t) > 1), None) if len(set(targets)) < len(targets) else None
    if twice:
        raise CheckpointError(f"several sounds would be written to {twice}; name folders, or one file at a time")
    return found

def for_each_sound(paths, out, window, hop, use):
    """use(path, wav (W, n), lengths, starts in seconds, target .npy path) for the windows of each file;
    bad files are named and left out."""
    files, bad = sound_files(paths, out), 0
    for path, target in tqdm(files, unit="file", disable=None if len(files) > 1 else True):
        try:
            wav, lengths, starts = windows(torch.from_numpy(read_audio(path)), window, hop)
        except ValueError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            bad += 1
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        use(path, wav, lengths, starts / SAMPLE_RATE, target)
    if not files or bad == len(files):
        sys.exit("error: no usable audio in " + ", ".join(map(str, paths)))

@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("files", nargs="+", help="audio files, and folders of them, of any rate and length")
    parser.add_argument("--out", help="folder of the .npy files [beside the sounds]")
    parser.add_argument("--top", type=int, default=5, help="classes to print [5]")
    parser.add_argument("--class_csv", help="AudioSet's class_labels_indices.csv, for names instead of MIDs")
    parser.add_argument("--features", action="store_true", help="write features, though the checkpoint is a classifier")
    parser.add_argument("--pool", action="store_true", help="mean over time instead of all tokens")
    parser.add_argument("--layer", type=int, help="output of this block instead of the last; 0 = the first one's input")
    parser.add_argument("--window", type=float, default=10.0, help="longer recordings are cut into windows of these seconds [10]")
    parser.add_argument("--hop", type=float,
                        help="seconds from one window to the next [half a window for classes, a window for features]")
    parser.add_argument("--per_window", action="store_true", help="one result per window instead of their mean")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    model = load(args.checkpoint).to(args.device)
    if args.class_csv:
        if not isinstance(model, Classifier):
            raise CheckpointError(f"{args.checkpoint}: this file has no classifier head, hence no classes")
        model.reorder(args.class_csv)

    def label(path, wav, lengths, starts, target):
        p = torch.cat([model.predict(w.to(args.device), n).cpu() for w, n in zip(wav.split(8), lengths.split(8))])
        for start, row in zip(starts, p if args.per_window else p.mean(0, keepdim=True)):
            best = row.topk(min(args.top, len(row)))
            place = f"{path} {start:.1f} s" if args.per_window else f"{path}"
            print(place + "".join(f"\n    {v:6.1%}  {model.labels[i]}" for v, i in zip(best.values, best.indices)))

    def describe(path, wav, lengths, starts, target):
        parts = [model.features(w.to(args.device), n, layer=args.layer) for w, n in zip(wav.split(8), lengths.split(8))]
        clips = [x[valid].cpu() for xs, valids in parts for x, valid in zip(xs, valids)]         # windows without their padding
        if args.pool:
            clips = [x.mean(0, keepdim=True) for x in clips]
        clips = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True) if args.per_window else torch.cat(clips)
        clips = clips.mean(0) if args.pool and not args.per_window else clips
        np.save(target, clips.numpy())
        print(f"{path} -> {target} {tuple(clips.shape)}")

    classes = isinstance(model, Classifier) and not args.features and args.layer is None
    hop = args.hop or (args.window / 2 if classes else args.window)
    for_each_sound(args.files, args.out, args.window, hop, label if classes else describe)

def run():
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")

if __name__ == "__main__":
    run()
