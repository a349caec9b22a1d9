"""
Distil a teacher into an acoustic tokenizer: its codes must let an estimator predict the teacher's features (section 3.2.2).

    python train_tokenizer.py --data packs/mine --iter 2                              # teacher: out/mam_iter1.pt
    python train_tokenizer.py --data packs/mine --iter 3 --teacher out/finetune_mine.pt   # a classifier teaches its logits
    torchrun --nproc_per_node 8 train_tokenizer.py --data packs/audioset --iter 2 --preset ssl --device_seconds 175     # Table 4

Writes out/tokenizer_iter<k>.pt, the labels of train_mam.py --iter k, and .jsonl. The loss is 1 - cosine to the teacher's
features plus beta times the squared distance of the encoder's vectors to their codes, over valid tokens. Glossary: cosine
to the teacher's features, as --targets makes them; commitment: squared distance; codes_used, dead_codes, perplexity: since
the last log line; revived: codes put to new use since then; mfu: see train_mam.py.
`python report.py out/tokenizer_iter2.pt --data PACK` says what the codes are worth.
"""
import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
from common import UserError, all_sum, autocast
from model import BANDS, PRESETS, Classifier, Encoder, EncoderConfig, fbank, load, patchify, valid_tokens
from tokenizer import SelfDistilledTokenizer, code_use, is_silent, moments, tokenizer_state, whitening

# Table 4 of the paper, by teacher; batches in seconds of audio over all devices
TABLE_4 = {
    "ssl": dict(lr=5e-5, batch_seconds=1400.0, max_steps=400_000, warmup_steps=32_000, dropout=0.1, weight_decay=0.01,
                crop_seconds=0.0),
    "sl": dict(lr=5e-4, batch_seconds=1400.0, max_steps=400_000, warmup_steps=32_000, dropout=0.1, weight_decay=0.01,
               crop_seconds=0.0),
}

@dataclass
class Config:
    preset: str = ""                # ssl | sl: the paper's values for a self-supervised or supervised teacher; flags typed win
    iter: int = 2                   # iteration of the tokenizer; its teacher is mam_iter<k-1>.pt
    data: str = ""                  # packs and their shares of the sampled seconds, packs/a:0.7,packs/b:0.3; none = toy sounds
    teacher: str = ""               # another teacher: an encoder, or a classifier for its token logits; ours or released
    out_dir: str = "out"            # folder of checkpoints and logs
    teacher_layers: str = "last"    # last | mean: what of a pre-trained teacher is distilled, the mean being over its blocks
    model: str = ""                 # tiny | base | large; none = the teacher's size
    from_teacher: bool = True       # start the tokenizer's encoder from the teacher's weights (if of its size)
    dropout: float = -1.0           # of encoder and estimator, -1 = the teacher's or the model's
    codes: int = 1024               # size of the codebook
    code_dim: int = 256             # width of a code
    estimator_blocks: int = 3       # transformer blocks from codes to features
    targets: str = "centre"         # centre | whiten | raw: teacher's features less their mean, whitened, or as they are
    beta: float = 1.0               # weight of the commitment loss
    decay: float = 0.99             # of the codebook's moving average
    disturb: float = 0.0            # share of the clips that the tokenizer, not the teacher, hears at another level and noisy
    revive: float = 0.1             # codes used less than this share of the average start anew, 0 = never
    crop_seconds: float = 2.56      # random crops of this length, 0 = whole clips
    batch_seconds: float = 41.0     # audio per step, all ranks together
    device_seconds: float = 0.0     # most audio per forward pass on one device, 0 = the rank's whole share
    max_steps: int = 500            # optimizer steps
    warmup_steps: int = 60          # of linear warm-up, then linear decay to 0
    lr: float = 5e-4                # peak learning rate
    weight_decay: float = 0.01      # on matrices only
    clip: float = 1.0               # largest gradient norm
    seed: int = 0                   # of everything
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16
    compile: bool = False           # torch.compile
    recompute: bool = False         # recompute each block in the backward pass: a third slower, far less memory
    workers: int = 1                # threads per rank that make batches ahead, 0 = none
    log_every: int = 20             # steps between log lines
    eval_every: int = 250           # steps between validations
    save_every: int = 250           # steps between checkpoints
    resume: bool = False            # continue out/tokenizer_iter<k>.pt

def disturb(wav, lengths, chance, share):
    """A share of the clips 10 dB softer to 10 dB louder, and with themselves played backwards 0 to 20 dB below.

    wav: (B, n); lengths: (B,); chance: (B, 3) uniform in [0, 1). A clip becomes the same in any batch.
    """
    which, gain, snr = chance.T[..., None]                                      # (B, 1) each
    backwards = wav.gather(1, (lengths[:, None] - 1 - torch.arange(wav.shape[1], device=wav.device)).clamp(min=0))
    return torch.where(which < share, 10**(gain - 0.5) * (wav + 10**-snr * backwards), wav)

@torch.no_grad()
def prepare(batch, encoder, teacher, layers="last", disturbed=0.0):
    """Waveforms -> patches (B, T, 256), valid (B, T), teacher's features (B, T, width) in float32, silent (B, T)."""
    features = fbank(batch["wav"])
    heard = fbank(disturb(batch["wav"], batch["lengths"], batch["noise"][:, :3], disturbed)) if disturbed else features
    valid = valid_tokens(batch["lengths"], batch["wav"].shape[1])
    trunk = teacher.encoder if isinstance(teacher, Classifier) else teacher
    real = None if batch.get("full") else valid                                 # no padding: attention need not look for it
    states = trunk(patchify(trunk.normalise(features)), real, all_layers=True)[1:]
    target = torch.stack(states).mean(0) if layers == "mean" else states[-1]
    if isinstance(teacher, Classifier):
        target = teacher.head(states[-1])
    return patchify(encoder.normalise(heard)), valid, target.float(), is_silent(features)

def losses(model, patches, valid, target):
    """Sums over valid tokens of 1 - cosine and of the commitment, and z (B, T, d), codes (B, T)."""
    z, codes, predicted = model(patches, valid)
    raw = model.module if hasattr(model, "module") else model
    with torch.autocast(target.device.type, enabled=False):
        target = (target - raw.target_mean) @ raw.target_map
    distance = 1 - F.cosine_similarity(predicted.float(), target, dim=-1)                   # (B, T)
    commitment = (z - raw.codebook.weight[codes]).square().sum(-1)                          # equation 3, per token
    return (distance * valid).sum(), (commitment * valid).sum(), z.detach(), codes

@torch.no_grad()
def evaluate(model, teacher, batches, cfg, device):
    """Cosine, commitment and use of codes over the held-out clips of all ranks."""
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=device)
    counts = torch.zeros(BANDS, cfg.codes, device=device)
    for batch in batches:
        with autocast(device, cfg.dtype):
            patches, valid, target, _ = prepare(data.to_device(batch, device), model.encoder, teacher, cfg.teacher_layers)
            distance, commitment, _, codes = losses(model, patches, valid, target)
        total += torch.stack([distance, commitment, valid.sum()])
        place = codes + torch.arange(codes.shape[1], device=device) % BANDS * cfg.codes
        counts += torch.bincount(place[valid], minlength=counts.numel()).view_as(counts)
    model.train()
    distance, commitment, n = all_sum(total).tolist()
    use = code_use(all_sum(counts).cpu())
    return dict(valid_cosine=1 - distance / max(n, 1), valid_commitment=commitment / max(n, 1),
                valid_codes_used=use["codes_used"], valid_dead_codes=cfg.codes - use["codes_used"],
                valid_perplexity=use["perplexity"], entropy_given_band=use["entropy_given_band"])

def main(**flags):
    # configuration: defaults < preset < checkpoint < flags typed
    cfg = Config(**{**TABLE_4.get(flags.get("preset"), {}), **flags})
    path, ckpt = f"{cfg.out_dir}/tokenizer_iter{cfg.iter}.pt", None
    if cfg.resume:
        ckpt = common.read_training(path, Config)
        cfg = Config(**{**ckpt["config"], **flags})
        if cfg.targets != ckpt["config"]["targets"]:
            raise UserError(f"{path} was begun with --targets {ckpt['config']['targets']}; type the same to resume")
    common.positive(cfg, "codes", "code_dim", "estimator_blocks", "batch_seconds", "max_steps", "log_every", "eval_every",
                    "save_every")
    if not 0 <= cfg.disturb <= 1:
        raise UserError(f"--disturb {cfg.disturb}: a share, from 0 to 1")
    rank, world, device = common.setup(cfg.device, cfg.seed)
    log = common.Log(path.replace(".pt", ".jsonl"))

    # teacher
    teacher_path = cfg.teacher or f"{cfg.out_dir}/mam_iter{cfg.iter - 1}.pt"
    if not os.path.exists(teacher_path):
        raise UserError(f"{teacher_path}: no such teacher; make it with: python train_mam.py --iter {cfg.iter - 1}"
                        + (f" --data {cfg.data}" if cfg.data else "") + ", or name one with --teacher")
    teacher = load(teacher_path).to(device).requires_grad_(False)
    trunk = teacher.encoder if isinstance(teacher, Classifier) else teacher
    if isinstance(teacher, Classifier) and cfg.teacher_layers != "last":
        raise UserError(f"--teacher_layers {cfg.teacher_layers} is for pre-trained teachers; {teacher_path} is a classifier "
                        "and teaches its logits")

    # data
    packs, weights = data.open_packs(cfg.data or f"{cfg.out_dir}/toy")
    if ckpt and ckpt["packs"] != [pack.info["id"] for pack in packs]:
        raise UserError(f"{path} was begun on other sounds than those of --data {cfg.data or 'toy'}; resume on the same packs, "
                        "or begin anew without --resume")
    rows = round(cfg.crop_seconds * data.SAMPLE_RATE / data.ROW)
    crop = rows * data.ROW + data.FRAME - data.HOP if rows else 0
    train, valid = data.hold_out(packs, seed=cfg.seed)
    clips = data.Clips(packs, crop)
    batch_samples = cfg.batch_seconds * data.SAMPLE_RATE * (crop / (rows * data.ROW) if rows else 1)
    plan = lambda epoch: data.epoch_batches(clips.samples, batch_samples, (cfg.seed, epoch), train, weights, multiple=world)

    # model
    if ckpt:
        shape = EncoderConfig(**ckpt["encoder"])
    elif cfg.model:
        shape = dataclasses.replace(PRESETS[cfg.model], fbank_mean=trunk.cfg.fbank_mean, fbank_std=trunk.cfg.fbank_std)
    else:
        shape = dataclasses.replace(trunk.cfg)
    if cfg.dropout >= 0:
        shape = dataclasses.replace(shape, dropout=cfg.dropout, attention_dropout=cfg.dropout)
    width = len(teacher.labels) if isinstance(teacher, Classifier) else trunk.cfg.dim
    model = SelfDistilledTokenizer(Encoder(shape), cfg.codes, cfg.code_dim, cfg.estimator_blocks, width).to(device)
    if cfg.from_teacher and not ckpt and [p.shape for p in model.encoder.parameters()] == [p.shape for p in trunk.parameters()]:
        model.encoder.load_state_dict(trunk.state_dict())
    model.encoder.recompute = cfg.recompute
    optimizer = common.make_optimizer(model, cfg.lr, cfg.weight_decay)
    step, place = 0, (0, 0)
    if ckpt:
        model.load_state_dict(ckpt["model"])
        common.load_optimizer(optimizer, ckpt["optimizer"])
        step, place = ckpt["step"], tuple(ckpt["place"])
    else:
        common.keep_old(path)
    model.codebook.decay = cfg.decay
    what = "token logits" if isinstance(teacher, Classifier) else cfg.teacher_layers + " layer"
    log(f"tokenizer {cfg.iter}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {cfg.codes} codes "
        f"of {cfg.code_dim}, teacher {teacher_path} ({what}, {width} wide)")

    # start of the codebook; mean and principal components of the teacher's features
    fixed = lambda *args: data.fixed_batches(clips, args[0], min(cfg.batch_seconds, 100.0 * world), cfg.seed, *args[1:])
    mine = slice(rank, None, world)
    if not ckpt:
        x, y = [torch.zeros(0, shape.dim, device=device)], [torch.zeros(0, width, device=device)]       # a rank may have none
        most = 100_000 // world
        model.eval()
        with torch.no_grad(), autocast(device, cfg.dtype):
            for batch in tqdm(fixed(train, 32, 0, mine), desc="k-means sample", leave=False, disable=True if rank else None):
                patches, ok, target, silent = prepare(data.to_device(batch, device), model.encoder, teacher, cfg.teacher_layers)
                x.append(model.encoder(patches, ok)[ok & ~silent].float())
                y.append(target[ok])
        model.train()
        chosen = lambda rows: (rows := torch.cat(rows))[torch.randperm(len(rows))[:most].to(device)]
        mean, matrix = whitening(*moments(chosen(y)))
        if cfg.targets != "raw":
            model.target_mean.copy_(mean)
        if cfg.targets == "whiten":
            model.target_map.copy_(matrix)
        model.start_(chosen(x), cfg.targets == "whiten")
    flops, rate = 0.0, 1.0          # of a second of audio: teacher once, model three times for its backward pass; of all devices
    if rank == 0:
        batch = data.to_device(next(iter(fixed(train, 1, 0, mine))), device)
        with torch.no_grad(), autocast(device, cfg.dtype):
            inputs = prepare(batch, model.encoder, teacher, cfg.teacher_layers)[:3]
            flops = common.flops_of(lambda: prepare(batch, model.encoder, teacher, cfg.teacher_layers))
            flops += 3 * common.flops_of(lambda: losses(model, *inputs))
        flops, rate = flops / (batch["wav"].numel() / data.SAMPLE_RATE), common.matrix_rate(device, cfg.dtype) * world
    ddp = common.wrap(model, device, cfg.compile)

    # training
    if ckpt and (ckpt["world"], ckpt["config"]["batch_seconds"]) != (world, cfg.batch_seconds):
        log("other ranks or batches than before: the rest of this epoch is dealt out anew, so some clips come twice and some "
            "not at all")
    valid_batches = fixed(valid, None, 1, mine)
    stream = data.Stream(plan, cfg.seed, place, rank, world)
    batches = iter(data.Loader(clips, stream, cfg.workers))
    stop, result = common.Stop(), {}
    model.train()
    window, counts, revived = torch.zeros(3, dtype=torch.float64, device=device), torch.zeros(cfg.codes, device=device), 0
    seen, began = 0.0, time.time()
    save = lambda: common.save_checkpoint(path, **tokenizer_state(model), optimizer=optimizer.state_dict(), step=step, place=place,
                                          config=dataclasses.asdict(cfg), packs=[pack.info["id"] for pack in packs], world=world)
    for step in tqdm(range(step, cfg.max_steps), initial=step, total=cfg.max_steps, desc="train", disable=True if rank else None):
        common.seed_step(cfg.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = common.lr_at(step, cfg.lr, cfg.warmup_steps, cfg.max_steps)
        batch = next(batches)
        parts = [data.to_device(part, device) for part in data.split_batch(batch, cfg.device_seconds or cfg.batch_seconds / world)]
        count = all_sum(sum(valid_tokens(part["lengths"], part["wav"].shape[1]).sum() for part in parts).double())
        z, codes, sounding = [], [], []
        for i, part in enumerate(parts):
            with contextlib.nullcontext() if world == 1 or i == len(parts) - 1 else ddp.no_sync():
                with autocast(device, cfg.dtype):
                    patches, ok, target, silent = prepare(part, model.encoder, teacher, cfg.teacher_layers, cfg.disturb)
                    distance, commitment, part_z, part_codes = losses(ddp, patches, ok, target)
                ((distance + cfg.beta * commitment) * world / count).float().backward()     # DDP divides by world
            z.append(part_z.flatten(0, 1))
            codes.append(part_codes.flatten())
            sounding.append((ok & ~silent).flatten())       # silence is not worth codes
            window += torch.stack([distance.detach(), commitment.detach(), ok.sum()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        z, codes, sounding = torch.cat(z), torch.cat(codes), torch.cat(sounding)
        revived += model.codebook.update_(z, codes, sounding, cfg.revive)
        counts.index_add_(0, codes, sounding.float())
        place = stream.after(place)
        seen += len(batch["wav"]) * batch["wav"].shape[1] / data.SAMPLE_RATE * world

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            distance, commitment, n = all_sum(window).tolist()
            use = code_use(all_sum(counts)[None].cpu())
            log(step=done, cosine=1 - distance / n, commitment=commitment / n, codes_used=use["codes_used"],
                dead_codes=cfg.codes - use["codes_used"], perplexity=use["perplexity"], revived=int(revived),
                lr=optimizer.param_groups[0]["lr"], x_realtime=seen / (time.time() - began),
                mfu=flops * seen / (time.time() - began) / rate, epoch=place[0])
            if use["perplexity"] < 0.05 * cfg.codes:
                log(f"WARNING: the codebook is collapsing, {use['codes_used']} of {cfg.codes} codes in use, perplexity "
                    f"{use['perplexity']:.1f}; stop this run and try a lower --lr, a longer --warmup_steps, a higher --revive, "
                    "or --from_teacher")
            window, counts, revived, seen, began = torch.zeros_like(window), torch.zeros_like(counts), 0, 0.0, time.time()
        paused, step = time.time(), done
        if stop.now(done, device):
            save()
            stop.close()
            log(f"stopped at step {done}, saved in {path}; go on with --resume")
            return dict(step=done)
        if done % cfg.eval_every == 0 or done == cfg.max_steps:
            result = evaluate(model, teacher, valid_batches, cfg, device)
            log(step=done, **result)
        if done % cfg.save_every == 0 or done == cfg.max_steps:
            save()
        began += time.time() - paused
    stop.close()
    return dict(step=step, **result)

if __name__ == "__main__":
    common.run(main, Config, __doc__)
