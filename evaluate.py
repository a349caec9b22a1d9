"""
Judge encoders on any labelled pack: splits, scores, frozen probes, ensembles.

    python evaluate.py --data packs/esc50 --init out/mam_iter1.pt           # linear probe
    python evaluate.py --data packs/esc50 --init out/mam_iter1.pt --probe linear,mlp,knn
    python evaluate.py --data packs/esc50 --init a.pt,b.pt --probe mlp      # features side by side
    python evaluate.py --data packs/as --ensemble out/x.pt,out/y.pt         # fine-tuned, and their mean

A pack whose splits are numbers has folds: each is tested once, with the others to train on. Otherwise
`train` and `test` (or `eval`), and `valid` if there is one. Writes into --out_dir, named after probe or
ensemble and pack: .npz (paths, targets, scores of the test recordings), .csv (per class) and .jsonl (log).
Scores are per recording: of the clips that a long one was cut into, features or probabilities are averaged.
"""

import dataclasses
import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common
import data
from audio import SAMPLE_RATE, num_tokens
from common import UserError, autocast, check
from model import PRESETS, Classifier, Encoder, load, load_encoder, masked_mean
from recipes.packs import splits_of, write_table

@dataclass
class Config:
    data: str = ""                  # one labelled pack
    init: str = "scratch"           # ours, a released file, scratch, module:function; or a.pt,b.pt
    cfg: str = ""                   # of a file that says no shape: tiny | base | large, or a .json, a .yaml
    fbank: str = ""                 # mean and std of the input, as in 15.29130,5.90532; none = the file's
    probe: str = "linear"           # of linear, mlp, knn one or several, as in mlp,knn
    layers: str = "last"            # last | all: the mean of the last layer, or mean and std of all
    ensemble: str = ""              # instead: these fine-tuned files and their mean; {fold} = the fold
    out_dir: str = "out"            # folder of the results
    name: str = ""                  # of the results, none = that of the pack
    model: str = "tiny"             # tiny | base | large, for scratch
    fold: str = ""                  # only these folds, as in 1,5; none = all
    test_split: str = ""            # split to test on; none = test or eval
    valid_share: float = 0.0        # of the training clips held out as valid, if the pack has no such split
    seed: int = 0                   # of a scratch encoder and the MLP
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16

# -----------------------------------------------------------------------------
# recordings


def task_of(cfg, pack):
    """Return {fold: (train, valid, test) recordings}, their Labels, and whether some have several: then mAP.

    If none has several, recordings without a label are no example of the task: left out, and counted.
    """
    splits = splits_of(pack, cfg.test_split, cfg.fold, cfg.valid_share)
    labels, _ = pack.table
    used = np.unique(np.concatenate(sum(splits.values(), ())))
    count = labels.counts[used]
    several = bool((count > 1).any())
    bare = used[count == 0]
    if several:
        text = f"mAP, for {(count > 1).sum()} of {len(used)} recordings have several labels"
    else:
        text = "accuracy, for no recording has several labels"
        if len(bare):
            text += f"; {len(bare)} without one are left out"
        for fold in splits:
            splits[fold] = tuple(np.setdiff1d(part, bare) for part in splits[fold])
    for fold, parts in splits.items():
        for name, part in zip(("train", "valid", "test"), parts):
            check(
                labels.counts[part].any() or name == "valid" and not len(part),
                f"{pack.path}{f', fold {fold}' if fold else ''}: nothing in {name} has a label"
            )
    if not common.rank():
        print(f"{pack.path}: {text}")
    return splits, labels, several


@torch.no_grad()
def over_recordings(pack, recordings, function, device, dtype="auto", text=""):
    """Return function(wav, lengths) -> (B, K) of recordings: (len(recordings), K) on the CPU, in order.

    The clips that a recording was cut into weigh by their tokens. Every clip is seen by exactly one rank,
    in batches that are the same for any number of ranks. recordings: ascending numbers.
    """
    clips = np.flatnonzero(np.isin(pack.index["row"], recordings))
    batches = data.by_length(pack.samples, clips, 80 * SAMPLE_RATE)
    rows = []
    for batch in data.walk(pack, batches[common.rank() :: common.world()], device, text):
        with autocast(device, dtype):
            values = function(batch["wav"], batch["lengths"]).cpu()
        rows += zip(batch["clip"].tolist(), values)

    if common.world() > 1:
        parts = [None] * common.world()
        dist.all_gather_object(parts, rows)
        rows = sum(parts, [])
    rows.sort(key=lambda row: row[0])
    values = torch.stack([value for _, value in rows])
    if len(clips) == len(recordings):
        return values

    weight = torch.from_numpy(num_tokens(pack.samples[clips]).astype(float))[:, None]
    position = torch.from_numpy(np.searchsorted(recordings, pack.index["row"][clips]))
    total = torch.zeros(len(recordings), 1 + values.shape[1], dtype=torch.double)
    total.index_add_(0, position, torch.cat([weight, weight * values], 1))
    return (total[:, 1:] / total[:, :1]).to(values.dtype)


# -----------------------------------------------------------------------------
# scores


def average_precision(scores, truth):
    """Return the average precision of one class, ties taken together; nan without positives. (n,) each"""
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    # where a group of equal scores ends
    last = np.flatnonzero(np.append(np.diff(scores), 1))
    hits = np.cumsum(truth)[last]
    precision = hits / (last + 1)
    with np.errstate(invalid="ignore"):
        return (precision * np.diff(hits, prepend=0)).sum() / hits[-1]


def precisions(scores, targets):
    """Return the average precision of each class, (K,). scores, targets: (n, K) tensors"""
    columns = zip(scores.double().numpy().T, targets.bool().numpy().T)
    return np.array([average_precision(*column) for column in columns])


def score(scores, targets, several):
    """Return accuracy, or with several labels per clip the mean average precision of classes that occur."""
    if several:
        return float(np.nanmean(precisions(scores, targets)))
    return (scores.argmax(1) == targets.float().argmax(1)).double().mean().item()


def write_results(stem, pack, test, scores, labels, several, text=""):
    """Return metrics of scores (n, K) of recordings; rank 0 writes stem.npz, .csv, a line of .jsonl.

    mAP is the mean over the classes that occur (classes_scored).
    """
    targets = labels[test]
    precision = precisions(scores, targets)
    result = dict(
        mAP=float(np.nanmean(precision)),
        classes_scored=int(np.isfinite(precision).sum()),
        classes=len(pack.classes),
        recordings=len(test)
    )
    if not several:
        result = dict(accuracy=score(scores, targets, several)) | result
    common.Log(f"{stem}.pt")(text, **result)
    if common.rank():
        return result

    rows = pack.rows()
    content = dict(
        paths=[rows[recording]["path"] for recording in test],
        classes=pack.classes,
        targets=targets.numpy(),
        scores=scores.numpy()
    )
    common.write_whole(Path(f"{stem}.npz"), lambda file: np.savez_compressed(file, **content))
    table = zip(pack.classes, targets.sum(0).tolist(), precision)
    write_table(f"{stem}.csv", ["class", "recordings", "average_precision"], table)
    return result


def stem_of(cfg, kind, pack, fold):
    """Return the path, without its ending, of the results of a fold, and what to call them."""
    ending, text = (f"_fold{fold}", f" fold {fold}") if fold else ("", "")
    return f"{cfg.out_dir}/{kind}_{cfg.name or pack.path.name}{ending}", cfg.data + text


def print_results(results, measure, text, note=""):
    """Print {fold: value} and, of several folds, their mean and standard deviation, on rank 0."""
    if common.rank():
        return
    for fold, value in results.items():
        print(
            f"{text}{f' fold {fold}' if fold else ''}: {measure} {100 * value:.1f} %{note}"
        )
    if len(results) > 1:
        values = 100 * np.array(list(results.values()))
        print(
            f"{text}: {measure} {values.mean():.1f} +- {values.std(ddof=1):.1f} % "
            f"over {len(values)} folds{note}"
        )


# -----------------------------------------------------------------------------
# encoders


class Ensemble(nn.Module):
    """Several encoders as one: their features side by side.

    Each clip's tokens are brought to the longest member's number by linear interpolation
    (align_corners=False; the ICME 2025 submission to X-ARES). members: Encoders, or any modules that map
    wav (B, n) in [-1, 1] at 16 kHz to (B, T, D). Those know no padding, so they get one clip at a time: a
    clip in a padded batch gives what it gives alone.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members).eval()

    def features(self, wav, lengths=None, layer=None):
        """Do as Encoder.features: x (B, T, sum of D), valid (B, T). There is only the last layer."""
        check(layer is None, "--layers all is for a single encoder of ours")
        if lengths is None:
            lengths = [wav.shape[1]] * len(wav)
        clips = [self.tokens(clip[None, :n]) for clip, n in zip(wav, lengths)]
        T = torch.tensor([len(clip) for clip in clips], device=wav.device)
        valid = torch.arange(T.max(), device=wav.device) < T[:, None]
        return nn.utils.rnn.pad_sequence(clips, batch_first=True), valid

    def tokens(self, wav):
        """(1, n) -> (T, sum of D)"""
        tokens = []
        for member in self.members:
            ours = isinstance(member, (Encoder, Ensemble))
            tokens.append(member.features(wav)[0] if ours else member(wav))
        longest = max(x.shape[1] for x in tokens)
        stretched = [F.interpolate(x.mT.float(), longest, mode="linear") for x in tokens]
        return torch.cat(stretched, 1)[0].T


def open_encoder(init, model="tiny", info=None, cfg="", fbank=""):
    """Open --init: a checkpoint, ours or released; "scratch"; several by commas; or module:function.

    That is imported, which runs its code, and called for a torch module (wav -> tokens). cfg, fbank: as in
    model.load.
    """
    if "," in init:
        return Ensemble([open_encoder(one, model, info, cfg, fbank) for one in init.split(",")])
    if init == "scratch":
        statistics = {name: info[name] for name in ("fbank_mean", "fbank_std")}
        return Encoder(dataclasses.replace(PRESETS[model], **statistics))
    if Path(init).exists() or not re.fullmatch(r"[a-zA-Z_][\w.]*:[a-zA-Z_]\w*", init):
        return load_encoder(init, cfg or None, common.mean_and_std(fbank))
    sys.path.append(os.getcwd())
    module, _, function = init.partition(":")
    try:
        return Ensemble([getattr(importlib.import_module(module), function)()])
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"--init {init}: {error}; it has to be an importable module and a function in it "
            "that returns a torch module"
        ) from None


# -----------------------------------------------------------------------------
# frozen probes: x (n, D) features and y (n, K) bool targets to train on -> scores (m, K) of those to test


def extract(encoder, pack, recordings, device, dtype="auto", layers="last"):
    """Return features of recordings: the mean over tokens of the last layer, (len(recordings), D) float32.

    With layers="all" mean and standard deviation of all, (len(recordings), 2 (layers + 1) D).
    """

    def pooled(wav, lengths):
        if layers == "last":
            x, valid = encoder.features(wav, lengths)
            return masked_mean(x.float(), valid)
        states, valid = encoder.features(wav, lengths, layer="all")
        x = states.float().permute(1, 2, 0, 3).flatten(2)  # (B, T, (layers + 1) D)
        return masked_mean(torch.cat([x, x.square()], -1), valid)

    encoder.eval()
    text = f"features of {pack.path.name}"
    x = over_recordings(pack, recordings, pooled, device, dtype, text)
    check(x.isfinite().all(), f"{text}: some are not finite; this encoder is of no use (--dtype float32?)")
    if layers == "all":
        mean, square = x.chunk(2, 1)
        x = torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], 1)
    return x


def classification_loss(logits, targets, several):
    """Return the mean cross-entropy, or of several labels per clip the mean binary one. (n, K) each"""
    targets = targets.to(logits.dtype)
    if several:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)


def linear(x, weights):
    """x (n, D), weights (D + 1, K) -> (n, K)"""
    return F.pad(x.double(), (0, 1), value=1.0) @ weights


def fit_linear(x, y, penalty, several=False):
    """Minimise the mean loss + penalty / 2 |W|^2 by L-BFGS. Returns (D + 1, K)."""
    weights = torch.zeros(
        x.shape[1] + 1, y.shape[1], dtype=torch.double, requires_grad=True
    )
    solver = torch.optim.LBFGS(
        [weights], max_iter=150, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = classification_loss(linear(x, weights), y, several)
        loss = loss + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach()


def linear_probe(x, y, x_test, several=False):
    """Fit a linear classifier on standardised features.

    Its penalty is chosen on a fifth of the training clips.
    """
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % 5 == 0

    values = {}
    for penalty in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
        weights = fit_linear(x[~held], y[~held], penalty, several)
        values[penalty] = score(linear(x[held], weights), y[held], several)
    chosen = max(values, key=values.get)
    return linear(x_test, fit_linear(x, y, chosen, several)).float()


def mlp_probe(x, y, x_valid, y_valid, x_test, several=False, seed=0):
    """Do X-ARES's first track: LayerNorm and a linear layer, Adam, 10 epochs, the best on valid."""
    torch.manual_seed(42 + seed)
    model = nn.Sequential(
        nn.LayerNorm(x.shape[1]),
        nn.Linear(x.shape[1], y.shape[1])
    )
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=1e-4)
    best, scores = -1.0, None
    for epoch in range(10):
        for batch in torch.randperm(len(x)).split(32):
            classification_loss(model(x[batch]), y[batch], several).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            value = score(model(x_valid), y_valid, several)
            if value > best:
                best, scores = value, model(x_test)
    return scores


def knn_probe(x, y, x_test, k=10, temperature=0.07):
    """Do X-ARES's second track: labels of the k nearest clips by cosine, weighted by softmax(cosine / t)."""
    x, rows = F.normalize(x), []
    for part in F.normalize(x_test).split(256):
        near, index = (part @ x.T).topk(min(k, len(x)))
        weight = (near / temperature).softmax(1)
        rows.append((weight[..., None] * y[index]).sum(1))
    return torch.cat(rows)


class Frozen:
    """A frozen encoder's features of the recordings of a pack, for probes on any of its folds."""

    def __init__(self, encoder, pack, splits, labels, device, dtype="auto", layers="last"):
        self.labels = labels
        self.recordings = np.unique(np.concatenate(sum(splits.values(), ())))
        self.x = extract(encoder, pack, self.recordings, device, dtype, layers)

    def of(self, recordings):
        """Return features (n, D) and targets (n, K) of recordings."""
        return self.x[np.searchsorted(self.recordings, recordings)], self.labels[recordings]

    def probe(self, kind, split, several, seed=0):
        """Return the scores of the test recordings by one kind of probe."""
        train, valid, test = map(self.of, split)
        if kind == "linear":
            return linear_probe(*train, test[0], several)
        if kind == "knn":
            return knn_probe(*train, test[0])
        chosen = valid if len(split[1]) else test  # as X-ARES does with folds
        return mlp_probe(*train, *chosen, test[0], several, seed)


def probe_score(encoder, pack, device, dtype="auto"):
    """Return the mean score of a linear probe of the frozen encoder, over the pack's folds."""
    splits, labels, several = task_of(Config(), pack)
    frozen = Frozen(encoder, pack, splits, labels, device, dtype)
    values = [
        score(frozen.probe("linear", split, several), labels[split[2]], several)
        for split in splits.values()
    ]
    return float(np.mean(values))


# -----------------------------------------------------------------------------
# fine-tuned classifiers


def probabilities(model, pack, recordings, device, dtype="auto"):
    """Return a classifier's probabilities of recordings, (len(recordings), K) float64."""

    def of_clips(wav, lengths):
        logits = model.logits(wav, lengths).double()  # float32 sigmoids saturate, which makes ties
        return logits.sigmoid() if model.multilabel else logits.softmax(1)

    model.eval()
    values = over_recordings(pack, recordings, of_clips, device, dtype, "probabilities")
    model.train()
    return values


def ensemble(paths, fold, pack, test, device, dtype="auto"):
    """Return {path: probabilities of each fine-tuned file, "ensemble": their mean}, in the pack's classes."""
    scores = {}
    for path in paths:
        member = load(path.replace("{fold}", fold)).to(device)
        fits = isinstance(member, Classifier) and set(pack.classes) <= set(member.labels)
        check(fits, f"--ensemble {path}: not a classifier of the classes of {pack.path}")
        order = [member.labels.index(name) for name in pack.classes]
        scores[path] = probabilities(member, pack, test, device, dtype)[:, order]
        check(scores[path].isfinite().all(), f"--ensemble {path}: its probabilities are not finite")
    return scores | dict(ensemble=torch.stack(list(scores.values())).mean(0))


def main(**flags):
    cfg = Config(**flags)
    common.check_flags(cfg)
    check(cfg.data, "--data PACK is missing: a labelled pack, made with python data.py")
    probes = cfg.probe.split(",")
    check(
        {"linear", "mlp", "knn"}.issuperset(probes),
        f"--probe {cfg.probe}: choose of linear, mlp, knn"
    )
    _, _, device = common.setup(cfg.device, cfg.seed)
    pack = data.Pack(cfg.data)
    splits, labels, several = task_of(cfg, pack)
    if cfg.ensemble:
        check(
            len(splits) == 1 or "{fold}" in cfg.ensemble,
            "--ensemble: every fold has models of its own; write {fold} in their names, as in "
            "out/finetune_x_fold{fold}.pt, or choose one --fold"
        )
    else:
        encoder = open_encoder(cfg.init, cfg.model, pack.info, cfg.cfg, cfg.fbank).to(device)
        frozen = Frozen(encoder, pack, splits, labels, device, cfg.dtype, cfg.layers)

    results = {}  # what was tested -> {fold: value}
    for fold, split in splits.items():
        test = split[2]
        if cfg.ensemble:
            scores = ensemble(cfg.ensemble.split(","), fold, pack, test, device, cfg.dtype)
        else:
            scores = {kind: frozen.probe(kind, split, several, cfg.seed) for kind in probes}
        for name, values in scores.items():
            results.setdefault(name, {})[fold] = score(values, labels[test], several)
            if name in ("linear", "mlp", "knn", "ensemble"):
                stem, text = stem_of(cfg, name, pack, fold)
                common.keep_old(f"{stem}.pt")
                write_results(stem, pack, test, values, labels, several, text)

    for name, values in results.items():
        note = ""
        if name == "mlp" and not len(split[1]):
            note = " (epochs chosen on what is tested, as X-ARES does; --valid_share 0.2 is strict)"
        print_results(values, "mAP" if several else "accuracy", f"{cfg.data} {name}", note)
    return results if len(results) > 1 else results[name]


if __name__ == "__main__":
    common.run(main, Config, __doc__)
