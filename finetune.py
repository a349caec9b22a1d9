"""
Use an encoder on any labelled pack: fine-tune it, probe it frozen, or average several.

    python finetune.py --data packs/esc50 --init out/mam_iter1.pt                   # fine-tune; a pack with folds: each in turn
    python finetune.py --data packs/esc50 --init BEATs_iter3.pt --task esc50        # the paper's recipe (Table 4)
    python finetune.py --data packs/esc50 --init out/mam_iter1.pt --probe mlp       # frozen: linear, mlp or knn
    python finetune.py --data packs/esc50 --init a.pt,b.pt --probe mlp              # the features of several encoders, side by side
    python finetune.py --data packs/as --ensemble out/x.pt,out/y.pt                 # fine-tuned files: each, and their mean
    torchrun --nproc_per_node 4 finetune.py --data packs/as20k --init BEATs_iter3.pt --task as20k

A pack whose splits are numbers has folds: each is tested once, trained on the others. Otherwise train on `train`, test once on
`test` (or `eval`), watch `valid`. Tested is the last step, or with --best the one that is best on valid. Writes into --out_dir
finetune_<pack>[_fold<k>].pt (for model.load), .jsonl (log), .npz (paths, targets, scores of the test clips) and .csv (per class);
probes and ensembles write the last three, named after themselves.
"""
import contextlib
import csv
import dataclasses
import importlib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
import data
from common import UserError, all_sum, autocast
from model import (FRAME, HOP, MELS, MIN_SAMPLES, PRESETS, Classifier, Encoder, EncoderConfig, fbank, load, masked_mean,
                   num_tokens, patchify, prepare_clips, random_mask, read_checkpoint)

@dataclass
class Config:
    data: str = ""                  # one labelled pack
    task: str = "custom"            # custom | as2m | as20k | esc50 | ks1 | ks2 | er: defaults that fit a CPU, or a column of Table 4
    init: str = "scratch"           # ours, a released file, scratch, or module:function; for a probe several, as in a.pt,b.pt
    out_dir: str = "out"            # folder of checkpoints, logs and predictions
    name: str = ""                  # of the result, finetune_<name>; none = that of the pack
    model: str = "tiny"             # tiny | base | large, for scratch
    fold: str = ""                  # only these folds, as in 1,5; none = all
    test_split: str = ""            # split to test on; none = test or eval
    valid_share: float = 0.0        # of the training clips held out as valid, if the pack has no such split (SUPERB's ER: 0.2)
    best: bool = False              # test the step with the best score on valid, instead of the last
    probe: str = "none"             # of linear, mlp, knn, knn_xares one or several, as in mlp,knn: frozen, instead of fine-tuning
    freeze: bool = False            # the same as --probe linear
    layers: str = "last"            # last | all: what a probe sees, the mean of the last layer or mean and std of all
    ensemble: str = ""              # evaluate these fine-tuned files and their mean; {fold} in a name stands for the fold
    loss: str = "auto"              # auto | ce | bce; auto = bce if clips have several labels
    batch_seconds: float = 80.0     # audio per step, all ranks together
    device_seconds: float = 0.0     # most audio per forward pass on one device, 0 = the rank's whole share
    max_steps: int = 1000           # optimizer steps
    warmup_steps: int = 100         # of linear warm-up, then cosine decay to 0
    lr: float = 5e-4                # peak learning rate
    head_lr: float = 10.0           # the new head's, times this
    lr_decay: float = 1.0           # learning rate of each layer, times this per layer below the head (BEiT; 0.65 to 0.8 are usual)
    grad_decay: float = 1.0         # gradient entering each layer, times this (the released decay, far weaker: Adam rescales)
    weight_decay: float = 0.05      # on matrices only
    balance: str = "none"           # none | weights | unknown: clips weigh 1000 / count, summed over their classes; or KS1's epochs
    mixup: float = 0.0              # Beta(mixup, mixup) of waveforms, 0 = none
    spec_augment: float = 0.0       # widest mask, as a share of each axis; 0 = none
    patchout: float = 0.6           # share of the patches left out of every training clip (PaSST): regularises, and costs less
    roll: bool = True               # random circular shift of the waveform
    smoothing: float = 0.0          # label smoothing, of ce
    dropout: float = 0.0            # of layers and attention
    layerdrop: float = 0.0          # share of layers left out
    fbank_mean: float = 0.0         # of the input, with fbank_std
    fbank_std: float = 0.0          # 0 = the encoder's own statistics; from scratch the pack's
    clip: float = 1.0               # largest gradient norm
    seed: int = 0                   # of everything
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16
    compile: bool = False           # torch.compile
    recompute: bool = False         # recompute each block in the backward pass: a third slower, far less memory
    workers: int = 1                # threads per rank that make batches ahead, 0 = none
    log_every: int = 20             # steps between log lines
    eval_every: int = 200           # steps between evaluations on valid, or without one on test (shown, never chosen by)
    save_every: int = 200           # steps between checkpoints
    resume: bool = False            # go on: finished folds are kept, an interrupted one continues

# Table 4 of the paper. (?) = its flattened text leaves open which column a value stands in. Optimizer everywhere: AdamW, betas
# (0.9, 0.98), eps 1e-8 (not given). Not in the table: the clipping of gradients (1.0 as ESPnet), a learning rate of the
# head's own, patchout.
TABLE4 = dict(          # as2m     as20k     esc50     ks1       ks2       er          KS and ER columns (?) where they differ
    max_steps=         (50000,    80000,    80000,    80000,    80000,    80000),
    warmup_steps=      (5000,     8000,     8000,     8000,     8000,     8000),     # printed as epochs; they are steps
    batch_seconds=     (6400.0,   800.0,    300.0,    100.0,    100.0,    300.0),
    device_seconds=    (400.0,    200.0,    75.0,     25.0,     25.0,     75.0),     # its GPUs: 16 and 4; any number will do
    grad_decay=        (0.6,      0.3,      0.2,      0.3,      0.3,      1.0),
    lr=                (1e-4,     3e-5,     3e-5,     1e-4,     1e-4,     3e-5),
    balance=           ("weights", "none",  "none",   "unknown", "none",  "none"),
    dropout=           (0.0,) * 6,
    layerdrop=         (0.1,) * 6,                                                   # (?) the released AS-2M file says 0.05
    roll=              (True,     True,     True,     False,    False,    True),     # (?)
    spec_augment=      (0.3,      0.3,      0.2,      0.3,      0.3,      0.15),     # (?) as20k: or 0.2
    mixup=             (0.8,      0.8,      0.0,      0.8,      0.8,      0.0),      # (?) as2m: or 0.0
    loss=              ("bce",    "bce",    "ce",     "bce",    "bce",    "ce"),
    fbank_mean=        (15.41663, 15.41663, 11.72215, 11.43905, 11.41045, 12.0889),
    fbank_std=         (6.55582,  6.55582,  10.60431, 5.64913,  5.67857,  4.29147),
    weight_decay=      (0.01,) * 6, head_lr=(1.0,) * 6, patchout=(0.0,) * 6)
TASKS = {"custom": {}} | {task: {key: row[i] for key, row in TABLE4.items()}
                          for i, task in enumerate(("as2m", "as20k", "esc50", "ks1", "ks2", "er"))}

# -----------------------------------------------------------------------------
# labelled clips

def splits_of(pack, test_split="", fold="", valid_share=0.0):
    """{name: (train, valid, test) clips}: one entry per fold, or one named ""; valid may be empty. Also targets (clips, K)."""
    labels, split, _ = pack.table()
    if not pack.classes:
        raise UserError(f"{pack.path} has no labels; pack it with a label column (python data.py csv --help)")
    targets = torch.zeros(len(pack), len(pack.classes), dtype=torch.bool)
    for row, classes in zip(targets, labels):
        row[classes] = True
    names = set(split)
    if all(name.isdigit() for name in names) and len(names) > 1:
        wanted = fold.split(",") if fold else sorted(names, key=int)
        if set(wanted) - names:
            raise UserError(f"{pack.path} has the folds {', '.join(sorted(names, key=int))}, not {fold}")
        masks = {k: (split != k, split == "", split == k) for k in wanted}
    else:
        test = test_split or next((name for name in ("test", "eval") if name in names), None)
        valid = next((name for name in ("valid", "val", "validation", "dev") if name in names - {test}), None)
        if "train" not in names or test not in names:
            raise UserError(f"{pack.path} has the splits {', '.join(sorted(names)) or '(none)'}; training needs train and test, "
                            "or folds 1, 2, ...")
        masks = {"": (split == "train", split == valid, split == test)}
    for train, valid, _ in masks.values():
        if valid_share and not valid.any():         # whole files, the same for every seed
            files = np.unique(pack.index["row"][train])
            held = np.random.default_rng(0).permutation(files)[:math.ceil(valid_share * len(files))]
            valid |= train & np.isin(pack.index["row"], held)
            train &= ~valid
    return {k: tuple(map(np.flatnonzero, parts)) for k, parts in masks.items()}, targets

def draw(train, targets, classes, balance, key):
    """The clips of one epoch, with repeats: a function of key, (seed, epoch).

    "weights": len(train) draws with replacement, each clip with the sum over its classes of 1000 / (clips of the class + 0.01)
    (AST). "unknown": all of the class unknown once, and half as many of every other class: its whole list as often as it fits,
    then a random rest (the paper's footnote to KS1).
    """
    rng = np.random.default_rng([*key, 1])          # not the numbers that order the batches
    clip, label = targets[train].nonzero().T.numpy()
    if balance == "weights":
        weight = np.bincount(clip, 1000 / (np.bincount(label) + 0.01)[label], len(train))
        return rng.choice(train, len(train), p=weight / weight.sum())
    unknown = [i for i, name in enumerate(classes) if name.strip("_") == "unknown"]
    if len(unknown) != 1:
        raise UserError(f"--balance unknown needs a class named unknown or _unknown_; the pack has {', '.join(classes[:40])}")
    lists = [train[clip[label == c]] for c in range(len(classes))]
    half = len(lists[unknown[0]]) // 2
    fill = lambda clips: np.append(np.tile(clips, half // len(clips)), rng.choice(clips, half % len(clips), replace=False))
    return np.concatenate([clips if c == unknown[0] else fill(clips) for c, clips in enumerate(lists) if len(clips)])

@torch.no_grad()
def over_clips(pack, which, function, device, dtype="auto", text=""):
    """function(wav, lengths) -> (B, K) on the clips `which` -> (len(which), K) float32 on the CPU, in their (ascending) order.

    Every clip is seen by exactly one rank, in batches that are the same for any number of ranks.
    """
    clips, index, rows = data.Clips([pack]), [], []
    batches = data.epoch_batches(clips.samples, 80 * data.SAMPLE_RATE, (0,), [which], shuffle=False)
    mine = [[(i,) for i in batch] for batch in batches[common.rank()::common.world()]]
    for batch in tqdm(data.Loader(clips, mine), desc=text, unit="batch", leave=False,
                      disable=True if common.rank() or not text else None):
        index.append(batch["clip"])
        batch = data.to_device(batch, device)
        with autocast(device, dtype):
            rows.append(function(batch["wav"], batch["lengths"]).float().cpu())
    parts = [(index, rows)]
    if common.world() > 1:
        parts = [None] * common.world()
        dist.all_gather_object(parts, (index, rows))
    index, rows = (torch.cat(sum(column, [])) for column in zip(*parts))
    return rows[index.argsort()]

# -----------------------------------------------------------------------------
# scores

def has_several(targets):
    """Not exactly one label per clip: scores are then mAP."""
    return bool((targets.sum(1) != 1).any())

def ranking(scores, truth):
    """(average precision, area under the ROC curve) of one class, ties taken together. scores, truth: (n,); nan if undefined."""
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))          # end of each group of equal scores
    hits = np.cumsum(truth)[last]
    misses, new = last + 1 - hits, np.diff(hits, prepend=0)
    with np.errstate(invalid="ignore"):
        precision = (new / hits[-1] * hits / (last + 1)).sum()
        return precision, (np.diff(misses, prepend=0) / misses[-1] * (hits - new / 2) / hits[-1]).sum()

def score(scores, targets, multilabel):
    """Accuracy, or with several labels per clip mean average precision over the classes that occur. (n, K) each."""
    if not multilabel:
        return (scores.argmax(1) == targets.float().argmax(1)).double().mean().item()
    return float(np.nanmean([ranking(s, t)[0] for s, t in zip(scores.double().numpy().T, targets.long().numpy().T)]))

def report(stem, pack, test, scores, targets, text=""):
    """Scores (n, K) of the clips `test` -> dict of metrics; rank 0 writes stem.npz, stem.csv and a line of the log.

    mAP, AUC: means over the classes that have positives (classes_scored); d_prime = sqrt(2) Phi^-1(AUC), of the mean AUC.
    """
    several, targets = has_several(targets), targets[test]
    d_prime = lambda area: math.sqrt(2) * torch.special.ndtri(torch.tensor(area, dtype=torch.double)).item()
    table = np.array([ranking(s, t) for s, t in zip(scores.double().numpy().T, targets.long().numpy().T)])
    result = {} if several else dict(accuracy=score(scores, targets, False))
    result |= dict(mAP=float(np.nanmean(table[:, 0])), d_prime=d_prime(float(np.nanmean(table[:, 1]))),
                   classes_scored=int((~np.isnan(table[:, 0])).sum()), classes=len(pack.classes), clips=len(test))
    common.Log(f"{stem}.jsonl")(text, **result)
    if common.rank() == 0:
        with open(pack.path / "clips.csv", newline="") as f:
            paths = np.array([row["path"] for row in csv.DictReader(f)])[pack.index["row"][test]]
        np.savez_compressed(f"{stem}.npz", paths=paths, classes=np.array(pack.classes), targets=targets.numpy(),
                            scores=scores.numpy())
        with open(f"{stem}.csv", "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["class", "clips", "average_precision", "auc", "d_prime", "recall"])       # recall: of the likeliest class
            recall = [(scores.argmax(1) == c)[targets[:, c]].double().mean().item() for c in range(len(table))]
            out.writerows([name, int(targets[:, c].sum()), *table[c], d_prime(table[c, 1]), recall[c]]
                          for c, name in enumerate(pack.classes))
    return result

# -----------------------------------------------------------------------------
# encoders

class Ensemble(nn.Module):
    """Several encoders as one: their features side by side, each clip's tokens brought to the longest member's number by
    linear interpolation (align_corners=False; the ICME 2025 submission to X-ARES).

    members: Encoders, or any modules that map wav (B, n) in [-1, 1] at 16 kHz to (B, T, D). Those know no padding, so they get
    one clip at a time: a clip in a padded batch gives what it gives alone.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members).eval()

    def tokens(self, member, wav, lengths):
        """List of (T_i, D), one per clip"""
        if isinstance(member, (Encoder, Ensemble)):
            return [row[real] for row, real in zip(*member.features(wav, lengths))]
        return [member(clip[None, :n])[0] for clip, n in zip(wav, lengths)]

    def features(self, wav, lengths=None, layer=None):
        """As Encoder.features: x (B, T, sum of D), valid (B, T). There is only the last layer."""
        if layer is not None:
            raise UserError("--layers all is for a single encoder of ours")
        lengths = torch.full((len(wav),), wav.shape[1], device=wav.device) if lengths is None else lengths
        clips = [torch.cat([F.interpolate(x.T[None].float(), max(map(len, tokens)), mode="linear")[0].T for x in tokens], -1)
                 for tokens in zip(*(self.tokens(member, wav, lengths) for member in self.members))]
        T = torch.tensor([len(x) for x in clips], device=wav.device)
        return nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.arange(T.max(), device=wav.device) < T[:, None]

def open_encoder(init, model="tiny", info=None):
    """--init: a checkpoint, ours or released; module:function, called for a torch module (wav -> tokens); "scratch";
    several by commas."""
    if "," in init:
        return Ensemble([open_encoder(one, model, info) for one in init.split(",")])
    if init == "scratch":
        return Encoder(dataclasses.replace(PRESETS[model], fbank_mean=info["fbank_mean"], fbank_std=info["fbank_std"]))
    if ":" in init and not Path(init).exists():
        sys.path.append(os.getcwd())
        module, _, function = init.partition(":")
        try:
            return Ensemble([getattr(importlib.import_module(module), function)()])
        except (ImportError, AttributeError) as error:
            raise UserError(f"--init {init}: {error}; it has to be an importable module and a function in it that returns "
                            "a torch module") from None
    encoder = load(init)
    return encoder.encoder if isinstance(encoder, Classifier) else encoder

# -----------------------------------------------------------------------------
# frozen probes: x (n, D) features and y (n, K) bool targets of training clips -> scores (m, K) of test clips

def extract(encoder, pack, which, device, dtype="auto", layers="last"):
    """Clip features: mean over tokens of the last layer (n, D), or mean and std of all layers (n, 2 (layers + 1) D)."""
    def pooled(wav, lengths):
        x, valid = encoder.features(wav, lengths, layer=None if layers == "last" else "all")
        if layers == "last":
            return masked_mean(x.float(), valid)
        means = torch.stack([masked_mean(state.float(), valid) for state in x])
        squares = torch.stack([masked_mean(state.float().square(), valid) for state in x])
        return torch.cat([means, (squares - means.square()).clamp(min=0).sqrt()]).transpose(0, 1).flatten(1)
    training = encoder.training
    encoder.eval()
    x = over_clips(pack, which, pooled, device, dtype, f"features of {pack.path.name}")
    encoder.train(training)
    return x

def fit_linear(x, y, penalty, multilabel=False):
    """Multinomial logistic regression (or one per class) by L-BFGS: minimises the mean loss + penalty / 2 |W|^2. -> (D + 1, K)"""
    x = F.pad(x.double(), (0, 1), value=1.0)
    weights = torch.zeros(x.shape[1], y.shape[1], dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=150, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    def closure():
        solver.zero_grad()
        logits = x @ weights
        loss = F.binary_cross_entropy_with_logits(logits, y.double()) if multilabel else F.cross_entropy(logits, y.double())
        loss = loss + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss
    solver.step(closure)
    return weights.detach()

def linear_probe(x, y, x_test, multilabel=False):
    """A linear classifier on standardised features; its penalty is chosen on a fifth of the training clips."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    held = torch.arange(len(x)) % 5 == 0
    held = held[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    apply = lambda weights, x: (F.pad(x.double(), (0, 1), value=1.0) @ weights).float()
    penalty = max((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
                  key=lambda p: score(apply(fit_linear(x[~held], y[~held], p, multilabel), x[held]), y[held], multilabel))
    return apply(fit_linear(x, y, penalty, multilabel), x_test)

def mlp_probe(x, y, x_valid, y_valid, x_test, multilabel=False, seed=0):
    """X-ARES 0.1.3's first track: LayerNorm and a linear layer, Adam, 10 epochs; the one that is best on valid scores the test."""
    torch.manual_seed(42 + seed)
    model = nn.Sequential(nn.LayerNorm(x.shape[1]), nn.Linear(x.shape[1], y.shape[1]))
    optimizer, best = torch.optim.Adam(model.parameters()), -1.0
    for epoch in range(10):
        optimizer.param_groups[0]["lr"] = 1e-3 - 9e-4 / 2 * (1 - math.cos(math.pi * epoch / 10))
        for batch in torch.randperm(len(x)).split(32):
            logits, truth = model(x[batch]), y[batch].float()
            (F.binary_cross_entropy_with_logits if multilabel else F.cross_entropy)(logits, truth).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found = score(model(x_valid), y_valid, multilabel)
            if found > best:
                best, scores = found, model(x_test)
    return scores

def knn_probe(x, y, x_test, k=10, temperature=0.07, xares=False):
    """X-ARES's second track: the labels of the k nearest clips by cosine, weighted by softmax(cosine / temperature).

    xares: as its version 0.1.3 computes it, with each feature of the training clips scaled to unit norm instead of each clip.
    """
    x, rows = F.normalize(x, dim=0 if xares else 1), []
    for part in F.normalize(x_test).split(256):
        near, index = (part @ x.T).topk(min(k, len(x)))
        rows.append(((near / temperature).softmax(1)[..., None] * y[index]).sum(1))
    return torch.cat(rows)

def probe(encoder, pack, device, dtype="auto"):
    """Mean score of a linear classifier on the frozen encoder's clip features, over the pack's folds."""
    splits, targets = splits_of(pack)
    x, several = extract(encoder, pack, np.arange(len(pack)), device, dtype), has_several(targets)
    return float(np.mean([score(linear_probe(x[train], targets[train], x[test], several), targets[test], several)
                          for train, _, test in splits.values()]))

# -----------------------------------------------------------------------------
# fine-tuning

def augment(batch, targets, cfg, generator):
    """Training-time changes of waveforms: circular shift within each clip, mixup of neighbours in a random order."""
    wav, lengths = batch["wav"], batch["lengths"]
    B, n = wav.shape
    if cfg.roll:
        shift = (torch.rand(B, generator=generator).to(wav.device, non_blocking=True) * lengths).long()
        place = torch.arange(n, device=wav.device)[None]
        wav = wav.gather(1, torch.where(place < lengths[:, None], (place - shift[:, None]) % lengths[:, None], place))
    if cfg.mixup:
        gamma = torch._standard_gamma(torch.full((2, B), cfg.mixup), generator)         # Beta(a, a) = G1 / (G1 + G2)
        share = (gamma[0] / gamma.sum(0))[:, None].to(wav.device, non_blocking=True)
        other = torch.randperm(B, generator=generator).to(wav.device, non_blocking=True)
        wav = share * wav + (1 - share) * wav[other]
        targets = share * targets + (1 - share) * targets[other]
        lengths = torch.maximum(lengths, lengths[other])
    return wav, lengths, targets

def spec_augment(x, frames, share, chance):
    """One mask of zeros per clip and axis: widths floor(U round(share size)), start uniform (SpecAugment, with the paper's "0.3").

    x: (B, N, 128) normalised, so that 0 is the data's mean; frames: (B,) real ones; chance: (B, 2, 2) uniform in [0, 1).
    """
    size = torch.stack([frames, torch.full_like(frames, MELS)], 1)                      # (B, 2): frames, bins
    width = (chance[..., 0] * (share * size).round()).long()
    start = (chance[..., 1] * (size - width + 1)).long()
    frame, bin = torch.arange(x.shape[1], device=x.device), torch.arange(MELS, device=x.device)
    inside = lambda place, axis: (place >= start[:, axis, None]) & (place < (start + width)[:, axis, None])
    return x.masked_fill(inside(frame, 0)[:, :, None] | inside(bin, 1)[:, None], 0)

def classification_loss(logits, targets, cfg):
    """Summed over clips. logits, targets: (B, K)"""
    if cfg.loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / targets.shape[1]
    return F.cross_entropy(logits, targets, label_smoothing=cfg.smoothing, reduction="sum")

def lr_times(name, layers, cfg):
    """What the learning rate of a parameter is multiplied by. BEiT's layers: 0 up to the position embeddings, i + 1 is block i,
    L + 1 the head."""
    head = name.startswith("head")
    layer = layers + 1 if head else int(name.split(".")[2]) + 1 if ".blocks." in name else 0
    return cfg.lr_decay**(layers + 1 - layer) * (cfg.head_lr if head else 1.0)

def probabilities(model, pack, which, cfg, device, text=""):
    """A classifier's (len(which), K), float64."""
    model.eval()
    logits = over_clips(pack, which, model.logits, device, cfg.dtype, text).double()    # float32 sigmoids saturate, which makes ties
    model.train()
    return logits.sigmoid() if model.multilabel else logits.softmax(1)

def finetune(cfg, flags, pack, fold, stem, splits, targets):
    """Train on the clips splits[0] -> probabilities (n, K) of the clips splits[2], from the last step or the best on splits[1]."""
    (train, valid, test), (rank, world, device) = splits, common.setup(cfg.device, cfg.seed)
    path, best_path, ckpt = f"{stem}.pt", f"{stem}_best.pt", None
    if cfg.resume and Path(path).exists():
        ckpt = common.read_training(path, Config)
        cfg = Config(**{**ckpt["config"], **flags})
        begun, typed = Config(**ckpt["config"]), Config(**flags)
        for key in ["data", "test_split", "valid_share"] + ["task"] * ("task" in flags):
            if getattr(begun, key) != getattr(typed, key):
                raise UserError(f"{path} was begun with --{key} {getattr(begun, key)}; type the same to resume")
        if ckpt["pack"] != pack.info["id"]:
            raise UserError(f"{path} was begun on other sounds than {pack.path} holds now; begin anew without --resume")
    cfg = dataclasses.replace(cfg, loss=("bce" if has_several(targets) else "ce") if cfg.loss == "auto" else cfg.loss)
    if cfg.best and not len(valid):
        raise UserError(f"--best chooses on a valid split, and {pack.path} has none; add --valid_share 0.2 "
                        "(the test clips would flatter)")
    if not 0 <= cfg.patchout < 1:
        raise UserError(f"--patchout {cfg.patchout}: a share, from 0 to below 1")
    if cfg.smoothing and cfg.loss == "bce":
        raise UserError("--smoothing is for --loss ce")
    log = common.Log(f"{stem}.jsonl")

    # model
    start = Encoder(EncoderConfig(**ckpt["encoder"])) if ckpt else open_encoder(cfg.init, cfg.model, pack.info)
    if isinstance(start, Ensemble):
        raise UserError(f"--init {cfg.init}: one encoder of ours can be fine-tuned; several, or others, can be probed: --probe mlp")
    stats = dict(fbank_mean=cfg.fbank_mean, fbank_std=cfg.fbank_std) if cfg.fbank_std else {}
    encoder = Encoder(dataclasses.replace(start.cfg, dropout=cfg.dropout, attention_dropout=cfg.dropout, layerdrop=cfg.layerdrop,
                                          grad_decay=cfg.grad_decay, **stats))
    encoder.load_state_dict(start.state_dict())
    encoder.recompute = cfg.recompute
    model = Classifier(encoder, pack.classes, multilabel=cfg.loss == "bce").to(device).train()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    optimizer = common.make_optimizer(model, cfg.lr, cfg.weight_decay, times=lambda name: lr_times(name, encoder.cfg.layers, cfg))
    step, place, best = 0, (0, 0), -1.0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        common.load_optimizer(optimizer, ckpt["optimizer"])
        step, place, best = ckpt["step"], tuple(ckpt["place"]), ckpt["best"]
    else:
        common.keep_old(path)
        common.keep_old(best_path)
    ddp = common.wrap(model, device, cfg.compile)
    clips = data.Clips([pack])
    log(f"{stem}: {len(train)} clips to train on, {len(valid)} to choose by, {len(test)} to test, {len(pack.classes)} classes, "
        f"{cfg.loss}, from {cfg.init}")

    # training
    def plan(epoch):
        drawn = train if cfg.balance == "none" else draw(train, targets, pack.classes, cfg.balance, (cfg.seed, epoch))
        return data.epoch_batches(clips.samples, cfg.batch_seconds * data.SAMPLE_RATE, (cfg.seed, epoch), [drawn], multiple=world)

    stream = data.Stream(plan, cfg.seed, place, rank, world)
    batches = iter(data.Loader(clips, stream, cfg.workers))
    stop = common.Stop()
    flops, rate = 0.0, common.matrix_rate(device, cfg.dtype) * world                # of a second of audio; of all devices
    window, seen, began = torch.zeros(3, dtype=torch.float64, device=device), 0.0, time.time()
    save = lambda path: common.save_checkpoint(path, kind="classifier", encoder=dataclasses.asdict(encoder.cfg), labels=pack.classes,
        multilabel=model.multilabel, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, place=place,
        config=dataclasses.asdict(cfg), best=best, pack=pack.info["id"])
    for step in tqdm(range(step, cfg.max_steps), initial=step, total=cfg.max_steps, desc="fine-tune",
                     disable=True if rank else None):
        common.seed_step(cfg.seed, step)
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        lr = common.lr_at(step, cfg.lr, cfg.warmup_steps, cfg.max_steps, "cosine")
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * lr
        batch = next(batches)
        truth = targets[batch["clip"]].float().to(device, non_blocking=True)
        batch = data.to_device(batch, device)
        wav, lengths, truth = augment(batch, truth, cfg, generator)
        # of SpecAug, the same for any split into parts; of patchout, the same on any rank
        chance = torch.rand(len(wav), 2, 2, generator=generator).to(device, non_blocking=True)
        noise = F.pad(batch["noise"], (0, num_tokens(max(wav.shape[1], MIN_SAMPLES)) - batch["noise"].shape[1]))
        size = max(1, int(cfg.device_seconds * data.SAMPLE_RATE // wav.shape[1])) if cfg.device_seconds else len(wav)
        parts = list(zip(wav.split(size), lengths.split(size), truth.split(size), chance.split(size), noise.split(size)))
        count = all_sum(torch.full((), float(len(wav)), device=device))
        for i, (wav, lengths, truth, chance, noise) in enumerate(parts):
            wav, real = prepare_clips(wav, lengths)
            x = encoder.normalise(fbank(wav))
            if cfg.spec_augment:
                x = spec_augment(x, 1 + (lengths - FRAME) // HOP, cfg.spec_augment, chance)
            keep = random_mask(noise, real, cfg.patchout)[0] if cfg.patchout else None
            inputs = patchify(x), None if batch["full"] else real, keep
            if not flops:                                                           # the backward pass costs twice the forward
                with torch.no_grad(), autocast(device, cfg.dtype):
                    flops = 3 * common.flops_of(lambda: model.eval().forward(*inputs)) / (wav.numel() / data.SAMPLE_RATE)
                model.train()
            with contextlib.nullcontext() if world == 1 or i == len(parts) - 1 else ddp.no_sync():
                with autocast(device, cfg.dtype):
                    logits = ddp(*inputs)
                loss = classification_loss(logits.float(), truth, cfg)
                (loss * world / count).backward()                               # DDP divides by world
            window += torch.stack([loss.detach(), (logits.argmax(1) == truth.argmax(1)).sum(), loss.new_full((), len(wav))])
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        place = stream.after(place)
        seen += batch["wav"].numel() / data.SAMPLE_RATE * world

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            loss, correct, n = all_sum(window).tolist()
            log(step=done, loss=loss / n, accuracy=correct / n, lr=lr, x_realtime=seen / (time.time() - began),
                mfu=flops * seen / (time.time() - began) / rate, epoch=place[0])
            window, seen, began = torch.zeros_like(window), 0.0, time.time()
        paused, step = time.time(), done
        if stop.now(done, device):
            save(path)
            stop.close()
            log(f"stopped at step {done}, saved in {path}; go on with --resume")
            raise SystemExit(0)
        if (done % cfg.eval_every == 0 and done < cfg.max_steps) or (done == cfg.max_steps and len(valid)):
            name, which = ("valid", valid) if len(valid) else ("test", test)
            p, truth = probabilities(model, pack, which, cfg, device), targets[which].double()
            found = score(p, truth, has_several(targets))
            loss = F.binary_cross_entropy(p, truth) if model.multilabel else -(p.log() * truth).sum(1).mean()
            log(step=done, **{f"{name}_score": found, f"{name}_loss": loss.item()})
            if cfg.best and found > best:
                best = found
                save(best_path)
        if done % cfg.save_every == 0 or done == cfg.max_steps:
            save(path)
        began += time.time() - paused
    stop.close()
    if cfg.best:
        chosen = read_checkpoint(best_path)
        model.load_state_dict(chosen["model"])
        log(f"{best_path}: step {chosen['step']}, the best on valid with {100 * best:.1f} %")
    return probabilities(model, pack, test, cfg, device)

def main(**flags):
    if flags.get("task", "custom") not in TASKS:
        raise UserError(f"--task {flags['task']}: choose one of {', '.join(TASKS)}")
    cfg = Config(**{**TASKS[flags.get("task", "custom")], **flags})
    if not cfg.data:
        raise UserError("--data PACK is missing: a labelled pack, made with python data.py")
    common.positive(cfg, "batch_seconds", "max_steps", "log_every", "eval_every", "save_every")
    rank, world, device = common.setup(cfg.device, cfg.seed)
    pack = data.Pack(cfg.data)
    splits, targets = splits_of(pack, cfg.test_split, cfg.fold, cfg.valid_share)
    several, name = has_several(targets), cfg.name or pack.path.name
    measure = "mAP" if several else "accuracy"
    probes = cfg.probe.split(",") if cfg.probe != "none" else ["linear"] * cfg.freeze
    if set(probes) - {"linear", "mlp", "knn", "knn_xares"}:
        raise UserError(f"--probe {cfg.probe}: choose of linear, mlp, knn, knn_xares")
    if cfg.ensemble and len(splits) > 1 and "{fold}" not in cfg.ensemble:
        raise UserError("--ensemble: every fold has models of its own; write {fold} in their names, as in "
                        "out/finetune_x_fold{fold}.pt, or choose one --fold")
    if probes and not cfg.ensemble:
        torch.manual_seed(cfg.seed)
        encoder = open_encoder(cfg.init, cfg.model, pack.info).to(device)
        x = extract(encoder, pack, np.arange(len(pack)), device, cfg.dtype, cfg.layers)
    results = {}            # what was tested -> {fold: metrics}
    for k, (train, valid, test) in splits.items():
        fold = f"_fold{k}" if k else ""
        stem = lambda kind: f"{cfg.out_dir}/{kind}_{name}{fold}"
        files = {label: label for label in probes}      # result -> kind of the files it is written to
        if cfg.ensemble:
            found, files = {}, {"their mean": "ensemble"}
            for path in cfg.ensemble.split(","):
                member = load(path.replace("{fold}", k)).to(device)
                if not isinstance(member, Classifier) or set(pack.classes) - set(member.labels):
                    raise UserError(f"--ensemble {path}: not a classifier of the classes of {pack.path}")
                place = [member.labels.index(c) for c in pack.classes]
                found[path] = probabilities(member, pack, test, cfg, device, path)[:, place]
            found["their mean"] = torch.stack(list(found.values())).mean(0)
        elif probes:
            chosen = valid if len(valid) else test      # X-ARES's folds
            clips = x[train], targets[train]
            fit = dict(linear=lambda: linear_probe(*clips, x[test], several),
                       mlp=lambda: mlp_probe(*clips, x[chosen], targets[chosen], x[test], several, cfg.seed),
                       knn=lambda: knn_probe(*clips, x[test]), knn_xares=lambda: knn_probe(*clips, x[test], xares=True))
            found = {kind: fit[kind]() for kind in probes}
        for kind in files.values():
            common.keep_old(f"{stem(kind)}.pt")
        if not files:
            found, files = {"": finetune(cfg, flags, pack, k, stem("finetune"), (train, valid, test), targets)}, {"": "finetune"}
        for label, scores in found.items():
            if label in files:
                values = report(stem(files[label]), pack, test, scores, targets, f"{cfg.data}{f' fold {k}' if k else ''}")
            else:                                       # a member of an ensemble
                values = {measure: score(scores, targets[test], several)}
            results.setdefault(label, {})[k] = values[measure]
    if rank == 0:
        mlp_note = " (epochs chosen on the test clips, as X-ARES does; --valid_share 0.2 is strict)"
        for label, scores in results.items():
            note = mlp_note if label == "mlp" and not len(valid) else ""
            head = " ".join(filter(None, (cfg.data, label)))
            for k, value in scores.items():
                print(f"{head}{f' fold {k}' if k else ''}: {measure} {100 * value:.1f} %{note}")
            if len(scores) > 1:
                values = 100 * np.array(list(scores.values()))
                print(f"{head}: {measure} {values.mean():.1f} +- {values.std(ddof=1):.1f} % over {len(values)} folds{note}")
    return results if len(probes) > 1 else results[label]

if __name__ == "__main__":
    common.run(main, Config, __doc__)
