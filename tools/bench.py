"""
How fast each piece is, and how close to this machine's limit.

    python -m tools.bench                       # every piece, tiny and base, float32; and out/bench.jsonl
    python -m tools.bench --model base --dtype bfloat16 --only encoder,mam --compile
    python -m tools.bench --model base --only encoder,mam --peer espnet,openbeats       # see tools/peers.py
    python -m tools.bench --only data --data packs/mine     # batches as the training scripts read them

Pieces take turns, --runs times after a warm-up, so that a drifting machine is the same for all. Of each are
given seconds, the median with the least and the most, and limit: its share of the machine's rate at matrix
products (the piece matrix), measured in the same rounds, in the same precision and in a shape of the model's.
Only the arithmetic of matrix products and convolutions counts, by torch's own counter, so none can reach 1.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import finetune
import train_mam
import train_tokenizer
from audio import SAMPLE_RATE, fbank, num_tokens
from common import check
from model import PREDICTORS, PRESETS, Classifier, Encoder, MaskedAudioModel
from tokenizer import RandomProjectionTokenizer, SelfDistilledTokenizer
from tools import peers

PIECES = ("data", "fbank", "encoder", "mam", "tokenizer", "finetune")

@dataclass
class Config:
    model: str = "tiny,base"        # sizes, of tiny, base, large
    only: str = ",".join(PIECES)    # pieces; mam, tokenizer and finetune are training steps
    clips: int = 4                  # in a batch
    seconds: float = 10.0           # of a clip
    dtype: str = "float32"          # float32 | bfloat16
    compile: bool = False           # torch.compile the models
    runs: int = 5                   # timed rounds, after one to warm up
    peer: str = ""                  # others to time beside ours: openbeats, espnet, torchaudio, kaldi
    data: str = ""                  # pack of the data piece; none = toy sounds
    device: str = "auto"            # auto | cpu | cuda
    out: str = "out/bench.jsonl"    # results, a line each

# -----------------------------------------------------------------------------
# training steps, as the scripts do them: a model, and losses(batch) -> dict of sums


def make_batch(clips, seconds):
    """Return a batch of noise as the training scripts get it, without padding."""
    samples = round(seconds * SAMPLE_RATE)
    return dict(
        wav=torch.randint(-9999, 9999, (clips, samples), dtype=torch.short),
        lengths=torch.full((clips,), samples),
        clip=torch.arange(clips),
        noise=torch.rand(clips, num_tokens(samples))
    )


def pretraining(size, device, dtype):
    tokenizer = RandomProjectionTokenizer().to(device)
    model = MaskedAudioModel(Encoder(PRESETS[size]), 1024, *PREDICTORS[size])

    def losses(batch):
        batch = data.to_device(batch, device)
        inputs, targets = train_mam.prepare(batch, model.encoder, tokenizer, mask_ratio=0.75)
        return train_mam.losses(model, inputs, targets)

    return model.to(device), losses


def distilling(size, device, dtype):
    cfg = train_tokenizer.Config(dtype=dtype)
    shape = PRESETS[size]
    teacher = Encoder(shape).to(device).eval()
    model = SelfDistilledTokenizer(Encoder(shape), target_width=shape.dim)

    def losses(batch):
        batch = data.to_device(batch, device)
        inputs, target, use = train_tokenizer.prepare(batch, model, teacher, cfg)
        sums, codes, z = train_tokenizer.losses(model, inputs, target, batch["valid"], cfg.beta)
        z = z.flatten(0, 1)
        use = use.flatten()
        model.codebook.update_(z, codes.flatten(), use)
        model.codebook.revive_(z, use, cfg.revive)
        return sums

    return model.to(device), losses


def finetuning(size, device, dtype):
    cfg = finetune.Config(**finetune.TASKS["as2m"] | dict(device_seconds=0.0))
    shape = dataclasses.replace(PRESETS[size], dropout=0.0, attention_dropout=0.0)
    model = Classifier(Encoder(shape), range(527))

    def losses(batch):
        targets = torch.zeros(len(batch["clip"]), 527)
        [part], full = finetune.parts_of(batch, targets, cfg, 0, device)
        wav, lengths, targets, chance, noise = part
        inputs = finetune.prepare(wav, lengths, chance, noise, full, model.encoder, cfg)
        return finetune.losses(model(*inputs).float(), targets, cfg)

    return model.to(device), losses


STEPS = dict(mam=pretraining, tokenizer=distilling, finetune=finetuning)

# -----------------------------------------------------------------------------
# what is timed: {name: function}, where "espnet mam" is a peer's mam


def matrix_product(shape, tokens, device, dtype):
    """Return a function that does the model's widest product, (tokens, dim) x (dim, ffn), many times."""
    x = torch.randn(tokens, shape.dim, device=device, dtype=getattr(torch, dtype))
    weight = x.new_empty(shape.dim, shape.ffn).normal_()
    repeats = 1000 if device.type == "cuda" else 10

    def run():
        for _ in range(repeats):
            x @ weight

    return run


def pieces_of(size, wanted, cfg, device):
    """Return the wanted pieces of a model, ours and those of peers: each does a batch or a step."""
    torch.manual_seed(0)
    made = make_batch(cfg.clips, cfg.seconds)
    batch = data.to_device(made, device)
    encoder = Encoder(PRESETS[size]).to(device).eval()
    if cfg.compile:
        encoder.compile()

    tokens = made["noise"].numel()
    pieces = dict(matrix=matrix_product(PRESETS[size], tokens, device, cfg.dtype))
    for name in wanted:
        if name == "fbank":
            pieces[name] = functools.partial(fbank, batch["wav"])
        elif name == "encoder":
            pieces[name] = functools.partial(peers.features, encoder.features, batch, cfg.dtype)
        elif name == "data":
            packs = cfg.data or data.toy_pack(Path(cfg.out).parent)
            sounds = data.Sounds(packs, cfg.seconds, cfg.clips * cfg.seconds, workers=0)
            pieces[name] = functools.partial(next, sounds.batches())
        else:
            model, losses = STEPS[name](size, device, cfg.dtype)
            if cfg.compile:
                model.compile()
            losses = functools.partial(losses, made)
            pieces[name] = peers.training_step(model, losses, device, cfg.dtype)

    # those of a peer that do the same as one of ours
    for peer in filter(None, cfg.peer.split(",")):
        for name, function in peers.pieces_of(peer, encoder, batch, cfg.dtype).items():
            if name in pieces:
                pieces[f"{peer} {name}"] = function
    return pieces


# -----------------------------------------------------------------------------
# timing


def measure(pieces, runs, device):
    """Time functions by turns: {name: function} -> {name: [seconds, ...]}."""
    times = {name: [] for name in pieces}
    for turn in range(runs + 1):
        for name, function in pieces.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    return times


def flops_of(function):
    """Count the floating-point operations of matrix products and convolutions that function() does."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def results(pieces, cfg, device):
    """Time pieces, and yield a dict for each."""
    times = measure(pieces, cfg.runs, device)
    # after them: what is first called under the counter is never compiled
    flops = {name: flops_of(function) for name, function in pieces.items()}
    limit = flops["matrix"] / median(times["matrix"])
    for name, seconds in times.items():
        middle = median(seconds)
        speed = cfg.clips * cfg.seconds / middle
        line = dict(
            piece=name,
            seconds=middle,
            least=min(seconds),
            most=max(seconds),
            x_realtime=speed,
            gflop=flops[name] / 1e9,
            limit=flops[name] / middle / limit
        )
        ours = name.split()[-1]
        if ours != name:
            ratios = [theirs / our for theirs, our in zip(seconds, times[ours])]
            line["over_ours"] = median(ratios)
        yield line


def main(**flags):
    cfg = Config(**flags)
    common.check_flags(cfg)
    check(cfg.clips > 0, f"--clips {cfg.clips}: has to be above 0")
    sizes = cfg.model.split(",")
    wanted = cfg.only.split(",")
    check(set(sizes) <= set(PRESETS), f"--model {cfg.model}: sizes are {', '.join(PRESETS)}")
    check(set(wanted) <= set(PIECES), f"--only {cfg.only}: pieces are {', '.join(PIECES)}")
    device = common.setup(cfg.device)[2]
    log = common.Log(cfg.out)
    log(threads=torch.get_num_threads(), torch=torch.__version__, **vars(cfg))

    for size in sizes:
        for line in results(pieces_of(size, wanted, cfg, device), cfg, device):
            log(model=size, **line)


if __name__ == "__main__":
    common.run(main, Config, __doc__)
