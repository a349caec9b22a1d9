"""
What has to be known of a card before weeks are spent on it, in a few minutes: JSON lines, and a table at the
end.

    python -m tools.gpu_check                               # base and large, eager and compiled
    python -m tools.gpu_check --model tiny --clips 1 --device cpu --no-compile      # the same without a card

A row is a check, ok, FAILED or - (does not apply here, or the minutes are over), and what was measured.
One that fails stops no other; the exit status is 1 if any did. Differences are shares of the largest value,
x_realtime and mfu are what the scripts log, limit_tflops is the rate of products that mfu is a share of,
memory is the peak in GB, and counted what README says of it.
"""

import contextlib
import functools
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import timeit
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
import finetune
import model
import train_mam
from audio import fbank
from common import check
from tools.bench import STEPS, make_batch

ROOT = Path(model.__file__).parent

@dataclass
class Config:
    model: str = "base,large"           # sizes whose speed and memory are measured: tiny, base, large
    clips: int = 40                     # of 10 s in a batch of those measurements
    compile: bool = True                # measure compiled steps, too
    minutes: float = 8.0                # begin no check after so many
    device: str = "auto"                # auto | cpu | cuda
    out: str = "out/gpu_check.jsonl"    # results, a line each

SHAPES = [(496, False), (496, True), (123, True)]  # of attention: tokens, with padding
RESULTS = "y", "q", "k", "v", "gate", "bias"       # its output, and what has a gradient

# counted: GB of a step whatever its batch, and MB more per second of audio (README)
MEMORY = {
    ("base", "mam"): (2.1, 12.8),
    ("base", "finetune"): (1.7, 25.2),
    ("large", "mam"): (6.3, 24.1),
    ("large", "finetune"): (5.6, 66.2)
}

# -----------------------------------------------------------------------------
# what checks share


def distance(x, reference):
    """Return the largest difference, as a share of the reference's largest value."""
    x = x.double().cpu()
    reference = reference.double().cpu()
    return ((x - reference).abs().max() / reference.abs().max()).item()


def below(most, value, **more):
    """Return the outcome of a difference that must not be above `most`, nor nan."""
    return value <= most, dict(difference=value, most=most) | more


def training_step(name, size, device, dtype, compile=False, clips=2, seconds=2.56):
    """Return a function that does a step of a script on a fixed batch, the model and the meter."""
    torch.manual_seed(0)
    net, losses = STEPS[name](size, device, dtype)
    if name == "tokenizer":  # whose codes are all alike before
        vectors = torch.randn(net.codebook.weight.shape)
        net.codebook.weight.copy_(torch.nn.functional.normalize(vectors))
    common.wrap(net, compile)
    optimizer = common.make_optimizer(net, 1e-3, 0.0)

    batch = make_batch(clips, seconds)
    flops = flops_of_step(name, net, batch["noise"].shape[1])
    meter = common.Meter(device, dtype, flops / seconds)
    if device.type == "cuda":
        batch = {key: values.pin_memory() for key, values in batch.items()}

    def step():
        with common.autocast(device, dtype):
            sums = losses(batch)
        (sums["loss"] / sums["count"]).float().backward()
        meter.add(sums)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        finite = common.step_if_finite(optimizer, norm)
        meter.heard(dict(seconds=clips * seconds), finite)
        return sums["loss"].detach() / sums["count"]

    return step, net, meter


def flops_of_step(name, net, tokens):
    """Count what the scripts count for mfu, of a clip: forward, and backward, which costs twice as much."""
    count = model.flops_of
    if name == "mam":
        return 3 * (count(net.encoder, tokens / 4) + count(net.predictor, tokens))
    if name == "tokenizer":  # its teacher is an encoder, too, and has no backward pass
        return 3 * count(net, tokens) + count(net.encoder, tokens)
    return 3 * count(net, tokens * (1 - finetune.TASKS["as2m"]["patchout"]))


# -----------------------------------------------------------------------------
# checks: each yields names of rows, and functions that return whether a row is as it has to be (None: it does
# not apply), and what was measured


def attention(cfg, device):
    """Fused, flex and plain attention give what plain attention in float64 gives, and its gradients."""
    for dtype, most in (("float32", 1e-4), ("bfloat16", 5e-2)):
        for T, padded in SHAPES:
            inputs, key_bias = attention_inputs(T, padded, dtype, device)
            expected = attend("plain", [x.double() for x in inputs], key_bias, "float32")

            def compare(way):
                backward = way != "flex" or device.type == "cuda"  # flex has none on a CPU
                results = attend(way, inputs, key_bias, dtype, backward)
                differences = [distance(*pair) for pair in zip(results, expected)]
                largest = torch.tensor(differences).max().item()  # nan if any is
                return below(most, largest, **dict(zip(RESULTS, differences)))

            name = f"{dtype} {T} {'padded' if padded else 'full'}"
            for way in ("plain", "fused", "flex"):
                yield f"attention {way} {name}", functools.partial(compare, way)


def attention_inputs(T, padded, dtype, device):
    """Return q, k, v, gate and bias of a base model, as its blocks make them, and key_bias."""
    torch.manual_seed(0)
    qkv = torch.randn(4, T, 3, 12, 64, device=device).to(getattr(torch, dtype))
    gate = 1 + torch.rand(4, 12, T, 1, device=device)
    bias = torch.randn(1, 12, T, T, device=device)
    key_bias = None
    if padded:
        lengths = torch.tensor([[T], [T - 8], [T // 2], [8]], device=device)
        key_bias = model.key_padding_bias(torch.arange(T, device=device) < lengths)
    return [*qkv.permute(2, 0, 3, 1, 4), gate, bias], key_bias


def attend(way, inputs, key_bias, dtype, backward=True):
    """Return the output of attention and, if asked for, its gradients."""
    before, model.ATTENTION = model.ATTENTION, way
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    try:
        with common.autocast(inputs[0].device, dtype):
            y = model.attend(*inputs, key_bias)
        if not backward:
            return [y]
        return [y, *torch.autograd.grad(y.double().square().sum(), inputs)]
    finally:
        model.ATTENTION = before


def front_end(cfg, device):
    """The filter bank is that of a CPU, as power beside the loudest of its frame."""

    def compare():
        wav = 0.1 * torch.randn(4, 160_000, generator=torch.Generator().manual_seed(0))
        ours = fbank(wav.to(device)).cpu().exp()
        expected = fbank(wav).exp()
        difference = (ours - expected).abs() / expected.amax(-1, keepdim=True)
        return below(3e-5, difference.max().item())

    yield "fbank", compare


def convolution(cfg, device):
    """The position convolution gives the same in its two ways; the milliseconds of each and its gradients."""
    for dtype in ("float32", "bfloat16"):
        yield f"convolution {dtype}", functools.partial(compare_convolutions, dtype, device)


def compare_convolutions(dtype, device):
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    clips = 16 if cuda else 1
    x = torch.randn(clips, 496, 768, device=device)
    x = x.to(getattr(torch, dtype))
    weight = torch.randn(768, 48, 128, device=device)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    runs = 10 if cuda else 1
    results = []
    detail = {}
    for way in (model.conv_direct, model.conv_by_fft):

        def run():
            y = way(*inputs, 16)
            slopes = torch.autograd.grad(y.sum(), inputs)
            slopes[1][0, 0, 0].item()  # waits for the device
            return y

        results.append(run())
        times = timeit.repeat(run, number=1, repeat=runs)
        detail[way.__name__] = 1000 * min(times)
    if cuda:
        detail["chosen"] = model.time_convolutions(768, 16, 128, device, x.dtype)
    return below(2e-2, distance(*results), **detail)  # cuDNN may compute in TF32


def learning(cfg, device):
    """A step of each script has the loss that it has on a CPU, and lowers it on a fixed batch."""

    def compare(name):
        losses = []
        for where in (torch.device("cpu"), device):
            step, net, _ = training_step(name, "tiny", where, "float32")
            net.eval()  # without what is drawn anew
            losses.append(step().item())
        return below(1e-3, abs(losses[1] / losses[0] - 1), cpu=losses[0])

    def learn(name):
        step, *_ = training_step(name, "tiny", device, "auto")
        losses = [step().item() for _ in range(30)]
        return losses[-1] < 0.9 * losses[0], dict(first=losses[0], last=losses[-1])

    for name in STEPS:
        yield f"{name} as on a CPU", functools.partial(compare, name)
        yield f"{name} learns", functools.partial(learn, name)


def waiting(cfg, device):
    """No step waits for the device."""

    def without_waiting(name):
        if device.type != "cuda":
            return None, dict(why="not applicable on a CPU")
        step, *_ = training_step(name, "tiny", device, "auto")
        step()  # what is made once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True, {}

    for name in STEPS:
        yield f"{name} does not wait", functools.partial(without_waiting, name)


def scripts(cfg, device):
    """Pre-training ends with one loss: here, stopped and resumed, on a rank by torchrun, on two of them."""
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(data=f"{folder}/toy", device=device.type, dtype="float32")
        flags |= dict(max_steps=4, warmup_steps=1, save_every=2, log_every=1)
        with contextlib.redirect_stdout(None):
            data.make_toy(flags["data"], clips=40)
            train_mam.main(out_dir=folder, **flags)
        expected = loss_of(folder)

        def compare(out, most):
            return below(most, abs(loss_of(out) / expected - 1))

        def resumed():
            os.replace(f"{folder}/mam_iter1.before.pt", f"{folder}/mam_iter1.pt")
            with contextlib.redirect_stdout(None):
                train_mam.main(out_dir=folder, resume=True, **flags)
            return compare(folder, 1e-3 if device.type == "cuda" else 0.0)

        def on_ranks(count):
            out = f"{folder}/{count}"
            # a projection is fitted to what rank 0 hears
            torchrun(count, out_dir=out, tokenizer=f"{folder}/tokenizer_iter1.pt", **flags)
            return compare(out, 1e-3)

        yield "resumed", resumed
        yield "on 1 rank", functools.partial(on_ranks, 1)
        if device.type != "cuda" or torch.cuda.device_count() > 1:
            yield "on 2 ranks", functools.partial(on_ranks, 2)


def loss_of(out):
    """Return the last training loss in a folder's log."""
    lines = [json.loads(line) for line in open(f"{out}/mam_iter1.jsonl")]
    return [line["loss"] for line in lines if "loss" in line][-1]


def torchrun(count, **flags):
    """Run train_mam.py on so many ranks. Raises UserError if they fail, or have not ended in 3 minutes."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {count} train_mam.py"
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, *launch.split(), *arguments]
    options = dict(cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), text=True)
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(command, **options) as process:
        try:
            said, _ = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.terminate()  # and torchrun ends its ranks
            said, _ = process.communicate()
    errors = [line for line in said.splitlines() if "rror" in line]
    said = " | ".join(errors[:4])
    check(process.returncode == 0, f"torchrun ended with {process.returncode}: {said}")


def speed(cfg, device):
    """How fast steps are and what memory they take, beside what was counted."""
    for compiled in [False, True] if cfg.compile else [False]:
        for name in STEPS:
            for size in cfg.model.split(","):
                what = name, size, compiled, cfg.clips, device
                kind = "compiled" if compiled else "eager"
                yield f"{size} {name} {kind}", functools.partial(measure_step, *what)


def measure_step(name, size, compiled, clips, device):
    """Measure speed and memory of the steps of one model, which is alone on the device."""
    cuda = device.type == "cuda"
    gc.collect()  # a compiled model and its function hold each other
    torch._dynamo.reset()
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    step, _, meter = training_step(name, size, device, "auto", compiled, clips, 10.0)
    if cuda:  # after the rate of products was measured
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    warm = 3 if cuda else 1
    for _ in range(warm):
        step().item()
    detail = dict(until_warm=time.perf_counter() - began)

    meter.restart()
    runs = 10 if cuda else 1
    for _ in range(runs):
        step()
    detail |= meter.read() | dict(limit_tflops=meter.rate / 1e12)
    if cuda:
        detail["memory"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    if (size, name) in MEMORY:
        fixed, more = MEMORY[size, name]
        detail["counted"] = fixed + more * 10 * clips / 1000
    return math.isfinite(detail["loss"]), detail


CHECKS = front_end, learning, waiting, scripts, convolution, attention, speed

# -----------------------------------------------------------------------------


def rows_of(checks, cfg, device):
    """Do checks, and yield (name, passed, what was measured): whatever fails is a row."""
    began = time.perf_counter()
    for function in checks:
        try:
            for name, measure in function(cfg, device):
                if time.perf_counter() - began > 60 * cfg.minutes:
                    yield name, None, dict(why=f"{cfg.minutes} minutes are over")
                else:
                    yield name, *attempt(measure)
        except Exception as error:
            yield function.__name__, False, dict(error=explain(error))


def attempt(measure):
    try:
        return measure()
    except Exception as error:
        return False, dict(error=explain(error))


def explain(error):
    """Return an error and the last line of ours on its way."""
    where = None
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if ROOT in path.parents:
            where = f"{path.name}:{frame.lineno}"
    return f"{error!r:.500} ({where})"


def main(**flags):
    cfg = Config(**flags)
    common.check_flags(cfg)
    check(cfg.clips > 0, f"--clips {cfg.clips}: has to be above 0")
    sizes = set(cfg.model.split(","))
    check(sizes <= set(model.PRESETS), f"--model {cfg.model}: sizes are {', '.join(model.PRESETS)}")
    device = common.setup(cfg.device)[2]
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log = common.Log(cfg.out)
    log(device=card, torch=torch.__version__, threads=torch.get_num_threads())

    rows = []
    for name, passed, detail in rows_of(CHECKS, cfg, device):
        outcome = {True: "ok", False: "FAILED", None: "-"}[passed]
        log(check=name, outcome=outcome, **detail)
        rows.append((name, outcome, detail))

    for name, outcome, detail in rows:
        print(f"{outcome:8}{name:34}", *map(cell, detail.items()), sep="  ")
    failed = [name for name, outcome, _ in rows if outcome == "FAILED"]
    print(f"{len(rows)} rows on {card}, {len(failed)} FAILED: {', '.join(failed)}")
    if failed:
        raise SystemExit(1)


def cell(item):
    key, value = item
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


if __name__ == "__main__":
    common.run(main, Config, __doc__)
