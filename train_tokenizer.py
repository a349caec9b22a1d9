"""
Distil a teacher into an acoustic tokenizer: from its codes an estimator has to predict the teacher's
features (BEATs, section 3.2.2).

    python train_tokenizer.py --data packs/mine --iter 2                        # teacher: out/mam_iter1.pt
    python train_tokenizer.py --data packs/mine --iter 3 --teacher out/x.pt     # a classifier's logits
    torchrun --nproc_per_node 8 train_tokenizer.py --data packs/audioset --iter 2 --preset ssl \\
        --device_seconds 200 --eval_every 5000 --save_every 5000

Writes out/tokenizer_iter<k>.pt, the codes of train_mam.py --iter k, and .jsonl (the log). What the codes are
worth: python -m tools.report out/tokenizer_iter2.pt --data PACK

Glossary: loss = 1 - cosine + beta * commitment, over valid tokens; cosine to the teacher's features, as
--targets makes them; commitment: squared distance of the encoder's vectors to their codes; codes_used,
dead_codes, perplexity, entropy_given_band: since the last log line; revived: codes put to new use since then;
mfu: see train_mam.py.
"""
import dataclasses
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import data
from audio import BANDS, ROW, SAMPLE_RATE, fbank, is_silent, num_tokens, patchify
from common import all_sum, autocast, check
from model import PLAIN, PRESETS, Encoder, flops_of, load, recompute_blocks, unpack
from tokenizer import SelfDistilledTokenizer, code_use, count_codes, whitening

# Table 4 of the paper, by teacher; batches in seconds of audio over all devices. The encoder starts at
# random. Where this departs from the paper: the target is the teacher's features less their mean, of a
# classifier the logits of each token; the codebook starts from k-means, leaves out silence, and dead codes
# are revived.
PAPER = dict(
    from_teacher=False,
    eval_every=5000,
    save_every=5000,
    batch_seconds=1400.0,
    max_steps=400_000,
    warmup_steps=32_000,
    dropout=0.1,
    weight_decay=0.01,
    crop_seconds=0.0
)
TABLE_4 = {"ssl": PAPER | dict(lr=5e-5), "sl": PAPER | dict(lr=5e-4)}

COLLAPSE = (
    "WARNING: the codebook is collapsing, perplexity under 5 % of its codes; stop this run and try a lower "
    "--lr, a longer --warmup_steps, a higher --revive, or --from_teacher"
)

@dataclass
class Config:
    preset: str = ""                # ssl | sl: the paper's values for a self-supervised or supervised teacher
    iter: int = 2                   # iteration of the tokenizer; its teacher is mam_iter<k-1>.pt
    data: str = ""                  # packs and shares of the seconds, packs/a:0.7,packs/b:0.3; none = toy
    splits: str = ""                # splits to hear, as in train,test; all; none = not test, eval, valid
    leave_out: str = ""             # splits or folds never to hear, as in 5
    teacher: str = ""               # another teacher: an encoder, or a classifier for its token logits
    out_dir: str = "out"            # folder of checkpoints and logs
    teacher_layers: str = "last"    # last | mean: what of a pre-trained teacher is distilled
    model: str = ""                 # tiny | base | large; none = the teacher's size
    from_teacher: bool = True       # start from the teacher's weights, if of its size
    dropout: float = -1.0           # of encoder and estimator, -1 = the teacher's or the model's
    codes: int = 1024               # size of the codebook
    code_dim: int = 256             # width of a code
    estimator_blocks: int = 3       # transformer blocks from codes to features
    targets: str = "centre"         # centre | whiten | raw: less their mean, whitened, or as they are
    beta: float = 1.0               # weight of the commitment loss
    decay: float = 0.99             # of the codebook's moving average
    disturb: float = 0.0            # share of the clips that the tokenizer, not the teacher, hears noisy
    revive: float = 0.1             # codes used less than this share of the average start anew, 0 = never
    crop_seconds: float = 2.56      # random crops of this length, 0 = whole clips
    batch_seconds: float = 41.0     # audio per step, all ranks together
    device_seconds: float = 0.0     # most audio per forward pass on one device, 0 = the rank's whole share
    max_steps: int = 500            # optimizer steps
    warmup_steps: int = 60          # of linear warm-up, then linear decay to 0
    lr: float = 5e-4                # peak learning rate
    weight_decay: float = 0.01      # on matrices only
    clip: float = 1.0               # largest gradient norm
    seed: int = 0                   # of everything that is random
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = "auto"             # auto | float32 | bfloat16
    compile: bool = False           # torch.compile
    recompute: bool = False         # recompute blocks in the backward pass: slower, far less memory
    workers: int = 1                # threads per rank that make batches ahead, 0 = none
    log_every: int = 20             # steps between log lines
    eval_every: int = 250           # steps between validations
    save_every: int = 250           # steps between checkpoints, of which the last two are kept
    keep_every: int = 0             # steps between those that are kept for good, 0 = none
    resume: bool = False            # continue out/tokenizer_iter<k>.pt

# what has been settled once a run is under way
FIXED = "model", "from_teacher", "dropout", "targets"


def disturb(wav, lengths, chance, share):
    """Make a share of the clips 10 dB softer to 10 dB louder, with themselves backwards 0 to 20 dB below.

    wav: (B, n); lengths: (B,); chance: (B, 3) uniform in [0, 1). A clip becomes the same in any batch.
    """
    which, gain, snr = chance.T[..., None]  # (B, 1) each
    sample = torch.arange(wav.shape[1], device=wav.device)
    backwards = wav.gather(1, (lengths[:, None] - 1 - sample).clamp(min=0))
    return torch.where(which < share, 10 ** (gain - 0.5) * (wav + 10**-snr * backwards), wav)


@torch.no_grad()
def prepare(batch, model, teacher, cfg, disturbed=0.0):
    """Return what the tokenizer takes, target (B, T, width), float32, and use (B, T), False at silence."""
    features = fbank(batch["wav"])  # (B, N, 128)
    with autocast(features.device, cfg.dtype):
        taught = teacher.teach(features, batch["mask"], cfg.teacher_layers)
    use = batch["valid"] & ~is_silent(features)
    if disturbed:
        features = fbank(
            disturb(batch["wav"], batch["lengths"], batch["noise"][:, :3], disturbed)
        )
    patches = patchify(model.encoder.normalise(features))
    return dict(patches=patches, valid=batch["mask"]), model.target(taught), use


def losses(model, inputs, target, valid, beta):
    """Return sums over valid tokens, and their count; codes (B, T) and z (B, T, d) for the codebook.

    What is added to the sums is logged; "loss" is minimised.
    """
    predicted, commitment, codes, z = model(**inputs)
    cosine = F.cosine_similarity(predicted.float(), target, dim=-1)  # (B, T)
    loss = 1 - cosine + beta * commitment
    sums = dict(loss=loss, cosine=cosine, commitment=commitment)
    sums = {name: (value * valid).sum() for name, value in sums.items()}
    return sums | dict(count=valid.sum()), codes, z


@torch.no_grad()
def validate(model, teacher, sounds, cfg, device):
    """Return the means of losses() and the use of codes over the held-out clips of all ranks."""
    model.eval()
    sums, counts = {}, torch.zeros(BANDS, cfg.codes, device=device)
    for batch in sounds.held_out(device):
        inputs, target, use = prepare(batch, model, teacher, cfg)
        with autocast(device, cfg.dtype):
            some, codes, _ = losses(model, inputs, target, batch["valid"], cfg.beta)
        common.add_to(sums, some)
        counts += count_codes(codes.masked_fill(~use, -1), cfg.codes)
    model.train()
    values = common.means(sums) | code_use(all_sum(counts))
    entropy = values.pop("entropy_given_band")  # without valid_, as train_mam.py logs it
    return {f"valid_{name}": value for name, value in values.items()} | dict(entropy_given_band=entropy)


@torch.no_grad()
def start(model, teacher, sounds, cfg, device):
    """Begin from the mean (or principal components) of the teacher's features and k-means of the vectors."""
    model.eval()
    outputs, taught = [], []
    for batch in sounds.sample(device):
        inputs, target, use = prepare(batch, model, teacher, cfg)  # target: as the teacher gives it
        with autocast(device, cfg.dtype):
            output = model.encoder(**inputs)
        outputs.append(output[use].float())
        taught.append(target[batch["valid"]])
    model.train()

    def some(rows):
        rows = torch.cat(rows)
        return rows[torch.randperm(len(rows))[: 100_000 // common.world()].to(device)]

    mean, matrix = whitening(some(taught))
    if cfg.targets != "raw":
        model.target_mean.copy_(mean)
    outputs = some(outputs)
    if cfg.targets == "whiten":
        model.target_map.copy_(matrix)
        model.whiten_(outputs)
    tokens = cfg.batch_seconds * SAMPLE_RATE / ROW * BANDS
    model.codebook.start_(model.quantize_layer(outputs), per_step=tokens)


def find_teacher(cfg):
    """Return the teacher, an Encoder or a Classifier, and its path."""
    path = cfg.teacher or f"{cfg.out_dir}/mam_iter{cfg.iter - 1}.pt"
    typed = f" --data {cfg.data}" if cfg.data else ""
    typed += f" --out_dir {cfg.out_dir}" if cfg.out_dir != "out" else ""
    check(
        os.path.exists(path),
        f"{path}: no such teacher; make it with: python train_mam.py --iter {cfg.iter - 1}{typed}, "
        "or name one with --teacher"
    )
    return load(path).requires_grad_(False), path


def find_encoder(cfg, teacher, path, ckpt):
    """Return the tokenizer's encoder: of the checkpoint to resume from, of the teacher, or a fresh one."""
    if ckpt:
        return unpack(ckpt, path)[1]
    trunk = getattr(teacher, "encoder", teacher)  # of a classifier, what is below its head
    shape = dataclasses.replace(trunk.cfg, **PLAIN)
    if cfg.model:
        shape = dataclasses.replace(
            PRESETS[cfg.model], fbank_mean=shape.fbank_mean, fbank_std=shape.fbank_std
        )
    if cfg.dropout >= 0:
        shape = dataclasses.replace(shape, dropout=cfg.dropout, attention_dropout=cfg.dropout)
    encoder = Encoder(shape)
    if cfg.from_teacher and shapes(encoder) == shapes(trunk):
        encoder.load_state_dict(trunk.state_dict())
    return encoder


def shapes(module):
    return [parameter.shape for parameter in module.parameters()]


def meter_of(model, teacher, sounds, cfg, device):
    """Return the meter of speed and losses. A backward pass costs two forward ones; a teacher has none."""
    seconds = sounds.mean_seconds()
    tokens = num_tokens(round(seconds * SAMPLE_RATE))
    flops = 3 * flops_of(model, tokens) + flops_of(teacher, tokens)
    return common.Meter(device, cfg.dtype, flops / seconds)


def main(**flags):
    preset = TABLE_4.get(flags.get("preset"), {})
    cfg, path, ckpt = common.begin(Config, flags, "tokenizer_iter{iter}", preset, FIXED)
    check(cfg.codes <= 2**16, f"--codes {cfg.codes}: at most 65536, for they are kept in 16 bits")
    _, world, device = common.setup(cfg.device, cfg.seed)
    lock, log = common.Lock(path), common.Log(path)

    # teacher and sounds; a twentieth of the recordings is held out
    teacher, source = find_teacher(cfg)
    teacher.to(device)
    check(
        cfg.teacher_layers == "last" or isinstance(teacher, Encoder),
        f"--teacher_layers {cfg.teacher_layers} is for pre-trained teachers; {source} is a classifier"
    )
    packs = cfg.data or data.toy_pack(cfg.out_dir)
    sounds = data.Sounds(packs, cfg.crop_seconds, cfg.batch_seconds, cfg.seed, cfg.workers,
                         cfg.splits, cfg.leave_out)
    sounds.clips.round_rows = 4 if cfg.compile else 1
    common.same(ckpt, "packs", sounds.ids(), f"{path} was begun on other sounds or splits than {packs}")
    taught_by = common.fingerprint(teacher.state_dict())
    common.same(ckpt, "teacher", taught_by, f"{path} was begun with another teacher than {source}")

    # model
    encoder, width = find_encoder(cfg, teacher, path, ckpt), teacher.teach_width
    model = SelfDistilledTokenizer(encoder, cfg.codes, cfg.code_dim, cfg.estimator_blocks, width).to(device)
    recompute_blocks(model, cfg.recompute)
    optimizer = common.make_optimizer(model, cfg.lr, cfg.weight_decay)
    first, place = common.restore(cfg, path, ckpt, model, optimizer)
    model.codebook.decay = cfg.decay
    log(
        f"tokenizer {cfg.iter}: {common.millions(model):.1f} M parameters, {cfg.codes} codes of "
        f"{cfg.code_dim}, teacher {source} ({type(teacher).__name__}, {width} wide), {sounds}"
    )
    if not ckpt:
        start(model, teacher, sounds, cfg, device)
    ddp = common.wrap(model, cfg.compile)
    if cfg.compile:
        getattr(teacher, "encoder", teacher).compile()

    done, result = first, {}

    def evaluate():
        values = validate(model, teacher, sounds, cfg, device)
        log(step=done, **values)
        return values

    if ckpt and ckpt.get("owed"):  # the evaluation that a signal kept from being made
        result = evaluate()

    # training
    meter = meter_of(model, teacher, sounds, cfg, device)
    counts, revived = torch.zeros(BANDS, cfg.codes, device=device), 0  # since the last log line
    batches = sounds.batches(place)
    stop = common.Stop()
    model.train()
    for step in common.progress(first, cfg.max_steps):
        common.seed_step(cfg.seed, step)
        lr = common.set_lr(optimizer, cfg, step)
        batch = next(batches)
        parts = sounds.parts(batch, device, cfg.device_seconds)
        count = all_sum(sum(part["valid"].sum() for part in parts).double())

        vectors, codes, use = [], [], []
        for i, part in enumerate(parts):
            inputs, target, sounding = prepare(part, model, teacher, cfg, cfg.disturb)
            ddp.require_backward_grad_sync = i == len(parts) - 1  # ranks add up their gradients once
            with autocast(device, cfg.dtype):
                sums, chosen, z = losses(ddp, inputs, target, part["valid"], cfg.beta)
            (sums["loss"] * world / count).float().backward()  # DDP divides by world
            meter.add(sums)
            counts += count_codes(chosen.masked_fill(~sounding, -1), cfg.codes)
            vectors.append(z.flatten(0, 1))
            codes.append(chosen.flatten())
            use.append(sounding.flatten())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        finite = common.step_if_finite(optimizer, norm)

        # the codebook follows by its own rule; silence is not worth codes
        vectors, codes, use = torch.cat(vectors), torch.cat(codes), torch.cat(use) & finite
        model.codebook.update_(vectors, codes, use)
        if cfg.revive:
            revived += model.codebook.revive_(vectors, use, cfg.revive)
        meter.heard(batch, finite)

        done = step + 1
        stopped = stop.now(done, device)
        last = stopped or done == cfg.max_steps
        if last or done % cfg.log_every == 0:
            used = code_use(all_sum(counts))
            used |= dict(revived=int(revived), lr=lr, epoch=batch["next"][0])
            log(step=done, **meter.read(), **used)
            counts, revived = torch.zeros_like(counts), 0
            if used["perplexity"] < 0.05 * cfg.codes:
                log(COLLAPSE)
            meter.check_steps(path, batch, sounds.names)
        with meter.paused():
            due = done % cfg.eval_every == 0 or done == cfg.max_steps
            if due and not stopped:
                result = evaluate()
            if last or done % cfg.save_every == 0:
                meter.check_steps(path, batch, sounds.names, evaluate)
                content = model.state() | dict(packs=sounds.ids(), teacher=taught_by)
                content |= dict(owed=due and stopped)
                common.save_training(path, cfg, optimizer, batch["next"], done, **content)
        if stopped:
            log(f"stopped at step {done}, saved in {path}; go on with --resume")
            break
    stop.close()
    return dict(step=done, **result)


if __name__ == "__main__":
    common.run(main, Config, __doc__)
