"""
What must be the same in every training script to be correct: flags, ranks, optimizer, schedule,
checkpoints, log. Imports nothing of ours.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# before any group: imported later, its default arguments would keep the group alive (see leave)
import torch.distributed.nn
from tqdm import tqdm

STARTED = time.time()


class UserError(ValueError):
    """A mistake that the message explains: what is wrong, in which file, what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and says why."""


def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


# -----------------------------------------------------------------------------
# flags


def parse(Config, doc, argv=None):
    """Read a dataclass from the command line: --a_b or --a-b per field, its comment as help.

    Returns a dict of the flags typed.
    """
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(
        description=doc,
        usage="%(prog)s [--flag value ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Config):
        comment = comments.get(field.name, "")
        options = dict(dest=field.name, default=argparse.SUPPRESS)
        options["help"] = f"{comment} [{field.default!r}]".replace("%", "%%")
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = type(field.default)
            if choices := re.match(r"((?:\w+ \| )+\w+)", comment):
                options["choices"] = choices[1].split(" | ")

        names = [f"--{field.name}"]
        if "_" in field.name:
            names.append(names[0].replace("_", "-"))
        parser.add_argument(*names, **options)
    return vars(parser.parse_args(argv))


def run(main, Config, doc):
    """Call main with the flags typed.

    A user's mistake ends in one line on stderr, anything else in a traceback.
    """
    flags = parse(Config, doc)
    message = None
    try:
        main(**flags)
    except UserError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = "interrupted; the last checkpoint, if any, is whole"
    except SystemExit as stop:
        message = stop.code
    leave()  # not in a `finally`: there the exception still holds main's model, which holds the group
    sys.exit(message)


def positive(cfg, *names):
    """Raise UserError unless these fields are above zero."""
    for name in names:
        check(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: has to be above 0")


# -----------------------------------------------------------------------------
# ranks and devices


def setup(device="auto", seed=0):
    """Join the torchrun group, if any, and seed the global generator. Returns (rank, world, device)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check(
        torch.cuda.is_available() or not device.startswith("cuda"),
        f"--device {device}: this torch sees no GPU; use --device cpu"
    )
    check(seed >= 0, f"--seed {seed}: seeds are not negative")

    ranks = "RANK" in os.environ  # torchrun sets it
    if ranks and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if ranks and not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, device_id=device if cuda else None)
    torch.manual_seed(seed)
    return rank(), world(), device


def leave():
    """Leave the group and end its threads.

    A thread of gloo that outlives the interpreter aborts a rank whose work is done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_memory():
    """Keep freed memory in the process instead of mapping it anew, page by page, at each step.

    That is a tenth of a CPU step, on Linux.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)             # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x):
    """Sum x over ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def barrier():
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier()


def autocast(device, dtype="auto"):
    """Compute in bfloat16 where the machine is fast at it (GPU, AMX, AVX-512 BF16), else in float32.

    Weights stay float32.
    """
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def seed_step(seed, step):
    """Seed the global generator with a function of (seed, step, rank), and return that number.

    So a resumed run draws what it would have drawn.
    """
    words = np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)
    number = int(words[0] >> 1)
    torch.manual_seed(number)
    return number


def wrap(model, compile=False):
    """Compile in place, then DDP: the keys of state_dict() stay clean. Returns what to call in training."""
    if compile:
        # one graph, and gradients are added up after it: cut into DDP's buckets of 25 MB, to add them up
        # meanwhile, a base model would be some 18 graphs, a large one 55, each made anew by every rank
        torch._dynamo.config.optimize_ddp = False
        # with and without padding, one clip alone, evaluation: 8 kinds, its default, are soon used up
        torch._dynamo.config.recompile_limit = 32
        model.compile()
    if world() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def send(x, device):
    """Move a tensor from the CPU without waiting, which a GPU does from pinned memory only."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def millions(module):
    """Count parameters, in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


# -----------------------------------------------------------------------------
# optimizer


def make_optimizer(
    model, lr, weight_decay, betas=(0.9, 0.98), eps=1e-8, times=lambda name: 1.0
):
    """Return AdamW with decay on matrices and convolution weights only.

    Not on biases, norms, gains and position tables.

    times: parameter name -> factor on its learning rate, kept in its group's "times".
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() > 1 and name.endswith(("weight", "weight_v"))
            key = (weight_decay if matrix else 0.0, times(name))
            groups.setdefault(key, []).append(parameter)

    groups = [
        dict(params=params, weight_decay=decay, times=factor)
        for (decay, factor), params in groups.items()
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def lr_at(step, peak, warmup, total, schedule="linear"):
    """Return the learning rate of 0-based step.

    Linear warm-up to peak, then linear or cosine decay to 0 at `total`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return peak * left


def set_lr(optimizer, cfg, step, schedule="linear"):
    """Set, and return, the learning rate of a step; each group has it times its factor."""
    lr = lr_at(step, cfg.lr, cfg.warmup_steps, cfg.max_steps, schedule)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["times"]
    return lr


# -----------------------------------------------------------------------------
# checkpoints: a file is whole or absent, and loads without running code from it

FORMAT = 2  # of training state: the names of parameters and their order in the optimizer
RESULTS = r"(\.before|\.step\d+)?\.(pt|jsonl|npz|csv)"  # what a run leaves under one name


def read_checkpoint(path):
    """Load on the CPU, never running code from the file. Raises CheckpointError."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from None
    keys = set(ckpt) if isinstance(ckpt, dict) else set()
    if "model" not in keys or not keys & {"cfg", "kind"}:
        raise CheckpointError(
            f"{path}: not a BEATs checkpoint: it needs 'model' and 'cfg' (official) or 'kind' (ours)"
        )
    return ckpt


def write_whole(path, write):
    """Write a file by write(file), which appears under its name when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(path, **content):
    """Write a checkpoint, on rank 0."""
    if rank() == 0:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{path.name}.*.partial"):  # by a run that was killed
            left.unlink()
        versions = dict(torch=str(torch.__version__), python=platform.python_version())
        content |= dict(format=FORMAT, world=world(), versions=versions)
        write_whole(path, lambda file: torch.save(content, file))
    barrier()


def second_name(path, name):
    """Let a file be found under another name, too: a link, or a copy where there are no links."""
    if rank() == 0 and Path(path).exists():
        name.unlink(missing_ok=True)
        try:
            os.link(path, name)
        except OSError:
            shutil.copyfile(path, name)


def save_training(path, cfg, optimizer, batch, step, **content):
    """Write a checkpoint that --resume continues after this step and batch.

    The one before it stays as .before.pt, and every one that --keep_every asks for as .step<number>.pt.
    """
    path = Path(path)
    second_name(path, path.with_suffix(".before.pt"))
    state = dict(optimizer=optimizer.state_dict(), step=step, place=batch["next"])
    save_checkpoint(path, config=dataclasses.asdict(cfg), **state, **content)
    if cfg.keep_every and step % cfg.keep_every == 0:
        second_name(path, path.with_suffix(f".step{step}.pt"))


def begin(Config, flags, name, preset={}):
    """Return (cfg, path, ckpt): defaults < preset < checkpoint < flags typed; what --resume continues.

    name: of the checkpoint in --out_dir, with fields of cfg in braces.
    """
    cfg = Config(**preset | flags)
    path = f"{cfg.out_dir}/{name.format(**vars(cfg))}.pt"
    check(
        cfg.keep_every % max(1, cfg.save_every) == 0,
        f"--keep_every {cfg.keep_every}: has to be a multiple of --save_every {cfg.save_every}"
    )
    if not cfg.resume:
        return cfg, path, None

    try:
        ckpt = read_checkpoint(path)
    except CheckpointError as error:
        before = Path(path).with_suffix(".before.pt")
        hint = f"; {before} is the one before: give it this name to go on from there"
        raise CheckpointError(f"{error}{hint if before.exists() else ''}") from None
    check("optimizer" in ckpt, f"{path}: holds no training state to resume")
    check(
        ckpt.get("format") == FORMAT and set(ckpt["config"]) == set(vars(cfg)),
        f"{path}: begun by another version of this script, which has to finish it; "
        "to begin anew, leave out --resume"
    )
    return Config(**ckpt["config"] | flags), path, ckpt


def same(ckpt, key, value, message):
    """Raise UserError(message) if what is resumed had another value of this key."""
    matches = ckpt is None or ckpt[key] == value
    check(matches, f"{message}; resume with the same, or begin anew without --resume")


def restore(cfg, path, ckpt, model, optimizer):
    """Load model and optimizer from ckpt, or move an earlier result away.

    Returns the step to go on with, and its place in the batches.
    """
    if ckpt is None:
        keep_old(path)
        return 0, (0, 0)
    before = ckpt["world"], ckpt["config"]["batch_seconds"]
    if rank() == 0 and before != (world(), cfg.batch_seconds):
        print(
            "other ranks or batches than before: the rest of this epoch is dealt out anew, "
            "so some clips come twice and some not at all"
        )
    model.load_state_dict(ckpt["model"])

    # moments from the checkpoint; weight decay and factors as the flags say now
    now = [(group["weight_decay"], group["times"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(ckpt["optimizer"])
    for group, (decay, factor) in zip(optimizer.param_groups, now):
        group.update(weight_decay=decay, times=factor)
    return ckpt["step"], tuple(ckpt["place"])


def keep_old(path):
    """Move an existing result to the next free .1, .2, ...: a new run never overwrites an old one."""
    stem, number = Path(path).with_suffix(""), 1
    if rank() == 0 and stem.parent.exists():
        names = [file.name.removeprefix(stem.name) for file in stem.parent.iterdir()]
        old = [name for name in names if re.fullmatch(RESULTS, name)]
        while any(name.startswith(f".{number}.") for name in names):
            number += 1
        for name in old:
            os.replace(f"{stem}{name}", f"{stem}.{number}{name}")
        if old:
            print(f"kept the earlier {stem}.* as {stem}.{number}.* (--resume continues a run)")
    barrier()


class Stop:
    """Catch SIGTERM and SIGINT: finish the step, save, end. A second signal ends at once.

    torchrun kills what has not ended 30 s after a signal. So several ranks, which wait for each other and for
    the device to agree, do so some 2 s apart, however long a step takes.
    """

    def __init__(self):
        self.signal, self.due = 0, 0
        self.last, self.began = None, time.perf_counter()  # step and time of the last question
        self.old = {
            number: signal.signal(number, self.catch)
            for number in (signal.SIGTERM, signal.SIGINT)
        }

    def catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def now(self, step, device):
        """Return whether any rank got a signal. All agree."""
        if world() == 1:
            return self.signal > 0
        if step < self.due:
            return False
        now = time.perf_counter()
        answer = torch.tensor([self.signal, now - self.began], device=device)
        signals, seconds = all_sum(answer).tolist()  # the same on all ranks, and so is what follows

        # a run that is resumed begins at any step: until the second question one has gone by
        steps = step - self.last if self.last else 1
        per_step = seconds / world() / steps
        self.due = step + min(100, max(1, int(2 / per_step)))
        self.last, self.began = step, now
        return signals > 0

    def close(self):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# log


class Log:
    """Write one line for people and one JSON line with the same keys, on rank 0.

    Both hold the minutes since the program began.
    """

    def __init__(self, path):
        self.path = Path(path).with_suffix(".jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text="", **values):
        if rank():
            return
        words = [text] if text else []
        if values:
            values["minutes"] = (time.time() - STARTED) / 60
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")
        for key, value in values.items():
            words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        print("  ".join(words), flush=True)


def progress(first, last):
    """Count steps from `first` to `last`, with a bar on rank 0."""
    return tqdm(
        range(first, last), initial=first, total=last, desc="train", disable=rank() > 0 or None
    )


def means(sums):
    """Divide sums (0-d tensors) by their "count", all over all ranks.

    Every rank has to have the same names.
    """
    if not sums:
        return {}
    totals = all_sum(torch.stack([value.double() for value in sums.values()]))
    totals = dict(zip(sums, totals.tolist()))
    count = totals.pop("count") or math.nan
    return {name: total / count for name, total in totals.items()}


def add_to(sums, more):
    """Add sums of one part to those so far, in float64 and without their graph."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value.detach().double()


class Meter:
    """What happened since the last log line: means of the losses, and the speed of the training steps alone.

    flops: floating-point operations of a step per second of audio, in matrix products. mfu is the
    share of all devices' rate at such products, measured at the start, that goes into them.
    """

    def __init__(self, device, dtype="auto", flops=0.0):
        self.flops = flops
        self.rate = world() * matrix_rate(device, dtype) if rank() == 0 else 1.0
        self.restart()

    def restart(self):
        self.sums, self.seconds, self.began = {}, 0.0, time.perf_counter()

    def add(self, sums):
        add_to(self.sums, sums)

    def heard(self, batch):
        """Count the audio of a step of this rank."""
        self.seconds += batch["seconds"] * world()

    @contextlib.contextmanager
    def paused(self):
        """Leave out of the speed what is no training."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def read(self):
        """Return the means and the speed, and start anew. This is where the host waits for the device."""
        values = means(self.sums)
        speed = self.seconds / (time.perf_counter() - self.began)
        self.restart()
        return values | dict(x_realtime=speed, mfu=speed * self.flops / self.rate)


def matrix_rate(device, dtype="auto", n=None):
    """Measure this device's FLOP/s at large products as autocast(device, dtype) does them."""
    # to ask a GPU for something and to wait for it takes as long as one product: 20 at a time
    cuda = device.type == "cuda"
    n = n or (8192 if cuda else 1024)
    products = 20 if cuda else 1
    x = torch.randn(n, n, device=device)

    def multiply():
        for _ in range(products):
            y = x @ x
        y[0, 0].item()

    with autocast(device, dtype):
        x = x.to((x @ x).dtype)  # else casting is timed as well
        times = timeit.repeat(multiply, number=1, repeat=5)
    return products * 2 * n**3 / statistics.median(times)
