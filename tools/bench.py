"""
How fast each piece is, and how close to this machine's limit.

    python -m tools.bench                       # every piece, tiny and base, float32; and out/bench.json
    python -m tools.bench --model base --dtype bfloat16 --only encoder,mam --compile
    python -m tools.bench --model base --only encoder,mam --peer espnet,openbeats       # see tools/peers.py
    python -m tools.bench --only data --data packs/mine     # a pack beside FLAC, and beside copying memory
    python -m tools.bench --memory --model base,large       # seconds of audio per step that fit into a GPU

Pieces take turns, --runs times after a warm-up, so that a drifting machine is the same for all; medians, with
the spread. `limit` is the share of the machine's rate at matrix products, measured in the same rounds, in the
same precision and in a shape of the model's. Only the arithmetic of matrix products and convolutions counts,
by torch's own counter, so nothing can reach 100 %.
"""
import dataclasses
import functools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import finetune
import train_mam
import train_tokenizer
from audio import SAMPLE_RATE, fbank, num_tokens, patchify
from common import autocast, check
from model import (
    PREDICTORS,
    PRESETS,
    Classifier,
    Encoder,
    MaskedAudioModel,
    Transformer,
    conv_direct,
    recompute_blocks,
)
from tokenizer import RandomProjectionTokenizer, SelfDistilledTokenizer
from tools import peers

STEPS = ("mam", "mam2", "mam2-live", "tokenizer", "finetune")
PIECES = ("fbank", "patches", "encoder", *STEPS, "data")

@dataclass
class Config:
    model: str = "tiny,base"        # sizes, of tiny, base, large
    only: str = ",".join(PIECES)    # pieces; mam2 takes codes from a file, mam2-live computes them
    clips: int = 4                  # in a batch
    seconds: float = 10.0           # of a clip
    dtype: str = "float32"          # float32 | bfloat16
    compile: bool = False           # torch.compile the models
    runs: int = 5                   # timed rounds, after one to warm up
    peer: str = ""                  # others to time beside ours: openbeats, espnet, torchaudio, kaldi
    data: str = ""                  # pack of the data piece; none = toy sounds
    memory: bool = False            # what steps keep in memory, instead: counted, not measured
    device: str = "auto"            # auto | cpu | cuda
    out: str = "out/bench.json"     # results

# -----------------------------------------------------------------------------
# measuring

def measure(pieces, runs, device):
    """Time functions by turns: {name: function} -> {name: [seconds, ...]}."""
    times = {name: [] for name in pieces}
    for turn in range(runs + 1):
        for name, function in pieces.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:                # the first one warms up
                times[name].append(time.perf_counter() - began)
    return times

def flops_of(function):
    """Count the floating-point operations of matrix products and convolutions that function() does."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()

def matrix_product(shape, tokens, device, dtype):
    """Return a function that does the model's widest product, (tokens, dim) x (dim, ffn), for some 0.2 s."""
    options = dict(device=device, dtype=getattr(torch, dtype))
    x = torch.randn(tokens, shape.dim, **options)
    weight = torch.randn(shape.dim, shape.ffn, **options)
    wanted = 10**13 if device.type == "cuda" else 10**10
    repeat = 1 + min(1000, wanted // (tokens * weight.numel()))

    def run():
        for _ in range(repeat):
            x @ weight
    return run

# -----------------------------------------------------------------------------
# what is measured: losses as the training scripts compute them

def mam_loss(model, batch, tokenizer):
    inputs, targets = train_mam.prepare(batch, model.encoder, tokenizer, mask_ratio=0.75)
    sums = train_mam.losses(model, inputs, targets)
    return sums["loss"] / sums["count"]

def tokenizer_loss(model, batch, teacher, cfg):
    inputs, target, use = train_tokenizer.prepare(batch, model, teacher, cfg)
    sums, codes, z = train_tokenizer.losses(model, inputs, target, batch["valid"], cfg.beta)
    z, use = z.flatten(0, 1), use.flatten()
    model.codebook.update_(z, codes.flatten(), use)
    model.codebook.revive_(z, use, cfg.revive)
    return sums["loss"] / sums["count"]

def finetune_loss(model, batch, cfg):
    wav, noise = batch["wav"], batch["noise"]
    targets = torch.zeros(len(wav), len(model.labels), device=wav.device)
    chance = torch.rand(len(wav), 2, 2, device=wav.device)
    wav, lengths, targets = finetune.augment(wav, batch["lengths"], targets, cfg, torch.Generator())
    inputs = finetune.prepare(wav, lengths, chance, noise, True, model.encoder, cfg)
    sums = finetune.losses(model(*inputs).float(), targets, cfg)
    return sums["loss"] / sums["count"]

class CachedTokenizer(torch.nn.Module):
    """A tokenizer whose codes cost nothing, as if read from a file."""

    def codes(self, features, valid):
        return torch.randint(1024, valid.shape, device=valid.device)

def training(step, size, device="cpu", dtype="float32"):
    """Return the model of a training step, and its loss: a function of (model, batch)."""
    shape = PRESETS[size]
    if step == "finetune":
        cfg = finetune.Config(**finetune.TASKS["as2m"])
        shape = dataclasses.replace(shape, dropout=cfg.dropout, attention_dropout=cfg.dropout)
        classes = [str(number) for number in range(527)]
        model = Classifier(Encoder(shape), classes)
        loss = functools.partial(finetune_loss, cfg=cfg)
    elif step == "tokenizer":
        cfg = train_tokenizer.Config(dtype=dtype)
        teacher = Encoder(shape).to(device).requires_grad_(False).eval()
        model = SelfDistilledTokenizer(Encoder(shape), target_width=shape.dim)
        loss = functools.partial(tokenizer_loss, teacher=teacher, cfg=cfg)
    else:
        if step == "mam":
            tokenizer = RandomProjectionTokenizer()
        elif step == "mam2":
            tokenizer = CachedTokenizer()
        else:
            tokenizer = SelfDistilledTokenizer(Encoder(shape), estimator_blocks=0)
        model = MaskedAudioModel(Encoder(shape), 1024, *PREDICTORS[size])
        loss = functools.partial(mam_loss, tokenizer=tokenizer.to(device).eval())
    return model.to(device).train(), loss

def make_batch(clips, seconds, device="cpu"):
    """Return a batch of noise as the training scripts get it, without padding."""
    samples = round(seconds * SAMPLE_RATE)
    batch = dict(
        wav=torch.randint(-9999, 9999, (clips, samples), dtype=torch.short),
        lengths=torch.full((clips,), samples),
        noise=torch.rand(clips, num_tokens(samples)))
    return data.to_device(batch, device)

def optimizer_step(model, loss_of, batch, cfg, device):
    """Return a function that does a step: forward, backward, clipping, AdamW."""
    optimizer = common.make_optimizer(model, 1e-5, 0.01)
    if cfg.compile:
        model.compile()

    def step():
        with autocast(device, cfg.dtype):
            loss = loss_of(model, batch)
        loss.float().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step

def pieces_of(size, cfg, device):
    """Return {name: function} of the wanted pieces, ours and those of peers: each does a batch or a step."""
    torch.manual_seed(0)
    batch = make_batch(cfg.clips, cfg.seconds, device)
    wav, lengths = batch["wav"], batch["lengths"]
    features = fbank(wav)
    encoder = Encoder(PRESETS[size]).to(device).eval()
    if cfg.compile:
        encoder.compile()

    @torch.no_grad()
    def encode():
        with autocast(device, cfg.dtype):
            encoder.features(wav, lengths)

    pieces = {}
    for name in cfg.only.split(","):
        if name == "fbank":
            pieces[name] = functools.partial(fbank, wav)
        elif name == "patches":
            pieces[name] = lambda: patchify(encoder.normalise(features))
        elif name == "encoder":
            pieces[name] = encode
        elif name in STEPS:
            model, loss_of = training(name, size, device, cfg.dtype)
            pieces[name] = optimizer_step(model, loss_of, batch, cfg, device)
    for peer in filter(None, cfg.peer.split(",")):
        for name, function in peers.pieces_of(peer, encoder, wav, lengths, cfg.dtype).items():
            if name in pieces:
                pieces[f"{peer} {name}"] = function
    return pieces

# -----------------------------------------------------------------------------
# tables

def table(size, cfg, device):
    """Time the pieces of one size, print a line of each, and return the lines."""
    pieces = pieces_of(size, cfg, device)
    tokens = cfg.clips * num_tokens(round(cfg.seconds * SAMPLE_RATE))
    pieces["matrix"] = matrix_product(PRESETS[size], tokens, device, cfg.dtype)
    flops = {name: flops_of(function) for name, function in pieces.items()}
    times = measure(pieces, cfg.runs, device)
    limit = flops["matrix"] / median(times["matrix"])

    lines = []
    print("model  piece                    ms          spread  audio s/s    GFLOP  limit")
    for name, seconds in times.items():
        speed = cfg.clips * cfg.seconds / median(seconds)
        gflop = flops[name] / 1e9
        share = flops[name] / median(seconds) / limit
        line = dict(model=size, piece=name, seconds=seconds, gflop=gflop, share_of_limit=share)
        spread = f"{1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f}"
        text = f"{1e3 * median(seconds):8.1f} {spread:>15} {speed:10.0f} {gflop:8.1f} {share:6.0%}"
        ours = name.split()[-1]                 # a peer's is named "espnet mam"
        if ours != name:
            ratios = [theirs / our for theirs, our in zip(seconds, times[ours])]
            line["over_ours"] = ratios
            text += f"  {median(ratios):.2f}x ours ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{size:6} {name:18} {text}")
        lines.append(line)
    return lines

def reading(cfg):
    """Time batches of a pack, and the same clips decoded from FLAC and copied in memory, on one core."""
    with tempfile.TemporaryDirectory() as folder:
        pack = data.Pack(cfg.data) if cfg.data else data.make_toy(f"{folder}/pack", clips=256)
        clips = data.Clips([pack])
        order = data.epoch_batches(clips.samples, 320 * SAMPLE_RATE, key=(0, 0))
        batches = [[(clip, 0) for clip in batch.tolist()] for batch in order[:10]]
        sounds = {}
        for clip, _ in sum(batches, []):
            path = f"{folder}/{clip}.flac"
            sounds[path] = pack.audio(clip)
            soundfile.write(path, sounds[path], SAMPLE_RATE)

        ways = dict(
            pack=lambda: [clips[batch] for batch in batches],
            flac=lambda: [soundfile.read(path, dtype="int16") for path in sounds],
            copy=lambda: [wav.copy() for wav in sounds.values()])
        times = measure(ways, cfg.runs, torch.device("cpu"))

    for way, seconds in times.items():
        rates = [len(sounds) / turn for turn in seconds]
        print(f"data   {way:5} {median(rates):6.0f} clips per second ({min(rates):.0f}-{max(rates):.0f})")
    return dict(piece="data", clips=len(sounds), seconds=times)

# -----------------------------------------------------------------------------
# memory

class FusedAttention(torch.autograd.Function):
    """Attention as far as a GPU's fused kernel keeps it: queries, keys, values, bias, output; no weights."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, bias, output)
        return output

def attend(q, k, v, gate, bias, key_bias, p=0.0):
    return FusedAttention.apply(q, k, v, (gate * bias).to(q.dtype))

def saved_bytes(model, loss_of, clips):
    """Count what autograd saves of clips of 10 s in bfloat16, with a GPU's attention and convolution."""
    saved = {}

    def save(x):
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage         # held, so that no address comes twice
        return x

    batch = make_batch(clips, 10.0)
    on_gpu = mock.patch.multiple("model", attend=attend, conv_by_fft=conv_direct)
    watched = torch.autograd.graph.saved_tensors_hooks(save, lambda x: x)
    with on_gpu, watched, torch.autocast("cpu", torch.bfloat16):
        loss_of(model, batch)
    return sum(storage.nbytes() for storage in saved.values())

def memory(size, step):
    """Count what a training step keeps of each second of audio, and besides; print and return it.

    What a second clip adds is its audio's share. The rest, with weights, gradients and AdamW's moments (16
    bytes a parameter), is fixed. With recompute one block is there, too. A tenth of a card is left.
    """
    model, loss_of = training(step, size)
    stacks = [module for module in model.modules() if isinstance(module, Transformer)]
    shortest = min(len(stack.blocks) for stack in stacks)
    lines = []
    for recompute in (False, True):
        recompute_blocks(model, recompute)
        one = saved_bytes(model, loss_of, 1)
        two = saved_bytes(model, loss_of, 2)
        fixed = 16e6 * common.millions(model) + 2 * one - two
        second = (two - one) / 10
        if recompute:
            second += (lines[0]["mb_per_second"] * 1e6 - second) / shortest
        line = dict(model=size, step=step, recompute=recompute)
        line["fixed_gb"] = round(fixed / 1e9, 2)
        line["mb_per_second"] = second / 1e6
        for card in (16, 24, 40, 80):
            line[f"seconds_in_{card}_gb"] = max(0, int((0.9e9 * card - fixed) / second))
        print(line)
        lines.append(line)
    return lines

def main(**flags):
    cfg = Config(**flags)
    common.positive(cfg, "clips", "seconds", "runs")
    sizes, wanted = cfg.model.split(","), cfg.only.split(",")
    check(set(sizes) <= set(PRESETS), f"--model {cfg.model}: sizes are {', '.join(PRESETS)}")
    check(set(wanted) <= set(PIECES), f"--only {cfg.only}: pieces are {', '.join(PIECES)}")
    device = common.setup(cfg.device)[2]
    machine = f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, {cfg.dtype}, {cfg.clips} clips of {cfg.seconds:g} s, {cfg.runs} runs")

    lines = []
    for size in sizes:
        if cfg.memory:
            lines += memory(size, "mam") + memory(size, "finetune")
        elif wanted != ["data"]:
            lines += table(size, cfg, device)
    if "data" in wanted and not cfg.memory:
        lines.append(reading(cfg))
    path = Path(cfg.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = dict(machine=machine, config=vars(cfg), results=lines)
    path.write_text(json.dumps(results, indent=1))
    return lines

if __name__ == "__main__":
    common.run(main, Config, __doc__)
