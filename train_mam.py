"""
Masked audio modelling: predict the labels of masked patches from the visible quarter (BEATs, section 3.3).

    python train_mam.py                                     # iteration 1 on built-in toy sounds, a few minutes on a laptop
    python train_mam.py --data packs/mine                   # iteration 1 on your sounds: random-projection labels
    python train_mam.py --data packs/mine --iter 2          # labels of out/tokenizer_iter2.pt (train_tokenizer.py makes it)
    torchrun --nproc_per_node 8 train_mam.py --iter 2 --model base --crop_seconds 0 --batch_seconds 5600 --device_seconds 350

Writes out/mam_iter<k>.pt (the encoder for finetune.py, the teacher for train_tokenizer.py) and .jsonl (the log).
Watch `valid_loss` against `entropy_given_band`: as long as it is not well below, the model knows which labels occur in
which frequency band and nothing else. Glossary: loss in nats per masked, non-silent patch; accuracy on the same;
codes_used, perplexity: of the labels in the training data; x_realtime: seconds of audio per second; mfu: share of the
device's rate at matrix products, measured at the start, that goes into those of the model.
"""
import contextlib
import dataclasses
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
import finetune
from common import UserError, all_sum, autocast
from model import (BANDS, PRESETS, Classifier, Encoder, EncoderConfig, MaskedAudioModel, fbank, load, patchify, random_mask,
                   valid_tokens)
from tokenizer import RandomProjectionTokenizer, cached_tokens, code_use, is_silent, load_tokenizer, tokenizer_hash, tokenizer_state

@dataclass
class Config:
    iter: int = 1                   # iteration: 1 = random-projection labels, k = labels of tokenizer_iter<k>.pt
    data: str = ""                  # packs and their shares of the sampled seconds, packs/a:0.7,packs/b:0.3; none = toy sounds
    tokenizer: str = ""             # labels from this file instead, ours or a released Tokenizer_iter*.pt
    init: str = ""                  # start from this encoder, ours or a released BEATs_iter*.pt; none = random
    out_dir: str = "out"            # folder of checkpoints and logs
    model: str = "tiny"             # tiny | base | large
    predictor_blocks: int = 0       # transformer blocks of the label predictor, 0 = 3, with tiny 2
    predictor_dim: int = 0          # their width, 0 = the encoder's, with tiny 128
    predictor_heads: int = 0        # their heads, 0 = the encoder's
    mask_ratio: float = 0.75        # share of the valid patches that is masked
    crop_seconds: float = 2.56      # random crops of this length, 0 = whole clips
    batch_seconds: float = 41.0     # audio per step, all ranks together
    device_seconds: float = 0.0     # most audio per forward pass on one device, 0 = the rank's whole share
    max_steps: int = 500            # optimizer steps
    warmup_steps: int = 60          # of linear warm-up, then linear decay to 0
    lr: float = 8e-4                # peak learning rate
    weight_decay: float = 0.05      # on matrices only
    clip: float = 1.0               # largest gradient norm
    seed: int = 0                   # of everything
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16
    compile: bool = False           # torch.compile; worth its minutes for long runs
    recompute: bool = False         # recompute each block in the backward pass: a third slower, far less memory
    workers: int = 1                # threads per rank that make batches ahead, 0 = none
    log_every: int = 20             # steps between log lines
    eval_every: int = 250           # steps between validations
    save_every: int = 250           # steps between checkpoints
    probe: str = ""                 # labelled pack for a frozen linear probe before and after; toy sounds: themselves
    resume: bool = False            # continue out/mam_iter<k>.pt

@torch.no_grad()
def prepare(batch, encoder, tokenizer, cfg):
    """Waveforms -> everything the model and the loss need: patches, valid, keep, masked, targets (B, M), -1 = none."""
    features = fbank(batch["wav"])
    valid = valid_tokens(batch["lengths"], batch["wav"].shape[1])
    labels = batch["tokens"] if "tokens" in batch else tokenizer.codes(features, valid)
    labels = labels.masked_fill(~valid | is_silent(features), -1)               # silence is not worth predicting
    keep, masked = random_mask(batch["noise"], valid, cfg.mask_ratio)
    targets = F.pad(labels, (0, 1), value=-1).gather(1, masked)
    valid = None if batch.get("full") else valid                                # no padding: attention need not look for it
    return dict(patches=patchify(encoder.normalise(features)), valid=valid, keep=keep, masked=masked), targets, labels

def loss_and_correct(model, inputs, targets):
    """Summed cross-entropy, number of right predictions and of targets."""
    logits = model(**inputs).float()                                            # (B, M, codes)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    return loss, ((logits.argmax(-1) == targets) & (targets >= 0)).sum()

@torch.no_grad()
def evaluate(model, batches, tokenizer, cfg, device):
    """Loss and accuracy over the held-out clips of all ranks: same crops, same masks every time."""
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        with autocast(device, cfg.dtype):
            inputs, targets, _ = prepare(data.to_device(batch, device), model.encoder, tokenizer, cfg)
            loss, correct = loss_and_correct(model, inputs, targets)
        total += torch.stack([loss, correct, (targets >= 0).sum()])
    model.train()
    loss, correct, count = all_sum(total).tolist()
    return dict(valid_loss=loss / (count or math.nan), valid_accuracy=correct / (count or math.nan))

def main(**flags):
    # configuration: defaults < checkpoint < flags typed
    cfg = Config(**flags)
    path, ckpt = f"{cfg.out_dir}/mam_iter{cfg.iter}.pt", None
    if cfg.resume:
        ckpt = common.read_training(path, Config)
        cfg = Config(**{**ckpt["config"], **flags})
    common.positive(cfg, "iter", "batch_seconds", "max_steps", "log_every", "eval_every", "save_every")
    rank, world, device = common.setup(cfg.device, cfg.seed)
    log = common.Log(path.replace(".pt", ".jsonl"))

    # data
    if not cfg.data and rank == 0 and not os.path.exists(f"{cfg.out_dir}/toy"):
        data.make_toy(f"{cfg.out_dir}/toy")
    common.barrier()
    packs, weights = data.open_packs(cfg.data or f"{cfg.out_dir}/toy")
    if ckpt and ckpt["packs"] != [pack.info["id"] for pack in packs]:
        raise UserError(f"{path} was begun on other sounds than those of --data {cfg.data or 'toy'}; resume on the same packs, "
                        f"or begin anew with --init {path}")
    rows = round(cfg.crop_seconds * data.SAMPLE_RATE / data.ROW)
    crop = rows * data.ROW + data.FRAME - data.HOP if rows else 0
    train, valid = data.hold_out(packs, seed=cfg.seed)
    clips = data.Clips(packs, crop)
    batch_samples = cfg.batch_seconds * data.SAMPLE_RATE * (crop / (rows * data.ROW) if rows else 1)
    plan = lambda epoch: data.epoch_batches(clips.samples, batch_samples, (cfg.seed, epoch), train, weights, multiple=world)
    fixed = lambda *args: data.fixed_batches(clips, args[0], min(cfg.batch_seconds, 100.0 * world), cfg.seed, *args[1:])
    mine = slice(rank, None, world)

    # labels
    tokenizer_path = cfg.tokenizer or f"{cfg.out_dir}/tokenizer_iter{cfg.iter}.pt"
    if cfg.iter == 1 and not cfg.tokenizer and ckpt is None:
        common.keep_old(tokenizer_path)
        tokenizer = RandomProjectionTokenizer(seed=cfg.seed)
        if rank == 0:
            sample = data.fixed_batches(clips, train, 100.0, cfg.seed, 20)
            tokenizer.fit_([(b["wav"].float() / 32768, b["lengths"]) for b in sample])
        common.save_checkpoint(tokenizer_path, **tokenizer_state(tokenizer))
    if not os.path.exists(tokenizer_path):
        raise UserError(f"{tokenizer_path}: no such tokenizer; make it with: python train_tokenizer.py --iter {cfg.iter}"
                        + (f" --data {cfg.data}" if cfg.data else ""))
    tokenizer = load_tokenizer(tokenizer_path).to(device)
    if ckpt and ckpt["tokenizer"] != tokenizer_hash(tokenizer):
        raise UserError(f"{tokenizer_path} is not the tokenizer that {path} was trained with; put that one back, "
                        "or name it with --tokenizer")
    if not isinstance(tokenizer, RandomProjectionTokenizer):        # a projection is cheap, an encoder is not
        clips.tokens, clips.align = [cached_tokens(tokenizer, pack, device) for pack in packs], data.ROW

    # model
    if cfg.init and ckpt is None:
        encoder = load(cfg.init)
        encoder = encoder.encoder if isinstance(encoder, Classifier) else encoder
    else:
        hours = weights if weights is not None else [pack.info["hours"] for pack in packs]
        stats = [np.average([pack.info[key] for pack in packs], weights=hours) for key in ("fbank_mean", "fbank_std")]
        shape = dataclasses.asdict(PRESETS[cfg.model]) | dict(fbank_mean=float(stats[0]), fbank_std=float(stats[1]))
        encoder = Encoder(EncoderConfig(**(ckpt["encoder"] if ckpt else shape)))
    blocks, width = (2, 128) if cfg.model == "tiny" and not cfg.init else (3, 0)
    model = MaskedAudioModel(encoder, tokenizer.n_codes, cfg.predictor_blocks or blocks, cfg.predictor_dim or width,
                             cfg.predictor_heads).to(device)
    encoder.recompute = cfg.recompute
    optimizer = common.make_optimizer(model, cfg.lr, cfg.weight_decay)
    step, place, before = 0, (0, 0), None
    if ckpt:
        model.load_state_dict(ckpt["model"])
        common.load_optimizer(optimizer, ckpt["optimizer"])
        step, place, before = ckpt["step"], tuple(ckpt["place"]), ckpt["probe"]
    else:
        common.keep_old(path)
    ddp = common.wrap(model, device, cfg.compile)
    tokens_per_second = BANDS * data.SAMPLE_RATE / data.ROW
    log(f"iteration {cfg.iter}: {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M encoder + "
        f"{sum(p.numel() for n, p in model.named_parameters() if not n.startswith('encoder.')) / 1e6:.1f} M predictor, "
        f"{sum(map(len, train))} clips to train on, {sum(map(len, valid))} held out, "
        f"{cfg.batch_seconds * tokens_per_second:.0f} patches per step on {world} x {device.type}, labels {tokenizer_path}")

    # frozen probe of the untrained encoder
    probe_pack = data.Pack(cfg.probe) if cfg.probe else None if cfg.data else packs[0]
    if probe_pack and not ckpt:
        before = finetune.probe(model.encoder, probe_pack, device, cfg.dtype)

    # what can be known from the band alone, over a sample of the training data
    counts = torch.zeros(BANDS, tokenizer.n_codes, device=device)
    for batch in fixed(train, 32, 0, mine):
        inputs, targets, labels = prepare(data.to_device(batch, device), model.encoder, tokenizer, cfg)
        place_of = labels + torch.arange(labels.shape[1], device=device) % BANDS * tokenizer.n_codes
        counts += torch.bincount(place_of[labels >= 0], minlength=counts.numel()).view_as(counts)
    use = code_use(all_sum(counts).cpu())
    log("labels of the training data:", **use)
    flops, rate = 0.0, 1.0                      # of a second of audio: the backward pass costs twice the forward; of all devices
    if rank == 0:
        with torch.no_grad(), autocast(device, cfg.dtype):
            flops = 3 * common.flops_of(lambda: loss_and_correct(model.forward, inputs, targets))
        flops /= batch["wav"].numel() / data.SAMPLE_RATE
        rate = common.matrix_rate(device, cfg.dtype) * world

    # training
    if ckpt and (ckpt["world"], ckpt["config"]["batch_seconds"]) != (world, cfg.batch_seconds):
        log("other ranks or batches than before: the rest of this epoch is dealt out anew, so some clips come twice and some "
            "not at all")
    valid_batches = fixed(valid, None, 1, mine)
    stream = data.Stream(plan, cfg.seed, place, rank, world)
    batches = iter(data.Loader(clips, stream, cfg.workers))
    stop = common.Stop()
    model.train()
    result, seen, window, began = {}, 0.0, torch.zeros(3, dtype=torch.float64, device=device), time.time()
    save = lambda: common.save_checkpoint(path, kind="mam", encoder=dataclasses.asdict(encoder.cfg), model=model.state_dict(),
        optimizer=optimizer.state_dict(), step=step, place=place, config=dataclasses.asdict(cfg), probe=before,
        tokenizer=tokenizer_hash(tokenizer), packs=[pack.info["id"] for pack in packs], world=world)
    for step in tqdm(range(step, cfg.max_steps), initial=step, total=cfg.max_steps, desc="train", disable=True if rank else None):
        common.seed_step(cfg.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = common.lr_at(step, cfg.lr, cfg.warmup_steps, cfg.max_steps)
        batch = next(batches)
        parts = [data.to_device(part, device) for part in data.split_batch(batch, cfg.device_seconds or cfg.batch_seconds / world)]
        parts = [prepare(part, model.encoder, tokenizer, cfg)[:2] for part in parts]
        count = all_sum(sum((targets >= 0).sum() for _, targets in parts).double())      # over micro-steps and ranks
        for i, (inputs, targets) in enumerate(parts):
            with contextlib.nullcontext() if world == 1 or i == len(parts) - 1 else ddp.no_sync():
                with autocast(device, cfg.dtype):
                    loss, correct = loss_and_correct(ddp, inputs, targets)
                (loss * world / count.clamp(min=1)).float().backward()          # DDP divides by world
            window += torch.stack([loss.detach(), correct, (targets >= 0).sum()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        place = stream.after(place)
        seen += batch["lengths"].shape[0] * batch["wav"].shape[1] / data.SAMPLE_RATE * world

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            loss, correct, n = all_sum(window).tolist()
            log(step=done, loss=loss / max(n, 1), accuracy=correct / max(n, 1), lr=optimizer.param_groups[0]["lr"],
                x_realtime=seen / (time.time() - began), mfu=flops * seen / (time.time() - began) / rate, epoch=place[0])
            window, seen, began = torch.zeros_like(window), 0.0, time.time()
        paused, step = time.time(), done
        if stop.now(done, device):
            save()
            stop.close()
            log(f"stopped at step {done}, saved in {path}; go on with --resume")
            return dict(step=done)
        if done % cfg.eval_every == 0 or done == cfg.max_steps:
            result |= evaluate(model, valid_batches, tokenizer, cfg, device)
            log(step=done, **result, entropy_given_band=use["entropy_given_band"])
        if done % cfg.save_every == 0 or done == cfg.max_steps:
            save()
        began += time.time() - paused
    stop.close()

    # frozen probe of the trained encoder
    result |= dict(step=step, **use)
    if probe_pack:
        before = before if before is not None else math.nan
        result |= dict(probe_before=before, probe_after=finetune.probe(model.encoder, probe_pack, device, cfg.dtype))
        log(f"frozen linear probe on {probe_pack.path}: {100 * before:.1f} % before pre-training, "
            f"{100 * result['probe_after']:.1f} % after")
    return result

if __name__ == "__main__":
    common.run(main, Config, __doc__)
