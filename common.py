"""What must be identical in all training scripts to be correct: flags, ranks, optimizer, schedule, checkpoints, log."""
import argparse
import ctypes
import dataclasses
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn         # before any group: imported later, its default arguments would keep the group alive (leave)
from torch.utils.flop_counter import FlopCounterMode

import model
from model import CheckpointError, read_checkpoint

STARTED = time.time()

class UserError(ValueError):
    """A mistake that the message explains: what is wrong, in which file, what to do."""

# -----------------------------------------------------------------------------
# flags

def parse(Config, doc, argv=None) -> dict:
    """A dataclass as command line: --a_b or --a-b per field, its comment as help. Returns only the flags typed."""
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="%(prog)s [--flag value ...]")
    for field in dataclasses.fields(Config):
        names = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
        options = dict(dest=field.name, default=argparse.SUPPRESS)
        text = f"{comments.get(field.name, '')} [{field.default!r}]".replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, help=text, **options)
        else:
            choices = re.match(r"((?:\w+ \| )+\w+)", comments.get(field.name, ""))
            parser.add_argument(*names, type=type(field.default), help=text, metavar=field.name.upper(),
                                choices=choices[1].split(" | ") if choices else None, **options)
    return vars(parser.parse_args(argv))

def run(main, Config, doc):
    """Call main with the flags typed; a user's mistake ends in one line on stderr, anything else in a traceback."""
    flags = parse(Config, doc)
    message = None
    try:
        main(**flags)
    except (UserError, CheckpointError) as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = "interrupted; the last checkpoint, if any, is whole"
    except SystemExit as stop:
        message = stop.code
    leave()             # not in a `finally`: there the exception still holds main's model, which holds the group
    sys.exit(message)

def positive(cfg, *names):
    """UserError unless these fields are above zero."""
    for name in names:
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: has to be above 0")

# -----------------------------------------------------------------------------
# ranks and devices

def setup(device="auto", seed=0):
    """Join the torchrun group, if any. Returns (rank, world, device); sets the seed."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this torch sees no GPU; use --device cpu")
    if seed < 0:
        raise UserError(f"--seed {seed}: seeds are not negative")
    if "RANK" in os.environ and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    torch.manual_seed(seed)
    return rank(), world(), device

def leave():
    """Leave the group, if any, and end its threads: one that outlives the interpreter aborts a rank whose work is done (gloo)."""
    if dist.is_initialized():
        dist.destroy_process_group()

def keep_memory():
    """On Linux, freed memory stays with the process instead of being mapped anew, page by page, at each step: a tenth of a CPU step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)             # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def all_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x

def barrier():
    if world() > 1:
        dist.barrier()

def autocast(device, dtype="auto"):
    """Mixed precision: bfloat16 where the machine is fast at it (GPU, AMX, AVX-512 BF16), else float32. Weights stay float32."""
    if dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                else torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

def seed_step(seed, step):
    """Dropout of step s on rank r is a function of (seed, s, r): nothing to save, nothing replayed after a resume."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0] >> 1))

def wrap(model, device, compile=False):
    """Compile in place, then DDP: state_dict keys stay clean. Returns what to call in training."""
    if compile:
        model.compile()
    if world() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False, gradient_as_bucket_view=True)

# -----------------------------------------------------------------------------
# speed

def flops_of(function):
    """Floating-point operations of the matrix products and convolutions that function() does, by torch's own counter."""
    way = model.ATTENTION
    model.ATTENTION = "fused" if way == "flex" else way                 # the counter does not know flex_attention
    try:
        with FlopCounterMode(display=False) as counter:
            function()
    finally:
        model.ATTENTION = way
    return counter.get_total_flops()

def matrix_rate(device, dtype="auto", n=2048):
    """FLOP/s of this device at (n, n) products in the precision of autocast(device, dtype): the median of five."""
    x, times = torch.randn(n, n, device=device), []
    with autocast(device, dtype):
        x = x.to((x @ x).dtype)         # else casting is timed as well
        for _ in range(5):
            began = time.perf_counter()
            (x @ x)[0, 0].item()
            times.append(time.perf_counter() - began)
    return 2 * n**3 / sorted(times)[2]

# -----------------------------------------------------------------------------
# optimizer

def make_optimizer(model, lr, weight_decay, betas=(0.9, 0.98), eps=1e-8, times=lambda name: 1.0):
    """AdamW; decay on matrices and convolution weights only, not on biases, norms, gains and position tables.

    times: parameter name -> factor on its learning rate, kept in its group's "times".
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = weight_decay if p.dim() > 1 and name.endswith(("weight", "weight_v")) else 0.0
            groups.setdefault((decay, times(name)), []).append(p)
    return torch.optim.AdamW([dict(params=params, weight_decay=decay, times=factor, lr=lr * factor)
                              for (decay, factor), params in groups.items()], lr=lr, betas=betas, eps=eps, fused=True)

def load_optimizer(optimizer, state):
    """Moments from a checkpoint; weight decay and factors as the flags say now."""
    now = [{key: group[key] for key in ("weight_decay", "times")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, now):
        group.update(options)

def lr_at(step, peak, warmup, total, schedule="linear"):
    """Learning rate of 0-based step: linear warm-up to peak, then linear or cosine decay to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))

# -----------------------------------------------------------------------------
# checkpoints

def save_checkpoint(path, **content):
    """Rank 0 writes a whole file or none: temporary name, fsync, rename."""
    if rank() == 0:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        content["versions"] = {"torch": str(torch.__version__), "python": platform.python_version()}
        with open(partial, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    barrier()

def read_training(path, Config):
    """The checkpoint that --resume continues."""
    ckpt = read_checkpoint(path)
    if "optimizer" not in ckpt:
        raise UserError(f"{path}: holds no training state to resume")
    other = set(ckpt["config"]) ^ {field.name for field in dataclasses.fields(Config)}
    if other:
        raise UserError(f"{path}: begun by another version of this script (--{', --'.join(sorted(other))}), which has to finish it")
    return ckpt

def keep_old(path):
    """A new run never overwrites an old result: an existing file moves to the next free .1, .2, ..."""
    files = [Path(path).with_suffix(suffix) for suffix in (".pt", ".jsonl", ".npz", ".csv")]
    if rank() == 0 and any(file.exists() for file in files):
        new = lambda file, n: file.with_suffix(f".{n}{file.suffix}")
        n = next(n for n in range(1, 10**6) if not any(new(file, n).exists() for file in files))
        for file in files:
            if file.exists():
                os.replace(file, new(file, n))
        print(f"kept the earlier {Path(path).with_suffix('')}.* as {Path(path).with_suffix('')}.{n}.* (--resume continues a run)")
    barrier()

class Stop:
    """SIGTERM, SIGINT: finish the step, save, end. A second signal ends at once."""

    def __init__(self):
        self.signal = 0
        self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGTERM, signal.SIGINT)}

    def catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def now(self, step, device):
        """Did any rank get a signal? All ranks agree; with several ranks they ask each other every 5 steps."""
        if world() == 1:
            return bool(self.signal)
        return step % 5 == 0 and bool(all_sum(torch.tensor(float(self.signal), device=device)).item())

    def close(self):
        for number, handler in self.old.items():
            signal.signal(number, handler)

# -----------------------------------------------------------------------------
# log

class Log:
    """Rank 0: one line for people, one JSON line in `path` with the same keys, and the minutes since the program began."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text="", **values):
        if rank():
            return
        if values:
            values["minutes"] = (time.time() - STARTED) / 60
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")
            text = (text + " " if text else "") + "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(text, flush=True)
