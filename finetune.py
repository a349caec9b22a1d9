"""
Use an encoder: fine-tune it, or probe it frozen, on any labelled pack.

    python finetune.py --data packs/esc50 --init out/mam_iter1.pt               # fine-tune; a pack with folds: each in turn
    python finetune.py --data packs/esc50 --init out/mam_iter1.pt --freeze      # linear probe of the frozen encoder
    python finetune.py --data packs/esc50 --init scratch                        # the same model without pre-training
    torchrun --nproc_per_node 4 finetune.py --data packs/esc50 --init BEATs_iter3_plus_AS2M.pt

A pack whose splits are numbers has folds: each is tested once, trained on the others. Otherwise train on `train`, test on
`test` (or `eval`), or on `valid` with --test_split valid. Scores are those of the last step: accuracy, or mAP where clips
have several labels. Writes out/finetune_<pack>[_fold<k>].pt, readable by model.load, and .jsonl.
"""
import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
from common import UserError, all_sum, autocast
from model import PRESETS, Classifier, Encoder, EncoderConfig, load, masked_mean

@dataclass
class Config:
    data: str = ""                  # one labelled pack
    init: str = "scratch"           # encoder: ours, a released file, or scratch
    out_dir: str = "out"            # folder of checkpoints and logs
    name: str = ""                  # of the result, finetune_<name>; none = that of the pack
    model: str = "tiny"             # tiny | base | large, for scratch
    fold: str = ""                  # only these folds, as in 1,5; none = all
    test_split: str = ""            # split to test on; none = test or eval
    freeze: bool = False            # linear probe on features extracted once, instead of fine-tuning
    layers: str = "last"            # last | all: what the frozen probe sees, the mean of the last layer or mean and std of all
    loss: str = "auto"              # auto | ce | bce; auto = bce if clips have several labels
    batch_seconds: float = 80.0     # audio per step, all ranks together
    device_seconds: float = 0.0     # most audio per forward pass on one device, 0 = the rank's whole share
    max_steps: int = 600            # optimizer steps
    warmup_steps: int = 60          # of linear warm-up, then cosine decay to 0
    lr: float = 5e-4                # peak learning rate
    head_lr: float = 10.0           # the new head's, times this
    weight_decay: float = 0.05      # on matrices only
    mixup: float = 0.0              # Beta(mixup, mixup) of waveforms, 0 = none
    smoothing: float = 0.0          # label smoothing
    roll: bool = True               # random circular shift of the waveform
    layerdrop: float = 0.0          # share of layers left out
    grad_decay: float = 1.0         # gradient entering each layer times this (the released layer-wise decay)
    clip: float = 1.0               # largest gradient norm
    seed: int = 0                   # of everything
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16
    compile: bool = False           # torch.compile
    workers: int = 0                # data processes per rank
    log_every: int = 20             # steps between log lines
    eval_every: int = 200           # steps between tests (shown, never chosen by)
    save_every: int = 200           # steps between checkpoints
    resume: bool = False            # go on: finished folds are kept, an interrupted one continues

# -----------------------------------------------------------------------------
# labelled clips

def splits_of(pack, test_split="", fold=""):
    """{name: (train clips, test clips)}: one entry per fold, or one named "" for train/test packs. Also targets (clips, K)."""
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
        return {k: (np.flatnonzero(split != k), np.flatnonzero(split == k)) for k in wanted}, targets
    test = test_split or next((name for name in ("test", "eval") if name in names), None)
    if "train" not in names or test not in names:
        raise UserError(f"{pack.path} has the splits {', '.join(sorted(names)) or '(none)'}; training needs train and test, or folds 1, 2, ...")
    return {"": (np.flatnonzero(split == "train"), np.flatnonzero(split == test))}, targets

def has_several(targets):
    """Not exactly one label per clip: scores are then mAP."""
    return bool((targets.sum(1) != 1).any())

def average_precision(scores, truth):
    """Area under the precision-recall steps of one class, ties taken together. scores, truth: (n,); nan without positives."""
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))          # end of each group of equal scores
    hits = np.cumsum(truth)[last]
    if hits[-1] == 0:
        return np.nan
    return float((np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)).sum())

def score(scores, targets, multilabel):
    """Accuracy, or with several labels per clip mean average precision over the classes that occur. (n, K) each."""
    if not multilabel:
        return (scores.argmax(1) == targets.float().argmax(1)).double().mean().item()
    scores, targets = scores.double().numpy(), targets.numpy().astype(int)
    return float(np.nanmean([average_precision(s, t) for s, t in zip(scores.T, targets.T)]))

def gather_clips(clips, values, which):
    """Rows of all ranks: clips (m,) numbers and values (m, K) of this rank -> (len(which), K), in the order of which (ascending)."""
    full = torch.zeros(len(which), values.shape[1], device=values.device)
    full[torch.from_numpy(np.searchsorted(which, clips.numpy())).to(values.device)] = values
    return all_sum(full).cpu()

def clip_batches(clips, which, batch_seconds, rank=0, world=1):
    batches = data.epoch_batches(clips.samples, batch_seconds * data.SAMPLE_RATE, (0,), [which], shuffle=False)
    return [[(i,) for i in batch] for batch in batches[rank::world]]

# -----------------------------------------------------------------------------
# frozen probe

@torch.no_grad()
def extract(encoder, pack, which, device, dtype="auto", layers="last"):
    """Clip features: mean over tokens of the last layer (n, D), or mean and std of all layers (n, 2 (layers + 1) D)."""
    training = encoder.training
    encoder.eval()
    clips, rows, index = data.Clips([pack]), [], []
    batches = clip_batches(clips, which, 80.0, common.rank(), common.world())
    for batch in tqdm(data.loader(clips, batches), desc=f"features of {pack.path.name}", unit="batch", leave=False,
                      disable=True if common.rank() else None):
        index.append(batch["clip"])
        batch = data.to_device(batch, device)
        with autocast(device, dtype):
            x, valid = encoder.features(batch["wav"], batch["lengths"], layer=None if layers == "last" else "all")
        if layers == "last":
            rows.append(masked_mean(x.float(), valid))
        else:
            means = torch.stack([masked_mean(state.float(), valid) for state in x])
            squares = torch.stack([masked_mean(state.float().square(), valid) for state in x])
            rows.append(torch.cat([means, (squares - means.square()).clamp(min=0).sqrt()]).transpose(0, 1).flatten(1))
    encoder.train(training)
    width = encoder.cfg.dim * (1 if layers == "last" else 2 * (encoder.cfg.layers + 1))
    values = torch.cat(rows) if rows else torch.zeros(0, width, device=device)
    return gather_clips(torch.cat([torch.zeros(0, dtype=torch.long), *index]), values, which)

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

def linear_probe(x, y, x_test, y_test, multilabel=False):
    """Score of a linear classifier on standardised features; its penalty is chosen on a fifth of the training clips."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    y, y_test = y.float(), y_test.float()
    held = torch.arange(len(x)) % 5 == 0
    held = held[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    apply = lambda weights, x: (F.pad(x.double(), (0, 1), value=1.0) @ weights).float()
    penalty = max((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
                  key=lambda p: score(apply(fit_linear(x[~held], y[~held], p, multilabel), x[held]), y[held], multilabel))
    return score(apply(fit_linear(x, y, penalty, multilabel), x_test), y_test, multilabel)

def probe(encoder, pack, device, dtype="auto", layers="last", test_split="", fold=""):
    """Mean score of a linear classifier on the frozen encoder's clip features, over the pack's folds."""
    splits, targets = splits_of(pack, test_split, fold)
    x = extract(encoder, pack, np.arange(len(pack)), device, dtype, layers)
    several = has_several(targets)
    return float(np.mean([linear_probe(x[train], targets[train], x[test], targets[test], several) for train, test in splits.values()]))

# -----------------------------------------------------------------------------
# fine-tuning

def augment(batch, targets, cfg, generator):
    """Training-time changes of waveforms: circular shift within each clip, mixup of neighbours in a random order."""
    wav, lengths = batch["wav"], batch["lengths"]
    B, n = wav.shape
    if cfg.roll:
        shift = (torch.rand(B, generator=generator) * lengths.cpu()).long().to(wav.device)
        place = torch.arange(n, device=wav.device)[None]
        wav = wav.gather(1, torch.where(place < lengths[:, None], (place - shift[:, None]) % lengths[:, None], place))
    if cfg.mixup:
        gamma = torch._standard_gamma(torch.full((2, B), cfg.mixup), generator)         # Beta(a, a) = G1 / (G1 + G2)
        share = (gamma[0] / gamma.sum(0))[:, None].to(wav.device)
        other = torch.randperm(B, generator=generator).to(wav.device)
        wav = share * wav + (1 - share) * wav[other]
        targets = share * targets + (1 - share) * targets[other]
        lengths = torch.maximum(lengths, lengths[other])
    return wav, lengths, targets

def classification_loss(logits, targets, cfg):
    """Summed over clips. logits, targets: (B, K)"""
    if cfg.loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / targets.shape[1]
    return F.cross_entropy(logits, targets, label_smoothing=cfg.smoothing, reduction="sum")

@torch.no_grad()
def evaluate(model, clips, which, targets, cfg, device):
    """Logits of all test clips, each seen by exactly one rank -> (score, mean loss)."""
    model.eval()
    rows, index = [torch.zeros(0, targets.shape[1], device=device)], [torch.zeros(0, dtype=torch.long)]
    seconds = min(cfg.batch_seconds / common.world(), cfg.device_seconds or math.inf)
    for batch in data.loader(clips, clip_batches(clips, which, seconds, common.rank(), common.world())):
        index.append(batch["clip"])
        batch = data.to_device(batch, device)
        with autocast(device, cfg.dtype):
            rows.append(model.logits(batch["wav"], batch["lengths"]).float())
    model.train()
    logits, truth = gather_clips(torch.cat(index), torch.cat(rows), which), targets[which].float()
    return dict(test_score=score(logits, truth, has_several(targets)), test_loss=(classification_loss(logits, truth, cfg) / len(which)).item())

def finetune(cfg, flags, pack, fold, train, test, targets):
    """Train on the clips `train`, return the last step's score on `test`."""
    rank, world, device = common.rank(), common.world(), common.setup(cfg.device, cfg.seed)[2]
    name = cfg.name or pack.path.name
    path, ckpt = f"{cfg.out_dir}/finetune_{name}{f'_fold{fold}' if fold else ''}.pt", None
    if cfg.resume and Path(path).exists():
        ckpt = common.read_training(path)
        cfg = Config(**{**ckpt["config"], **flags})
        for key in ("data", "test_split"):
            if key not in flags and getattr(cfg, key) != getattr(Config(**flags), key):
                raise UserError(f"{path} was begun with --{key} {getattr(cfg, key)}; type it again to resume")
        if ckpt["step"] >= cfg.max_steps and ckpt["result"]:
            return ckpt["result"]
    cfg = dataclasses.replace(cfg, loss=("bce" if has_several(targets) else "ce") if cfg.loss == "auto" else cfg.loss)
    log = common.Log(path.replace(".pt", ".jsonl"))

    # model
    if ckpt:
        encoder = Encoder(EncoderConfig(**ckpt["encoder"]))
    elif cfg.init == "scratch":
        encoder = Encoder(dataclasses.replace(PRESETS[cfg.model], fbank_mean=pack.info["fbank_mean"], fbank_std=pack.info["fbank_std"]))
    else:
        encoder = load(cfg.init)
        encoder = encoder.encoder if isinstance(encoder, Classifier) else encoder
    encoder.cfg.layerdrop, encoder.cfg.grad_decay = cfg.layerdrop, cfg.grad_decay
    model = Classifier(encoder, pack.classes, multilabel=cfg.loss == "bce").to(device).train()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    optimizer = common.make_optimizer(model, cfg.lr, cfg.weight_decay, times=lambda name: cfg.head_lr if name.startswith("head") else 1.0)
    step, place = 0, (0, 0)
    if ckpt:
        model.load_state_dict(ckpt["model"])
        common.load_optimizer(optimizer, ckpt["optimizer"])
        step, place = ckpt["step"], tuple(ckpt["place"])
    else:
        common.keep_old(path)
    ddp = common.wrap(model, device, cfg.compile)
    clips = data.Clips([pack])
    log(f"{name}{f' fold {fold}' if fold else ''}: {len(train)} clips to train on, {len(test)} to test, {len(pack.classes)} classes, "
        f"{cfg.loss}, from {cfg.init}")

    # training
    plan = lambda epoch: data.epoch_batches(clips.samples, cfg.batch_seconds * data.SAMPLE_RATE, (cfg.seed, epoch), [train], multiple=world)
    stream = data.Stream(plan, cfg.seed, place, rank, world)
    batches = iter(data.loader(clips, stream, cfg.workers))
    stop, result = common.Stop(), {}
    window, seen, began = torch.zeros(3, dtype=torch.float64, device=device), 0.0, time.time()
    save = lambda: common.save_checkpoint(path, kind="classifier", encoder=dataclasses.asdict(encoder.cfg), labels=pack.classes,
        multilabel=model.multilabel, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, place=place,
        config=dataclasses.asdict(cfg), result=result)
    for step in tqdm(range(step, cfg.max_steps), initial=step, total=cfg.max_steps, desc="fine-tune", disable=True if rank else None):
        common.seed_step(cfg.seed, step)
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * common.lr_at(step, cfg.lr, cfg.warmup_steps, cfg.max_steps, "cosine")
        batch = next(batches)
        truth = targets[batch["clip"]].float().to(device)
        batch = data.to_device(batch, device)
        wav, lengths, truth = augment(batch, truth, cfg, generator)
        size = max(1, int(cfg.device_seconds * data.SAMPLE_RATE // wav.shape[1])) if cfg.device_seconds else len(wav)
        parts = list(zip(wav.split(size), lengths.split(size), truth.split(size)))
        count = all_sum(torch.tensor(float(len(wav)), device=device))
        for i, (wav, lengths, truth) in enumerate(parts):
            with contextlib.nullcontext() if world == 1 or i == len(parts) - 1 else ddp.no_sync():
                with autocast(device, cfg.dtype):
                    logits = ddp(*encoder.patches(wav, lengths))
                loss = classification_loss(logits.float(), truth, cfg)
                (loss * world / count).backward()                               # DDP divides by world
            window += torch.stack([loss.detach(), (logits.argmax(1) == truth.argmax(1)).sum(), torch.tensor(len(wav), device=device)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        place = stream.after(place)
        seen += batch["wav"].numel() / data.SAMPLE_RATE * world

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            loss, correct, n = all_sum(window).tolist()
            log(step=done, loss=loss / n, accuracy=correct / n, lr=optimizer.param_groups[0]["lr"], x_realtime=seen / (time.time() - began), epoch=place[0])
            window, seen, began = torch.zeros_like(window), 0.0, time.time()
        paused, step = time.time(), done
        if stop.now(done, device):
            save()
            stop.close()
            log(f"stopped at step {done}, saved in {path}; go on with --resume")
            raise SystemExit(0)
        if done % cfg.eval_every == 0 or done == cfg.max_steps:
            result = evaluate(model, clips, test, targets, cfg, device)
            log(step=done, **result)
        if done % cfg.save_every == 0 or done == cfg.max_steps:
            save()
        began += time.time() - paused
    stop.close()
    return result

def main(**flags):
    cfg = Config(**flags)
    if not cfg.data:
        raise UserError("--data PACK is missing: a labelled pack, made with python data.py")
    common.positive(cfg, "batch_seconds", "max_steps", "log_every", "eval_every", "save_every")
    rank, world, device = common.setup(cfg.device, cfg.seed)
    pack = data.Pack(cfg.data)
    splits, targets = splits_of(pack, cfg.test_split, cfg.fold)
    measure = "mAP" if has_several(targets) else "accuracy"
    scores = {}
    if cfg.freeze:
        torch.manual_seed(cfg.seed)
        encoder = (Encoder(dataclasses.replace(PRESETS[cfg.model], fbank_mean=pack.info["fbank_mean"], fbank_std=pack.info["fbank_std"]))
                   if cfg.init == "scratch" else load(cfg.init))
        encoder = (encoder.encoder if isinstance(encoder, Classifier) else encoder).to(device)
        x = extract(encoder, pack, np.arange(len(pack)), device, cfg.dtype, cfg.layers)
        several = has_several(targets)
        scores = {k: linear_probe(x[train], targets[train], x[test], targets[test], several) for k, (train, test) in splits.items()}
    else:
        for k, (train, test) in splits.items():
            scores[k] = finetune(cfg, flags, pack, k, train, test, targets)["test_score"]
    if rank == 0:
        for k, value in scores.items():
            print(f"{cfg.data}{f' fold {k}' if k else ''}: {measure} {100 * value:.1f} %")
        if len(scores) > 1:
            print(f"{cfg.data}: {measure} {100 * np.mean(list(scores.values())):.1f} +- {100 * np.std(list(scores.values())):.1f} % over {len(scores)} folds")
    return scores

if __name__ == "__main__":
    common.run(main, Config, __doc__)
