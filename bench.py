"""
How fast each piece is, and how close to this machine's limit.

    python bench.py                                     # every piece, tiny and base, float32; a table and out/bench.json
    python bench.py --model base --dtype bfloat16 --only encoder,mam --compile
    python bench.py --model base --only encoder,mam --peer espnet,openbeats     # alternating with others (peers.py), and the ratios
    python bench.py --only data --data packs/mine       # reading a pack, against copying memory and decoding FLAC
    python bench.py --figure out/cost.png               # cost per token against clip length and batch
    python bench.py --memory                            # seconds of audio per step that fit into a GPU

Pieces run in turn, --runs times after a warm-up, so that a drifting machine is the same for all; medians, with the spread.
`limit` is the share of the machine's matrix rate, measured in the same rounds: products of the model's own shape in the same
precision. It counts the arithmetic of matrix products and convolutions only (torch's own counter), so nothing can reach 100 %.
"""
import dataclasses
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import common
import data
import finetune
import model
import peers
import train_mam
import train_tokenizer
from common import UserError, autocast
from model import FRAME, HOP, PRESETS, Classifier, Encoder, MaskedAudioModel, fbank, patchify, random_mask, valid_tokens
from tokenizer import RandomProjectionTokenizer, SelfDistilledTokenizer

@dataclass
class Config:
    model: str = "tiny,base"        # sizes, of tiny, base, large
    only: str = "fbank,patches,encoder,mam,mam2,mam2-live,tokenizer,finetune,data"     # pieces; see the table they print
    clips: int = 4                  # in a batch
    seconds: float = 10.0           # of a clip
    dtype: str = "float32"          # auto | float32 | bfloat16
    compile: bool = False           # torch.compile the models
    runs: int = 5                   # timed rounds, after one to warm up
    peer: str = ""                  # others to time beside ours: openbeats, espnet, torchaudio, kaldi (see peers.py)
    data: str = ""                  # pack for the data piece; none = made-up clips
    memory: bool = False            # what a step keeps in memory, instead of the table: counted, not measured
    figure: str = ""                # PNG of cost per token against clip length and batch, instead of the table
    device: str = "auto"            # auto | cpu | cuda
    out: str = "out/bench.json"     # results

# -----------------------------------------------------------------------------
# measuring

def seconds_of(function, device):
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began

def peak_memory(function, device):
    """MB that function holds at most. On Linux, the rise of the process's own high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**20
    kilobytes = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
    try:
        Path("/proc/self/clear_refs").write_text("5")           # forget the mark
        before = kilobytes("VmRSS")
        function()
        return (kilobytes("VmHWM") - before) / 1024
    except OSError:
        return float("nan")

def measure(pieces, runs, device):
    """{name: function} -> {name: [seconds, ...]}, taking turns."""
    times = {name: [] for name in pieces}
    for turn in range(runs + 1):
        for name, function in pieces.items():
            took = seconds_of(function, device)
            if turn:
                times[name].append(took)
    return times

# -----------------------------------------------------------------------------
# what is measured

def matrix_product(cfg, tokens, device, dtype):
    """The model's widest product, (tokens, dim) x (dim, ffn), as often as takes some 0.2 s."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a, b = torch.randn(tokens, cfg.dim, device=device, dtype=kind), torch.randn(cfg.dim, cfg.ffn, device=device, dtype=kind)
    repeat = max(1, int(2e10 / (2 * tokens * cfg.dim * cfg.ffn)))
    def run():
        for _ in range(repeat):
            a @ b
    return run, repeat * 2 * tokens * cfg.dim * cfg.ffn

def pieces_of(size, cfg, device):
    """{name: function} of one model size; each function does one batch or one optimizer step."""
    torch.manual_seed(0)
    B, n = cfg.clips, round(cfg.seconds * data.SAMPLE_RATE)
    batch = dict(wav=0.1 * torch.randn(B, n), lengths=torch.full((B,), n))
    batch["noise"] = torch.rand(valid_tokens(batch["lengths"], n).shape)
    batch = {key: value.to(device) for key, value in batch.items()}
    wav, lengths = batch["wav"], batch["lengths"]
    features = fbank(wav)
    encoder = Encoder(PRESETS[size]).to(device).eval()
    frozen = Encoder(PRESETS[size]).to(device).eval().requires_grad_(False)
    if cfg.compile:
        encoder.compile()

    @torch.no_grad()
    def forward():
        with autocast(device, cfg.dtype):
            encoder.features(wav, lengths)

    def step(model, loss_of, after=lambda model: None):
        """Forward, backward, clip, AdamW."""
        model = model.to(device).train()
        if cfg.compile:
            model.compile()
        optimizer = common.make_optimizer(model, 1e-5, 0.01)
        def run():
            with autocast(device, cfg.dtype):
                loss = loss_of(model)
            loss.float().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after(model)
        return run

    blocks, width = (2, 128) if size == "tiny" else (3, 0)
    settings = train_mam.Config(dtype=cfg.dtype)
    def mam(labels, tokens=None):
        def loss_of(model):
            given = batch if tokens is None else batch | dict(tokens=tokens)
            inputs, targets, _ = train_mam.prepare(given, model.encoder, labels, settings)
            return train_mam.loss_and_correct(model, inputs, targets)[0] / targets.numel()
        return step(MaskedAudioModel(Encoder(PRESETS[size]), 1024, blocks, width), loss_of)
    def distil(model):
        patches, valid, target, silent = train_tokenizer.prepare(batch, model.encoder, frozen)
        distance, commitment, z, codes = train_tokenizer.losses(model, patches, valid, target)
        vectors.update(z=z.flatten(0, 1), codes=codes.flatten(), use=(valid & ~silent).flatten())
        return (distance + commitment) / valid.sum()
    vectors = {}
    projection = RandomProjectionTokenizer().to(device)
    distilled = lambda: SelfDistilledTokenizer(Encoder(PRESETS[size]), target_width=frozen.cfg.dim)
    recipe, random = finetune.Config(**finetune.TASKS["as2m"]), torch.Generator().manual_seed(0)
    def classify(model):
        heard, samples, targets = finetune.augment(batch, torch.zeros(B, 50, device=device), recipe, random)
        chance = torch.rand(B, 2, 2, generator=random).to(device)
        features = model.encoder.normalise(fbank(heard))
        features = finetune.spec_augment(features, 1 + (samples - FRAME) // HOP, recipe.spec_augment, chance)
        return finetune.classification_loss(model(patchify(features)).float(), targets, recipe) / B
    make = dict(
        fbank=lambda: lambda: fbank(wav),
        patches=lambda: lambda: patchify(encoder.normalise(features)),
        encoder=lambda: forward,                                                # waveform -> features
        mam=lambda: mam(projection),                                            # iteration 1
        mam2=lambda: mam(None, torch.randint(1024, batch["noise"].shape, device=device)),       # iteration 2, cached tokens
        tokenizer=lambda: step(distilled(), distil, lambda model: model.codebook.update_(**vectors, revive=0.1)),
        finetune=lambda: step(Classifier(Encoder(PRESETS[size]), [str(k) for k in range(50)]), classify))
    make["mam2-live"] = lambda: mam(distilled().to(device).eval())              # the same, tokenized on the fly
    return {name: make[name]() for name in cfg.only.split(",") if name in make}, encoder, wav, lengths

def reading(cfg):
    """Batches from a warm pack, the same clips decoded from FLAC, and the copying that the first cannot avoid."""
    import soundfile
    with tempfile.TemporaryDirectory() as folder:
        if cfg.data:
            pack = data.Pack(cfg.data)
        else:
            rows = [dict(path=str(i), labels=[], split="", group="") for i in range(256)]
            tone = lambda i: np.sin(np.cumsum(np.random.default_rng(i).uniform(0.01, 0.5, 100).repeat(1600)))
            noise = 0.05 * np.random.default_rng(0).standard_normal(160_000)
            read = lambda row: (tone(int(row["path"])) + noise).astype(np.float32) / 4
            pack = data.write_pack(Path(folder) / "pack", rows, read, source="made up")
        clips = data.Clips([pack])
        batches = data.epoch_batches(clips.samples, 320 * data.SAMPLE_RATE, (0, 0))[:10]
        batches = [[(int(i), 0, k) for k, i in enumerate(batch)] for batch in batches]
        chosen = [item[0] for batch in batches for item in batch]
        for i in set(chosen):
            soundfile.write(f"{folder}/{i}.flac", pack.audio(i), data.SAMPLE_RATE)
        memory = [pack.audio(i) for i in chosen]
        for i in chosen:
            soundfile.read(f"{folder}/{i}.flac")
        ways = dict(pack=lambda: [clips[batch] for batch in batches], copy=lambda: [wav.copy() for wav in memory],
                    flac=lambda: [soundfile.read(f"{folder}/{i}.flac", dtype="int16") for i in chosen])
        times = measure(ways, cfg.runs, torch.device("cpu"))
    rate = {name: sorted(len(chosen) / t for t in took) for name, took in times.items()}
    middle = {name: statistics.median(r) for name, r in rate.items()}
    seconds = pack.samples[chosen].mean() / data.SAMPLE_RATE
    over_flac, of_copying = middle["pack"] / middle["flac"], middle["pack"] / middle["copy"]
    print(f"data, clips of {seconds:.1f} s on one core: "
          + ", ".join(f"{name} {middle[name]:.0f} ({r[0]:.0f}-{r[-1]:.0f}) clips/s" for name, r in rate.items())
          + f"; the pack at {over_flac:.1f}x FLAC and {100 * of_copying:.0f} % of copying")
    return dict(piece="data", clip_seconds=float(seconds), clips_per_second=middle, over_flac=over_flac, of_copying=of_copying)

# -----------------------------------------------------------------------------

def table(cfg, device):
    results = []
    print(f"{'model':6} {'piece':18} {'ms':>8} {'spread':>15} {'audio s/s':>10} {'GFLOP':>8} {'limit':>6} {'MB':>7}")
    for size in cfg.model.split(","):
        pieces, *ours = pieces_of(size, cfg, device)
        encoder, theirs = ours[0], {}                           # theirs: name printed -> our piece
        for peer in filter(None, cfg.peer.split(",")):
            for piece, function in peers.pieces_of(peer, *ours, cfg.dtype).items():
                if piece in pieces:
                    pieces[f"{peer} {piece}"], theirs[f"{peer} {piece}"] = function, piece
        tokens = cfg.clips * int(cfg.seconds * data.SAMPLE_RATE // data.ROW) * 8
        flops = {name: common.flops_of(function) for name, function in pieces.items()}
        memory = {name: peak_memory(function, device) for name, function in pieces.items()}
        product, flops["matrix"] = matrix_product(encoder.cfg, tokens, device, cfg.dtype)
        times = measure(pieces | dict(matrix=product), cfg.runs, device)
        rate = flops["matrix"] / statistics.median(times["matrix"])
        for name, took in times.items():
            middle = statistics.median(took)
            line = dict(model=size, piece=name, dtype=cfg.dtype, compiled=cfg.compile, clips=cfg.clips, clip_seconds=cfg.seconds,
                        ms=1e3 * middle, ms_min=1e3 * min(took), ms_max=1e3 * max(took),
                        audio_seconds_per_second=cfg.clips * cfg.seconds / middle,
                        gflop=flops[name] / 1e9, share_of_limit=flops[name] / middle / rate, peak_mb=memory.get(name, 0.0))
            results.append(line)
            speed = f"{line['audio_seconds_per_second']:10.0f}" if name != "matrix" else f"{rate / 1e9:4.0f} GF/s"
            print(f"{size:6} {name:18} {line['ms']:8.1f} {line['ms_min']:7.1f}-{line['ms_max']:<7.1f} {speed:>10} "
                  f"{line['gflop']:8.1f} {100 * line['share_of_limit']:5.0f}% {line['peak_mb']:7.0f}")
        if cfg.peer and not theirs:
            print(f"--peer {cfg.peer}: does none of {', '.join(pieces)}")
        for name, piece in theirs.items():
            ratios = sorted(a / b for a, b in zip(times[name], times[piece]))
            print(f"{size}: {name} takes {statistics.median(times[name]) / statistics.median(times[piece]):.2f}x our time "
                  f"(in single rounds {ratios[0]:.2f} to {ratios[-1]:.2f})")
            results.append(dict(model=size, piece=name, over_ours=ratios))
        if {"mam2", "mam2-live"} <= times.keys():
            live, cached = (statistics.median(times[k]) for k in ("mam2-live", "mam2"))
            print(f"{size}: cached tokens save {100 * (1 - cached / live):.0f} % of an iteration-2 step")
    return results

class Saved(torch.autograd.Function):
    """Attention as a GPU's fused kernel keeps it: queries, keys, values, bias and output, none of the weights."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, bias, out)
        return out

def memory(cfg):
    """What a training step keeps on a GPU, counted on this machine: the tensors that autograd saves in mixed precision, with the
    convolution and attention that GPUs use. What two clips of 10 s keep more than one is the share of the audio; the rest, with
    weights, gradients and AdamW's moments (16 bytes a parameter), is fixed. With recompute one block's share comes on top. A
    tenth of a card is left."""
    fused = lambda q, k, v, attn_mask, dropout_p: Saved.apply(q, k, v, attn_mask)
    results, cards = [], (16, 24, 40, 80)
    print(f"{'model':6} {'step':9} {'':10} {'fixed GB':>8} {'MB per s':>9}   "
          f"seconds of audio that fit into {', '.join(map(str, cards))} GB")

    def kept(net, clips, **inputs):
        saved = {}
        def save(x):
            storage = x.untyped_storage()               # held, so that no address comes twice
            saved[storage.data_ptr()] = storage
            return x
        with (mock.patch.multiple(model, ATTENTION="fused", conv_by_fft=model.conv_direct),
              mock.patch.object(model.F, "scaled_dot_product_attention", fused),
              torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(save, lambda x: x)):
            logits = net(torch.randn(clips, 496, 256), None, **{key: x.expand(clips, -1) for key, x in inputs.items()})
            labels = torch.zeros(logits[..., 0].numel(), dtype=torch.long)
            torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), labels)
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)

    for size in cfg.model.split(","):
        for step in ("mam", "finetune"):
            for recompute in (False, True):
                torch.manual_seed(0)
                drop = {} if step == "mam" else dict(dropout=0.0, attention_dropout=0.0)
                encoder, inputs = Encoder(dataclasses.replace(PRESETS[size], **drop)), {}
                encoder.recompute = recompute
                if step == "mam":
                    net = MaskedAudioModel(encoder, 1024, *((2, 128) if size == "tiny" else (3, 0))).train()
                    everything = torch.ones(1, 496, dtype=torch.bool)
                    inputs = dict(zip(("keep", "masked"), random_mask(torch.rand(1, 496), everything, 0.75)))
                else:
                    net = Classifier(encoder, list(map(str, range(527)))).train()
                one, two = kept(net, 1, **inputs), kept(net, 2, **inputs)
                fixed, second = 16 * sum(p.numel() for p in net.parameters()) + 2 * one - two, (two - one) / 10
                if not recompute:
                    without, blocks = second, len(net.blocks) if step == "mam" else encoder.cfg.layers   # a predictor's is the largest
                else:
                    second += (without - second) / blocks
                fits = [max(0, int((0.9 * card * 1e9 - fixed) / second)) for card in cards]
                results.append(dict(model=size, piece=f"{step} memory", recompute=recompute, fixed_gb=fixed / 1e9,
                                    mb_per_second=second / 1e6, fits=dict(zip(cards, fits))))
                print(f"{size:6} {step:9} {'recompute' if recompute else '':10} {fixed / 1e9:8.2f} {second / 1e6:9.1f}   "
                      f"{', '.join(map(str, fits))}", flush=True)
    return results

def figure(cfg, device):
    """Milliseconds per second of audio of a forward pass and a pre-training step, against clip length and against batch."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--figure: pip install matplotlib") from None
    results, (left, right) = [], (panels := plt.subplots(1, 2, figsize=(9, 3.5), sharey=True))[1]
    for size in cfg.model.split(","):
        lengths = [(max(1, round(40 / s)), s) for s in (1, 2, 5, 10, 20, 30)]
        for axis, label, grid in ((left, "clip length in seconds, 40 s a batch", lengths),
                                  (right, "clips of 10 s in a batch", [(b, 10) for b in (1, 2, 4, 8)])):
            cost = {}
            for clips, seconds in grid:
                part = Config(**{**vars(cfg), "clips": clips, "seconds": float(seconds), "only": "encoder,mam"})
                pieces = pieces_of(size, part, device)[0]
                flops = {name: common.flops_of(f) for name, f in pieces.items()}
                for name, took in measure(pieces, cfg.runs, device).items():
                    ms, gflop = 1e3 * statistics.median(took) / clips / seconds, flops[name] / 1e9
                    cost.setdefault(name, []).append((seconds if axis is left else clips, ms))
                    results.append(dict(model=size, piece=name, clips=clips, clip_seconds=seconds, ms_per_second=ms, gflop=gflop))
                    print(f"{size} {name} {clips} x {seconds} s: {ms:.1f} ms and {gflop / clips / seconds:.2f} GFLOP per second "
                          "of audio", flush=True)
            for name, points in cost.items():
                axis.plot(*zip(*points), "o-", label=f"{size} {name}")
            axis.set_xlabel(label)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
    left.set_ylabel("ms per second of audio")
    left.set_yscale("log")
    right.legend(frameon=False)
    panels[0].tight_layout()
    panels[0].savefig(cfg.figure, dpi=150)
    print(f"written: {cfg.figure}")
    return results

def main(**flags):
    cfg = Config(**flags)
    common.positive(cfg, "clips", "seconds", "runs")
    unknown = set(cfg.model.split(",")) - set(PRESETS)
    if unknown:
        raise UserError(f"--model {cfg.model}: sizes are {', '.join(PRESETS)}")
    device = common.setup(cfg.device)[2]
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {cfg.dtype}, "
          f"{cfg.clips} clips of {cfg.seconds:g} s, {cfg.runs} runs")
    pieces = set(cfg.only.split(",")) - {"data"}
    results = memory(cfg) if cfg.memory else figure(cfg, device) if cfg.figure else table(cfg, device) if pieces else []
    if "data" in cfg.only.split(",") and not (cfg.figure or cfg.memory):
        results.append(reading(cfg))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    machine = dict(device=device.type, threads=torch.get_num_threads(), torch=str(torch.__version__))
    Path(cfg.out).write_text(json.dumps(machine | dict(results=results), indent=1))
    return results

if __name__ == "__main__":
    common.run(main, Config, __doc__)
