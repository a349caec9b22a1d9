"""
Masked audio modelling: predict the codes of masked patches from the visible quarter (BEATs, section 3.3).

    python train_mam.py                             # iteration 1 on built-in sounds, minutes on a laptop
    python train_mam.py --data packs/mine           # iteration 1 on yours: random-projection codes
    python train_mam.py --data packs/mine --iter 2  # codes of out/tokenizer_iter2.pt (train_tokenizer.py)
    torchrun --nproc_per_node 8 train_mam.py --iter 2 --data packs/audioset --model base \\
        --crop_seconds 0 --batch_seconds 5600 --device_seconds 700 --eval_every 5000 --save_every 5000

Writes out/mam_iter<k>.pt (the encoder for finetune.py, the teacher for train_tokenizer.py) and .jsonl (the
log). Watch `valid_loss` against `entropy_given_band`: as long as it is not well below, the model knows which
codes occur in which frequency band and nothing else.

Glossary: loss, in nats per masked patch that is not silence; accuracy on the same; codes_used, perplexity of
the codes in the training data; skipped: steps since the last line that were left out, for their gradient was
not finite; x_realtime: seconds of audio per second; mfu: share of the device's rate at
matrix products, measured at the start, that goes into those of the model.
"""
import dataclasses
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import data
from audio import SAMPLE_RATE, fbank, is_silent, num_tokens, patchify
from common import all_sum, autocast, check
from evaluate import probe_score
from model import (
    PLAIN,
    PREDICTORS,
    PRESETS,
    Encoder,
    MaskedAudioModel,
    flops_of,
    load_encoder,
    random_mask,
    recompute_blocks,
    unpack,
    with_settings
)
from tokenizer import RandomProjectionTokenizer, code_use, count_codes, load_tokenizer

@dataclass
class Config:
    iter: int = 1                   # 1 = random-projection codes, k = codes of tokenizer_iter<k>.pt
    data: str = ""                  # packs and shares of the seconds, packs/a:0.7,packs/b:0.3; none = toy
    splits: str = ""                # splits to hear, as in train,test; all; none = not test, eval, valid
    leave_out: str = ""             # splits or folds never to hear, as in 5
    projection: str = "smooth"      # smooth | plain: random projection of iteration 1; plain = equation 1
    tokenizer: str = ""             # codes of this file instead, ours or a released Tokenizer_iter*.pt
    init: str = ""                  # start from this encoder, ours or a released one; none = random
    out_dir: str = "out"            # folder of checkpoints and logs
    model: str = "tiny"             # tiny | base | large
    predictor_blocks: int = 0       # transformer blocks of the label predictor, 0 = 3, with tiny 2
    predictor_dim: int = 0          # width of the predictor, 0 = the encoder's, with tiny 128
    predictor_heads: int = 0        # attention heads of the predictor, 0 = the encoder's
    mask_ratio: float = 0.75        # share of the valid patches that is masked
    crop_seconds: float = 2.56      # random crops of this length, 0 = whole clips
    batch_seconds: float = 41.0     # audio per step, all ranks together
    device_seconds: float = 0.0     # most audio per forward pass on one device, 0 = the rank's whole share
    max_steps: int = 500            # optimizer steps
    warmup_steps: int = 60          # of linear warm-up, then linear decay to 0
    lr: float = 8e-4                # peak learning rate
    weight_decay: float = 0.05      # on matrices only
    clip: float = 1.0               # largest gradient norm
    seed: int = 0                   # of everything that is random
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16
    compile: bool = False           # torch.compile; worth its minutes for long runs
    recompute: bool = False         # recompute blocks in the backward pass: slower, far less memory
    workers: int = 1                # threads per rank that make batches ahead, 0 = none
    log_every: int = 20             # steps between log lines
    eval_every: int = 250           # steps between validations
    save_every: int = 250           # steps between checkpoints, of which the last two are kept
    keep_every: int = 0             # steps between those that are kept for good, 0 = none
    probe: str = ""                 # labelled pack for a frozen linear probe before and after; toy: itself
    resume: bool = False            # continue out/mam_iter<k>.pt

# what has been settled once a run is under way
FIXED = "model", "init", "projection"


@torch.no_grad()
def listen(batch, tokenizer):
    """Return the filter bank (B, N, 128) and the code of each patch (B, T), -1 at padding and silence."""
    features = fbank(batch["wav"])
    codes = batch["codes"] if "codes" in batch else tokenizer.codes(features, batch["valid"])
    worth = batch["valid"] & ~is_silent(features)  # silence is not worth predicting
    return features, codes.masked_fill(~worth, -1)


@torch.no_grad()
def prepare(batch, encoder, tokenizer, mask_ratio):
    """Return what the model takes, and targets (B, M): the codes of the masked patches, -1 = none."""
    features, codes = listen(batch, tokenizer)
    keep, masked = random_mask(batch["noise"], batch["valid"], mask_ratio)
    codes = F.pad(codes, (0, 1), value=-1)  # masked is T where a clip has fewer
    targets = codes.gather(1, masked)
    patches = patchify(encoder.normalise(features))
    return dict(patches=patches, valid=batch["mask"], keep=keep, masked=masked), targets


def losses(model, inputs, targets):
    """Return sums over the masked patches, and their count.

    "loss" is minimised; whatever else is added here is logged.
    """
    logits = model(**inputs).float()  # (B, M, codes)
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    correct = (logits.argmax(-1) == targets) & (targets >= 0)
    return dict(loss=loss, accuracy=correct.sum(), count=(targets >= 0).sum())


def use_of_codes(sounds, tokenizer, device):
    """Return how many codes a sample of the training data uses, their perplexity and entropy."""
    counts = 0
    for batch in sounds.sample(device):
        _, codes = listen(batch, tokenizer)
        counts += count_codes(codes, tokenizer.n_codes)
    return code_use(all_sum(counts))


@torch.no_grad()
def validate(model, sounds, tokenizer, cfg, device):
    """Return the means of losses() over the held-out clips: the same crops and masks every time."""
    model.eval()
    sums = {}
    for batch in sounds.held_out(device):
        inputs, targets = prepare(batch, model.encoder, tokenizer, cfg.mask_ratio)
        with autocast(device, cfg.dtype):
            common.add_to(sums, losses(model, inputs, targets))
    model.train()
    return {f"valid_{name}": value for name, value in common.means(sums).items()}


def find_tokenizer(cfg, sounds, ckpt):
    """Return the tokenizer whose codes are predicted, and its path; for iteration 1 make it."""
    path = cfg.tokenizer or f"{cfg.out_dir}/tokenizer_iter{cfg.iter}.pt"
    if cfg.iter == 1 and not cfg.tokenizer and ckpt is None:
        common.keep_old(path)
        tokenizer = RandomProjectionTokenizer(projection=cfg.projection, seed=cfg.seed)
        tokenizer.fit_([(batch["wav"], batch["lengths"]) for batch in sounds.sample("cpu")])
        common.save_checkpoint(path, **tokenizer.state())  # rank 0's, for all
    typed = f" --data {cfg.data}" if cfg.data else ""
    typed += f" --out_dir {cfg.out_dir}" if cfg.out_dir != "out" else ""
    check(
        os.path.exists(path),
        f"{path}: no such tokenizer; make it with: python train_tokenizer.py --iter {cfg.iter}{typed}"
    )
    return load_tokenizer(path), path


def find_encoder(cfg, sounds, path, ckpt):
    """Return the encoder to train: of the checkpoint to resume from, of --init, or a fresh one."""
    if ckpt:
        return unpack(ckpt, path)[1]
    if cfg.init:
        return with_settings(load_encoder(cfg.init), **PLAIN)
    return Encoder(dataclasses.replace(PRESETS[cfg.model], **sounds.fbank_stats()))


def meter_of(model, sounds, cfg, device):
    """Return the meter of speed and losses. The backward pass costs twice the forward."""
    seconds = sounds.mean_seconds()
    tokens = num_tokens(round(seconds * SAMPLE_RATE))
    flops = flops_of(model.encoder, tokens * (1 - cfg.mask_ratio)) + flops_of(model.predictor, tokens)
    return common.Meter(device, cfg.dtype, 3 * flops / seconds)


def main(**flags):
    cfg, path, ckpt = common.begin(Config, flags, "mam_iter{iter}", fixed=FIXED)
    _, world, device = common.setup(cfg.device, cfg.seed)
    lock, log = common.Lock(path), common.Log(path)

    # sounds, without those to test by; a twentieth of the recordings is held out
    packs = cfg.data or data.toy_pack(cfg.out_dir)
    sounds = data.Sounds(packs, cfg.crop_seconds, cfg.batch_seconds, cfg.seed, cfg.workers,
                         cfg.splits, cfg.leave_out)
    sounds.clips.round_rows = 4 if cfg.compile else 1
    common.same(ckpt, "packs", sounds.ids(), f"{path} was begun on other sounds or splits than {packs}")

    # codes to predict; a random projection is cheap, an encoder is not, so its codes are computed once
    tokenizer, source = find_tokenizer(cfg, sounds, ckpt)
    tokenizer.to(device)
    common.same(ckpt, "tokenizer", tokenizer.id(), f"{path} was begun with another tokenizer than {source}")
    if not isinstance(tokenizer, RandomProjectionTokenizer):
        for pack in sounds.packs:
            sounds.clips.codes.append(data.cached_codes(tokenizer, pack, device, cfg.dtype))

    # model
    encoder = find_encoder(cfg, sounds, path, ckpt)
    blocks, dim = PREDICTORS["base" if cfg.init else cfg.model]  # as wide as an encoder that is given
    shape = cfg.predictor_blocks or blocks, cfg.predictor_dim or dim, cfg.predictor_heads
    model = MaskedAudioModel(encoder, tokenizer.n_codes, *shape).to(device)
    recompute_blocks(model, cfg.recompute)
    optimizer = common.make_optimizer(model, cfg.lr, cfg.weight_decay)
    first, place = common.restore(cfg, path, ckpt, model, optimizer)
    ddp = common.wrap(model, cfg.compile)
    log(
        f"iteration {cfg.iter}: {common.millions(encoder):.1f} M encoder, {common.millions(model):.1f} M "
        f"with predictor, {sounds}, on {world} x {device.type}, codes of {source}"
    )

    # what the untrained encoder is worth, frozen; and what a model reaches that knows but the band
    probe_pack = data.Pack(cfg.probe or packs) if cfg.probe or not cfg.data else None
    before = ckpt.get("probe", math.nan) if ckpt else math.nan
    if probe_pack and not ckpt:
        before = probe_score(encoder, probe_pack, device, cfg.dtype)
    use = use_of_codes(sounds, tokenizer, device)
    log("codes of the training data:", **use)

    done, stopped, result = first, False, {}

    def evaluate():
        values = validate(model, sounds, tokenizer, cfg, device)
        log(step=done, **values, entropy_given_band=use["entropy_given_band"])
        return values

    if ckpt and ckpt.get("owed"):  # the evaluation that a signal kept from being made
        result = evaluate()

    # training
    meter = meter_of(model, sounds, cfg, device)
    batches = sounds.batches(place)
    stop = common.Stop()
    model.train()
    for step in common.progress(first, cfg.max_steps):
        common.seed_step(cfg.seed, step)
        lr = common.set_lr(optimizer, cfg, step)

        # masked patches and their codes, in several parts if the device cannot take all at once
        batch = next(batches)
        parts = sounds.parts(batch, device, cfg.device_seconds)
        parts = [prepare(part, encoder, tokenizer, cfg.mask_ratio) for part in parts]
        count = all_sum(sum((targets >= 0).sum() for _, targets in parts).double()).clamp(min=1)

        for i, (inputs, targets) in enumerate(parts):
            ddp.require_backward_grad_sync = i == len(parts) - 1  # ranks add up their gradients once
            with autocast(device, cfg.dtype):
                sums = losses(ddp, inputs, targets)
            (sums["loss"] * world / count).float().backward()  # DDP divides by world
            meter.add(sums)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        finite = common.step_if_finite(optimizer, norm)
        meter.heard(batch, finite)

        done = step + 1
        stopped = stop.now(done, device)
        last = stopped or done == cfg.max_steps
        if last or done % cfg.log_every == 0:
            log(step=done, **meter.read(), lr=lr, epoch=batch["next"][0])
            meter.check_steps(path, batch, sounds.names)
        with meter.paused():
            due = done % cfg.eval_every == 0 or done == cfg.max_steps
            if due and not stopped:
                result = evaluate()
            if last or done % cfg.save_every == 0:
                meter.check_steps(path, batch, sounds.names, evaluate)
                content = dict(encoder=dataclasses.asdict(encoder.cfg), model=model.state_dict())
                content |= dict(packs=sounds.ids(), tokenizer=tokenizer.id(), probe=before)
                content |= dict(owed=due and stopped)
                common.save_training(path, cfg, optimizer, batch["next"], done, kind="mam", **content)
        if stopped:
            log(f"stopped at step {done}, saved in {path}; go on with --resume")
            break
    stop.close()

    # what the trained encoder is worth
    result |= dict(step=done, **use)
    if probe_pack and not stopped:
        after = probe_score(encoder, probe_pack, device, cfg.dtype)
        probe = dict(probe_before=before, probe_after=after)
        log(
            f"frozen linear probe on {probe_pack.path}: {100 * before:.1f} % before pre-training, "
            f"{100 * after:.1f} % after",
            step=done, **probe
        )
        result |= probe
    return result


if __name__ == "__main__":
    common.run(main, Config, __doc__)
