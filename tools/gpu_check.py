"""
What has to be known of a card before weeks are spent on it, in a few minutes: a table, and a JSON line a row.

    python -m tools.gpu_check                               # base and large, eager and compiled
    python -m tools.gpu_check --model tiny --device cpu     # the same without a card

A row is a check, ok, FAILED or - (does not apply here), and what was measured. A check that fails stops no
other; the exit status is 1 if any did. Speed is given in seconds of audio per second, mfu as train_mam.py
has it, memory in GB beside what was counted from the tensors that autograd keeps.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
import model
import train_mam
from audio import fbank
from common import check
from tools.bench import STEPS, make_batch

@dataclass
class Config:
    model: str = "base,large"           # sizes whose speed and memory are measured: tiny, base, large
    clips: int = 40                     # of 10 s in a batch of those measurements
    compile: bool = True                # compile the pre-training step, too
    device: str = "auto"                # auto | cpu | cuda
    out: str = "out/gpu_check.jsonl"    # results, a line each

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
    difference = (x - reference).abs().max()
    return (difference / reference.abs().max()).item()


def below(name, value, most):
    """Return the row of a value that must not be above `most`; nan is."""
    return name, value <= most, dict(difference=value, most=most)


def training_step(name, size, device, dtype, compile=False, clips=2, seconds=2.56):
    """Return a function that does a step of a script on a fixed batch, and the model that it trains."""
    torch.manual_seed(0)
    net, losses = STEPS[name](size, device, dtype)
    if compile:
        net.compile()
    optimizer = common.make_optimizer(net, 1e-3, 0.0)
    meter = common.Meter(device, dtype)
    batch = make_batch(clips, seconds)
    if device.type == "cuda":
        batch = {key: values.pin_memory() for key, values in batch.items()}

    def step():
        with common.autocast(device, dtype):
            sums = losses(batch)
        (sums["loss"] / sums["count"]).float().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.add(sums)
        meter.heard(dict(seconds=clips * seconds))
        return sums["loss"].detach() / sums["count"]

    return step, net


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# -----------------------------------------------------------------------------
# checks: each yields rows of (name, passed or None where it does not apply, what was measured)


def attention(cfg, device):
    """Fused, flex and plain attention give what plain attention in float64 gives, and its gradients."""
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        for T, padded in ((496, False), (496, True), (123, True)):
            torch.manual_seed(0)
            q, k, v = torch.randn(3, 4, 12, T, 64, device=device)
            gate = 1 + torch.rand(4, 12, T, 1, device=device)
            bias = torch.randn(1, 12, T, T, device=device)
            key_bias = None
            if padded:
                lengths = torch.tensor([[T], [T - 8], [T // 2], [8]], device=device)
                key_bias = model.key_padding_bias(torch.arange(T, device=device) < lengths)
            inputs = q, k, v, gate, bias
            expected = attend("plain", [x.double() for x in inputs], key_bias, True)
            for way in ("plain", "fused", "flex"):
                backward = way != "flex" or device.type == "cuda"  # flex has none on a CPU
                results = attend(way, [x.to(dtype) for x in inputs], key_bias, backward)
                differences = [distance(*pair) for pair in zip(results, expected)]
                padding = "padded" if padded else "full"
                yield below(f"attention {way} {dtype} {T} {padding}", max(differences), most)


def attend(way, inputs, key_bias, backward):
    """Return the output of attention and, if asked for, its gradients."""
    before, model.ATTENTION = model.ATTENTION, way
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    if key_bias is not None:
        key_bias = key_bias.to(inputs[0].dtype)
    try:
        y = model.attend(*inputs, key_bias)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)] if backward else [y]
    finally:
        model.ATTENTION = before


def front_end(cfg, device):
    """The filter bank is that of a CPU, as power beside the loudest of its frame."""
    wav = 0.1 * torch.randn(4, 160_000, generator=torch.Generator().manual_seed(0))
    ours = fbank(wav.to(device)).cpu().exp()
    expected = fbank(wav).exp()
    peak = expected.amax(-1, keepdim=True)
    difference = (ours - expected).abs() / peak
    yield below("fbank", difference.max().item(), 1e-4)


def convolution(cfg, device):
    """The position convolution gives the same in its two ways; the milliseconds of each, forward."""
    x = torch.randn(16, 496, 768, device=device)
    weight = torch.randn(768, 48, 128, device=device)
    results = []
    times = {}
    for way in (model.conv_direct, model.conv_by_fft):
        results.append(way(x, weight, 16))
        wait(device)
        began = time.perf_counter()
        way(x, weight, 16)
        wait(device)
        times[way.__name__] = 1000 * (time.perf_counter() - began)
    difference = distance(*results)
    most = 1e-2  # cuDNN may compute in TF32
    yield "convolution", difference <= most, dict(difference=difference, most=most) | times


def learning(cfg, device):
    """A step of each script has the loss that it has on a CPU, and lowers it on a fixed batch."""
    for name in STEPS:
        first = []
        for where in (torch.device("cpu"), device):
            step, net = training_step(name, "tiny", where, "float32")
            net.eval()  # without what is drawn anew
            first.append(step().item())
        yield below(f"{name} as on a CPU", abs(first[1] / first[0] - 1), 1e-3)

        step, net = training_step(name, "tiny", device, "auto")
        values = [step().item() for _ in range(30)]
        first, last = values[0], values[-1]
        passed = math.isfinite(last) and last < 0.9 * first
        yield f"{name} learns", passed, dict(first=first, last=last)


def waiting(cfg, device):
    """No step waits for the device."""
    if device.type != "cuda":
        yield "no step waits", None, {}
        return
    for name in STEPS:
        step, net = training_step(name, "tiny", device, "auto")
        step()  # what is made once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            passed, detail = True, {}
        except RuntimeError as error:
            passed, detail = False, dict(error=str(error)[:200])
        torch.cuda.set_sync_debug_mode("default")
        yield f"{name} does not wait", passed, detail


def speed(cfg, device):
    """How fast steps are and what memory they take, beside what was counted."""
    cuda = device.type == "cuda"
    rate = common.matrix_rate(device)
    for size in cfg.model.split(","):
        for name in STEPS:
            for compiled in (False, True)[: 1 + (cfg.compile and name == "mam")]:
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                step, net = training_step(name, size, device, "auto", compiled, cfg.clips, 10.0)
                detail = time_step(cfg, step, device)
                if name == "mam":
                    flops = model.flops_of(net.encoder, 124) + model.flops_of(net.predictor, 496)
                    detail["mfu"] = 3 * flops / 10 * detail["x_realtime"] / rate
                if (size, name) in MEMORY:
                    fixed, more = MEMORY[size, name]
                    detail["counted"] = fixed + more * 10 * cfg.clips / 1000
                yield f"{size} {name}{' compiled' * compiled}", True, detail
                del step, net


def time_step(cfg, step, device):
    """Return speed and memory of a step, and its loss, which has to be a number."""
    for _ in range(3):
        step()
    wait(device)
    began = time.perf_counter()
    runs = 10 if device.type == "cuda" else 1
    for _ in range(runs):
        loss = step()
    wait(device)
    seconds = (time.perf_counter() - began) / runs

    check(loss.isfinite(), "the loss is not finite")
    detail = dict(step_seconds=seconds, x_realtime=10 * cfg.clips / seconds)
    if device.type == "cuda":
        detail["memory"] = torch.cuda.max_memory_allocated() / 1e9
    return detail


def ranks(cfg, device):
    """Pre-training by torchrun on one rank and, where there are two cards, on two: the same loss."""
    counts = [1] if device.type == "cuda" and torch.cuda.device_count() < 2 else [1, 2]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(None):
            data.make_toy(f"{folder}/toy", clips=40)
        losses = {}
        for count in counts:
            out = f"{folder}/{count}"
            launch = f"-m torch.distributed.run --standalone --nproc_per_node {count} train_mam.py"
            flags = f"--data {folder}/toy --out_dir {out} --device {device.type}"
            flags += " --dtype float32 --max_steps 3 --log_every 1"
            command = [sys.executable, *launch.split(), *flags.split()]
            if count > 1:  # a projection is fitted to what rank 0 hears
                command += ["--tokenizer", f"{folder}/1/tokenizer_iter1.pt"]
            environment = os.environ | dict(OMP_NUM_THREADS="1")
            root = Path(model.__file__).parent
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
            check(done.returncode == 0, done.stderr[-500:])
            losses[count] = loss_of(out)
            yield below(f"ranks: {count}", abs(losses[count] / losses[1] - 1), 1e-4)


def loss_of(out):
    """Return the last training loss in a folder's log."""
    lines = [json.loads(line) for line in open(f"{out}/mam_iter1.jsonl")]
    return [line["loss"] for line in lines if "loss" in line][-1]


def resuming(cfg, device):
    """Four steps of pre-training in one go and in two parts end with the same loss."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        data.make_toy(f"{folder}/toy", clips=40)
        flags = dict(data=f"{folder}/toy", device=device.type, log_every=1, warmup_steps=1)
        train_mam.main(out_dir=f"{folder}/whole", max_steps=4, **flags)
        flags |= dict(out_dir=f"{folder}/parts", max_steps=4, save_every=2)
        train_mam.main(**flags)
        os.replace(f"{folder}/parts/mam_iter1.before.pt", f"{folder}/parts/mam_iter1.pt")
        train_mam.main(resume=True, **flags)
        whole, parts = loss_of(f"{folder}/whole"), loss_of(f"{folder}/parts")
    yield below("resume", abs(parts / whole - 1), 1e-3 if device.type == "cuda" else 0.0)


CHECKS = attention, front_end, convolution, learning, waiting, ranks, resuming, speed

# -----------------------------------------------------------------------------


def main(**flags):
    cfg = Config(**flags)
    common.positive(cfg, "clips")
    sizes = set(cfg.model.split(","))
    check(sizes <= set(model.PRESETS), f"--model {cfg.model}: of {', '.join(model.PRESETS)}")
    device = common.setup(cfg.device)[2]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log = common.Log(cfg.out)
    log(device=name, torch=torch.__version__, threads=torch.get_num_threads())

    rows = []
    for function in CHECKS:
        try:
            for row in function(cfg, device):
                rows.append(row)
                report(log, *row)
        except Exception as error:  # whatever it is, it is this check's result
            rows.append((function.__name__, False, dict(error=repr(error)[:500])))
            report(log, *rows[-1])
    failed = [name for name, passed, _ in rows if passed is False]
    log(f"{len(rows)} rows, {len(failed)} FAILED: {', '.join(failed)}")
    if failed and __name__ == "__main__":
        sys.exit(1)
    return rows


def report(log, name, passed, detail):
    outcome = {True: "ok", False: "FAILED", None: "-"}[passed]
    log(check=f"{name:36}", outcome=f"{outcome:6}", **detail)


if __name__ == "__main__":
    common.run(main, Config, __doc__)
