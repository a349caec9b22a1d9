"""
Fine-tune an encoder on any labelled pack. (Frozen probes and ensembles: evaluate.py.)

    python finetune.py --data packs/esc50 --init out/mam_iter1.pt       # a pack with folds: each in turn
    python finetune.py --data packs/esc50 --init scratch                # what pre-training was worth
    python finetune.py --data packs/esc50 --init BEATs_iter3.pt --task esc50    # the paper's recipe (Table 4)
    torchrun --nproc_per_node 4 finetune.py --data packs/as20k --init BEATs_iter3.pt --task as20k

A pack whose splits are numbers has folds: each is tested once, trained on the others. Otherwise train on
`train`, test once on `test` (or `eval`), watch `valid`. Tested is the last step, or with --best the one that
is best on valid. Scores are per recording: of the clips that a long one was cut into, probabilities are
averaged. Writes into --out_dir finetune_<pack>[_fold<k>].pt (for model.load), .jsonl (the log), .npz (paths,
targets, scores of the test recordings) and .csv (per class).
"""
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
from audio import FRAME, HOP, MELS, SAMPLE_RATE, fbank, num_tokens, patchify, valid_tokens
from common import all_sum, autocast, check, read_checkpoint
from evaluate import (
    Ensemble,
    open_encoder,
    print_results,
    probabilities,
    score,
    stem_of,
    task_of,
    write_results
)
from model import PLAIN, Classifier, flops_of, random_mask, recompute_blocks, unpack, with_settings

@dataclass
class Config:
    data: str = ""                  # one labelled pack
    task: str = "custom"            # custom | as2m | as20k | esc50 | ks1 | ks2 | er: CPU defaults, or Table 4
    init: str = "scratch"           # ours, a released file, or scratch
    out_dir: str = "out"            # folder of checkpoints, logs and predictions
    name: str = ""                  # of the result, finetune_<name>; none = that of the pack
    model: str = "tiny"             # tiny | base | large, for scratch
    fold: str = ""                  # only these folds, as in 1,5; none = all
    test_split: str = ""            # split to test on; none = test or eval
    valid_share: float = 0.0        # of the training clips held out as valid, if none is (SUPERB's ER: 0.2)
    best: bool = False              # test the step with the best score on valid, instead of the last
    loss: str = "auto"              # auto | ce | bce; auto = bce if clips have several labels
    batch_seconds: float = 80.0     # audio per step, all ranks together
    device_seconds: float = 0.0     # most audio per forward pass on one device, 0 = the rank's whole share
    max_steps: int = 1000           # optimizer steps
    warmup_steps: int = 100         # of linear warm-up, then cosine decay to 0
    lr: float = 5e-4                # peak learning rate
    head_lr: float = 10.0           # the new head's, times this
    lr_decay: float = 1.0           # learning rate of each layer, times this per layer below the head (BEiT)
    grad_decay: float = 1.0         # gradient entering each layer, times this (far weaker: Adam rescales)
    weight_decay: float = 0.05      # on matrices only
    balance: str = "none"           # none | weights | unknown: clips weigh 1000 / count; or KS1's epochs
    mixup: float = 0.0              # Beta(mixup, mixup) of waveforms, 0 = none
    spec_augment: float = 0.0       # widest mask, as a share of each axis; 0 = none
    patchout: float = 0.6           # share of the patches left out of every training clip (PaSST)
    roll: bool = True               # random circular shift of the waveform
    smoothing: float = 0.0          # label smoothing, of ce
    dropout: float = 0.0            # of layers and attention
    layerdrop: float = 0.0          # share of layers left out
    fbank_mean: float = 0.0         # of the input, with fbank_std
    fbank_std: float = 0.0          # 0 = the encoder's own statistics; from scratch the pack's
    clip: float = 1.0               # largest gradient norm
    seed: int = 0                   # of everything that is random
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16
    compile: bool = False           # torch.compile
    recompute: bool = False         # recompute blocks in the backward pass: slower, far less memory
    workers: int = 1                # threads per rank that make batches ahead, 0 = none
    log_every: int = 20             # steps between log lines
    eval_every: int = 200           # steps between evaluations on valid, or without one on test (only shown)
    save_every: int = 200           # steps between checkpoints, of which the last two are kept
    keep_every: int = 0             # steps between those that are kept for good, 0 = none
    resume: bool = False            # go on: finished folds are kept, an interrupted one continues

# Table 4 of the paper. (?) = its flattened text leaves open which column a value stands in. Optimizer
# everywhere: AdamW, betas (0.9, 0.98), eps 1e-8 (not given). Not in the table: the clipping of gradients (1.0
# as ESPnet), a learning rate of the head's own, patchout. Where this departs from the paper: "layer-wise
# decay" is the released code's, of gradients (grad_decay); BCE is a mean over classes; the head starts at
# zero; KS1's silence is in fixed pieces of 1 s. AudioSet's mean and std are the encoder's own: 15.41663 and
# 6.55582 in a released file. KS and ER choose on valid, as SUPERB does. eval_every, save_every: 2 % of the
# time at most.
TABLE4 = dict(          # as2m     as20k     esc50     ks1       ks2       er        KS and ER columns (?)
    max_steps=         (50000,    80000,    80000,    80000,    80000,    80000),
    warmup_steps=      (5000,     8000,     8000,     8000,     8000,     8000),     # printed as epochs
    batch_seconds=     (6400.0,   800.0,    300.0,    100.0,    100.0,    300.0),
    device_seconds=    (400.0,    200.0,    75.0,     25.0,     25.0,     75.0),     # its GPUs: 16 and 4
    grad_decay=        (0.6,      0.3,      0.2,      0.3,      0.3,      1.0),
    lr=                (1e-4,     3e-5,     3e-5,     1e-4,     1e-4,     3e-5),
    balance=           ("weights", "none",  "none",   "unknown", "none",  "none"),
    roll=              (True,     True,     True,     False,    False,    True),     # (?)
    spec_augment=      (0.3,      0.3,      0.2,      0.3,      0.3,      0.15),     # (?) as20k: or 0.2
    mixup=             (0.8,      0.8,      0.0,      0.8,      0.8,      0.0),      # (?) as2m: or 0.0
    loss=              ("bce",    "bce",    "ce",     "bce",    "bce",    "ce"),
    fbank_mean=        (0.0,      0.0,      11.72215, 11.43905, 11.41045, 12.0889),
    fbank_std=         (0.0,      0.0,      10.60431, 5.64913,  5.67857,  4.29147),
    best=              (False,    False,    False,    True,     True,     True),
    valid_share=       (0.0,      0.0,      0.0,      0.0,      0.0,      0.2),
    eval_every=        (1000,     4000,     2000,     2000,     2000,     1000),
    save_every=        (2500,     4000,     5000,     5000,     5000,     5000)
)
TASKS = {"custom": {}}
for column, name in enumerate(("as2m", "as20k", "esc50", "ks1", "ks2", "er")):
    TASKS[name] = {key: row[column] for key, row in TABLE4.items()}
    TASKS[name] |= dict(dropout=0.0, weight_decay=0.01, head_lr=1.0, patchout=0.0)
    TASKS[name]["layerdrop"] = 0.1  # (?) the released AS-2M file says 0.05
common.TABLES["task"] = TASKS

# -----------------------------------------------------------------------------
# what a step sees


def draw(train, labels, classes, balance, key):
    """Return the clips of one epoch, with repeats: a function of key, (seed, epoch).

    train: (n,) clip numbers; labels: of all their labels, position in train and class, two arrays.
    "weights": len(train) draws with replacement, each clip with the sum over its classes of 1000 / (clips
    of the class + 0.01) (AST). "unknown": all of the class unknown once, and half as many of every other
    class: its whole list as often as it fits, then a random rest (the paper's footnote to KS1).
    """
    if balance == "none":
        return train
    random = np.random.default_rng([*key, 1])  # not the numbers that order the batches
    clip, label = labels
    if balance == "weights":
        rarity = 1000 / (np.bincount(label) + 0.01)
        weight = np.bincount(clip, rarity[label], len(train))
        return random.choice(train, len(train), p=weight / weight.sum())

    unknown = [k for k, name in enumerate(classes) if name.strip("_") == "unknown"]
    check(
        len(unknown) == 1,
        "--balance unknown needs a class named unknown or _unknown_; the pack has "
        f"{', '.join(classes[:40])}"
    )
    half = (label == unknown[0]).sum() // 2
    drawn = []
    for k in np.unique(label):
        clips = train[clip[label == k]]
        if k != unknown[0]:
            whole = np.tile(clips, half // len(clips))
            clips = np.append(whole, random.choice(clips, half % len(clips), replace=False))
        drawn.append(clips)
    return np.concatenate(drawn)


def augment(wav, lengths, targets, cfg, random):
    """Return wav, lengths and targets after a circular shift of each clip and mixup with another.

    wav: (B, n); lengths: (B,); targets: (B, K); random: a generator of the CPU.
    """
    B, n = wav.shape
    if cfg.roll:
        chance = common.send(torch.rand(B, generator=random), wav.device)
        shift = (chance * lengths).long()
        sample = torch.arange(n, device=wav.device).expand(B, n)
        rolled = (sample - shift[:, None]) % lengths[:, None]
        wav = wav.gather(1, torch.where(sample < lengths[:, None], rolled, sample))
    if cfg.mixup:
        gamma = torch._standard_gamma(torch.full((2, B, 1), cfg.mixup), random)
        share = gamma[0] / gamma.sum(0)                     # is distributed as Beta(a, a)
        share = common.send(share, wav.device)
        other = common.send(torch.randperm(B, generator=random), wav.device)
        wav = torch.lerp(wav[other], wav, share)
        targets = torch.lerp(targets[other], targets, share)
        lengths = torch.maximum(lengths, lengths[other])
    return wav, lengths, targets


def spec_augment(x, frames, share, chance):
    """Put one mask of zeros per clip and axis: width floor(U round(share size)), start uniform (SpecAugment).

    x: (B, N, 128) normalised, so that 0 is the data's mean; frames: (B,) real ones; chance: (B, 2, 2)
    uniform in [0, 1), for width and start in time and in frequency.
    """
    for axis, size in ((1, frames), (2, torch.full_like(frames, MELS))):
        for_width, for_start = chance[:, axis - 1].T
        width = (for_width * (share * size).round()).long()
        start = (for_start * (size - width + 1)).long()
        behind = torch.arange(x.shape[axis], device=x.device) - start[:, None]
        inside = (behind >= 0) & (behind < width[:, None])
        x = x.masked_fill(inside.unsqueeze(3 - axis), 0)
    return x


def parts_of(batch, targets, cfg, seed, device):
    """Return the augmented batch in parts that the device can take, and whether it is without padding.

    targets: (B, K) bool. Chance is drawn alike for any number of parts.
    """
    random = torch.Generator().manual_seed(seed)
    targets = common.send(targets.float(), device)
    batch = data.to_device(batch, device)
    wav, lengths, targets = augment(batch["wav"], batch["lengths"], targets, cfg, random)
    chance = common.send(torch.rand(len(wav), 2, 2, generator=random), device)
    size = len(wav)
    if cfg.device_seconds:
        size = max(1, int(cfg.device_seconds * SAMPLE_RATE // wav.shape[1]))
    split = [values.split(size) for values in (wav, lengths, targets, chance, batch["noise"])]
    return list(zip(*split)), batch["mask"] is None


def prepare(wav, lengths, chance, noise, full, encoder, cfg):
    """Return what the classifier takes: patches, valid, and the tokens that patchout keeps."""
    x = encoder.normalise(fbank(wav))
    if cfg.spec_augment:
        x = spec_augment(x, 1 + (lengths - FRAME) // HOP, cfg.spec_augment, chance)
    valid = valid_tokens(lengths, wav.shape[1])
    keep = random_mask(noise, valid, cfg.patchout)[0] if cfg.patchout else None
    return patchify(x), None if full else valid, keep


def losses(logits, targets, cfg):
    """Return sums over clips, and their count. logits, targets: (B, K)

    "loss" is minimised; whatever else is added here is logged.
    """
    if cfg.loss == "bce":
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()
    else:
        loss = F.cross_entropy(logits, targets, label_smoothing=cfg.smoothing, reduction="sum")
    correct = logits.argmax(1) == targets.argmax(1)
    return dict(loss=loss, accuracy=correct.sum(), count=loss.new_full((), len(logits)))


# -----------------------------------------------------------------------------


def lr_times(name, layers, cfg):
    """Return what the learning rate of a parameter is multiplied by.

    BEiT's layers: 0 up to the position embeddings, i + 1 is block i, L + 1 the head.
    """
    if name.startswith("head"):
        return cfg.head_lr
    block = re.search(r"blocks\.(\d+)", name)
    layer = int(block[1]) + 1 if block else 0
    return cfg.lr_decay ** (layers + 1 - layer)


def new_classifier(cfg, path, ckpt, pack):
    """Return an untrained head on the encoder of --init, or on one like that to resume from."""
    if ckpt:
        start = unpack(ckpt, path)[1]
    else:
        start = open_encoder(cfg.init, cfg.model, pack.info)
    check(
        not isinstance(start, Ensemble),
        f"--init {cfg.init}: one encoder of ours can be fine-tuned; several, or others, can be probed: "
        "python evaluate.py --probe mlp"
    )
    settings = dict(
        dropout=cfg.dropout,
        attention_dropout=cfg.dropout,
        layerdrop=cfg.layerdrop,
        grad_decay=cfg.grad_decay
    )
    check(cfg.fbank_std or not cfg.fbank_mean, "--fbank_mean: say --fbank_std as well")
    if cfg.fbank_std:
        settings |= dict(fbank_mean=cfg.fbank_mean, fbank_std=cfg.fbank_std)
    encoder = with_settings(start, **PLAIN | settings)
    model = Classifier(encoder, pack.classes, multilabel=cfg.loss == "bce")
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    return model


def judge(model, pack, recordings, labels, several, cfg, device):
    """Return score and mean loss of recordings; NaN of a model that has no finite answers."""
    p = probabilities(model, pack, recordings, device, cfg.dtype)
    if not p.isfinite().all():
        return math.nan, math.nan
    truth = labels[recordings].double()
    if model.multilabel:
        loss = F.binary_cross_entropy(p, truth)
    else:
        loss = -(p.log() * truth).sum(1).mean()
    return score(p, truth, several), loss.item()


def settle(cfg, flags, pack, valid, stem, several):
    """Return (cfg, ckpt) of a fold as common.begin does, checked against the pack, --loss auto settled."""
    asked, path = cfg, f"{stem}.pt"
    flags = flags | dict(resume=cfg.resume and Path(path).exists())
    cfg, _, ckpt = common.begin(Config, flags, Path(stem).name, TASKS[cfg.task], ("init", "model"))
    # the split in hand is of these flags; the checkpoint, read after it was made, has to be of the same
    names = ["data", "test_split", "valid_share"] + (["task"] if "task" in flags else [])
    begun = ckpt["config"] if ckpt else None
    for name in names:
        common.same(begun, name, getattr(asked, name), f"{path} was begun with another --{name}")
    common.same(ckpt, "pack", pack.id(), f"{path} was begun on other sounds or labels than {pack.path} holds")
    if cfg.loss == "auto":
        cfg.loss = "bce" if several else "ce"
    check(
        len(valid) or not cfg.best,
        f"--best chooses on a valid split, and {pack.path} has none; add --valid_share 0.2 "
        "(the test clips would flatter)"
    )
    check(cfg.loss == "ce" or not cfg.smoothing, "--smoothing is for --loss ce")
    return cfg, ckpt


def finetune(cfg, flags, pack, split, stem, labels, several):
    """Train on split[0] -> probabilities (n, K) of split[2], by the last step or the best on split[1]."""
    recording, (train, valid, test) = pack.index["row"], split
    clips = np.flatnonzero(np.isin(recording, train))
    cfg, ckpt = settle(cfg, flags, pack, valid, stem, several)
    _, world, device = common.setup(cfg.device, cfg.seed)
    path, best_path = f"{stem}.pt", f"{stem}_best.pt"
    lock, log = common.Lock(path), common.Log(path)

    # model
    model = new_classifier(cfg, path, ckpt, pack).to(device)
    encoder = model.encoder
    recompute_blocks(model, cfg.recompute)
    optimizer = common.make_optimizer(
        model, cfg.lr, cfg.weight_decay, times=lambda name: lr_times(name, encoder.cfg.layers, cfg)
    )
    first, place = common.restore(cfg, path, ckpt, model, optimizer)
    best = ckpt.get("best", -1.0) if ckpt else -1.0
    if not ckpt:
        common.keep_old(best_path)
    ddp = common.wrap(model, cfg.compile)
    log(
        f"{stem}: {len(train)} recordings to train on, {len(valid)} to choose by, {len(test)} to test, "
        f"{len(pack.classes)} classes, {cfg.loss}, from {cfg.init}"
    )

    pairs = labels.pairs(recording[clips])

    def plan(epoch):
        key = (cfg.seed, epoch)
        drawn = draw(clips, pairs, pack.classes, cfg.balance, key)
        return data.epoch_batches(pack.samples, cfg.batch_seconds * SAMPLE_RATE, key, drawn, world)

    def save(path, **content):
        content |= dict(encoder=dataclasses.asdict(encoder.cfg), model=model.state_dict(), best=best)
        content |= dict(labels=pack.classes, multilabel=model.multilabel, pack=pack.id())
        common.save_training(path, cfg, optimizer, place, done, kind="classifier", **content)

    def evaluate():
        # without a valid split the score on test is shown, never chosen by; at the end it is the result
        nonlocal best
        name, shown = ("valid", valid) if len(valid) else ("test", test)
        value, loss = judge(model, pack, shown, labels, several, cfg, device)
        values = {f"{name}_score": value, f"{name}_loss": loss}
        log(step=done, **values)
        if cfg.best and value > best:
            best = value
            save(best_path)
        return values

    done = first
    if ckpt and ckpt.get("owed"):  # the evaluation that a signal kept from being made
        evaluate()

    # training; the backward pass costs twice the forward
    samples = pack.samples.mean()
    flops = 3 * flops_of(model, num_tokens(int(samples)) * (1 - cfg.patchout))
    meter = common.Meter(device, cfg.dtype, flops * SAMPLE_RATE / samples)
    dealt = data.deal(plan, cfg.seed, place)
    sounds = data.Clips([pack])
    sounds.round_rows = 4 if cfg.compile else 1
    batches = data.load_batches(sounds, dealt, cfg.workers)
    stop = common.Stop()
    model.train()
    for step in common.progress(first, cfg.max_steps):
        seed = common.seed_step(cfg.seed, step)
        lr = common.set_lr(optimizer, cfg, step, "cosine")
        batch = next(batches)
        place = batch["next"]
        targets = labels[recording[batch["clip"].numpy()]]
        parts, full = parts_of(batch, targets, cfg, seed, device)
        count = all_sum(torch.full((), float(len(batch["wav"])), device=device))

        for i, (wav, lengths, truth, chance, noise) in enumerate(parts):
            inputs = prepare(wav, lengths, chance, noise, full, encoder, cfg)
            ddp.require_backward_grad_sync = i == len(parts) - 1  # ranks add up their gradients once
            with autocast(device, cfg.dtype):
                logits = ddp(*inputs)
            sums = losses(logits.float(), truth, cfg)
            (sums["loss"] * world / count).backward()  # DDP divides by world
            meter.add(sums)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        finite = common.step_if_finite(optimizer, norm)
        meter.heard(batch, finite)

        done = step + 1
        stopped = stop.now(done, device)
        last = stopped or done == cfg.max_steps
        if last or done % cfg.log_every == 0:
            log(step=done, **meter.read(), lr=lr, epoch=place[0])
            meter.check_steps(path, batch, pack.names)
        with meter.paused():
            due = done % cfg.eval_every == 0
            if done == cfg.max_steps:
                due = len(valid) > 0  # else the score on test comes anyway, as the result
            if due and not stopped:
                evaluate()
            if last or done % cfg.save_every == 0:
                meter.check_steps(path, batch, pack.names, evaluate)
                save(path, owed=due and stopped)
        if stopped:
            stop.close()
            log(f"stopped at step {done}, saved in {path}; go on with --resume")
            raise SystemExit(0)
    stop.close()
    if cfg.best:
        chosen = read_checkpoint(best_path)
        common.load_state(model, chosen["model"], best_path)
        log(f"{best_path}: step {chosen['step']}, the best on valid with {100 * best:.1f} %")
    return probabilities(model, pack, test, device, cfg.dtype)


def main(**flags):
    task = flags.get("task", "custom")
    check(task in TASKS, f"--task {task}: choose one of {', '.join(TASKS)}")
    cfg = Config(**TASKS[task] | flags)
    check(cfg.data, "--data PACK is missing: a labelled pack, made with python data.py")
    common.check_flags(cfg)
    common.setup(cfg.device, cfg.seed)
    pack = data.Pack(cfg.data)
    splits, labels, several = task_of(cfg, pack)
    measure = "mAP" if several else "accuracy"

    results = {}
    for fold, split in splits.items():
        stem, text = stem_of(cfg, "finetune", pack, fold)
        scores = finetune(cfg, flags, pack, split, stem, labels, several)
        result = write_results(stem, pack, split[2], scores, labels, several, text)
        results[fold] = result[measure]
    print_results(results, measure, cfg.data)
    return results


if __name__ == "__main__":
    common.run(main, Config, __doc__)
