"""
What must be the same in every training script to be correct: flags, ranks, optimizer, schedule,
checkpoints, log. Imports nothing of ours.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
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
import threading
import time
import timeit
import weakref
import zipfile
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


def parse(Config, doc, argv=None, names=""):
    """Read a dataclass from the command line: --a_b or --a-b per field, its comment as help.

    names: what else the usage shows, before the flags. Returns a dict of the flags typed.
    """
    comments = comments_of(Config)
    parser = argparse.ArgumentParser(
        description=doc,
        usage=f"%(prog)s {names}[--flag value ...]",
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
            options["choices"] = choices_of(field.name, comment)

        flag = f"--{field.name}"
        dashed = [flag.replace("_", "-")] if "_" in flag else []
        parser.add_argument(flag, *dashed, **options)
    return vars(parser.parse_args(argv))


@functools.cache
def comments_of(Config):
    """Return {field: the comment behind it}."""
    return dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(Config), re.M))


TABLES = {}  # flag -> a dict whose keys are its choices: a line more there is a choice more


def choices_of(name, comment):
    """Return a flag's choices, None = any: the keys of its table, or the words its comment begins with."""
    if name in TABLES:
        return list(TABLES[name])
    words = re.match(r"((?:\w+ \| )+\w+)", comment)
    return words[1].split(" | ") if words else None


# numbers that flags may have: not below 0 (or the default, as -1), and in these sets
ABOVE_ZERO = """iter batch_seconds max_steps lr head_lr lr_decay clip codes code_dim estimator_blocks
    log_every eval_every save_every mask_ratio window top seconds minutes runs draws bootstraps
    figure_copies"""
BELOW_ONE = "mask_ratio dropout layerdrop patchout smoothing valid_share decay"
UP_TO_ONE = "disturb spec_augment lr_decay grad_decay"
OF_ANY_SIGN = "fbank_mean"


def check_flags(cfg):
    """Raise UserError if a field holds a number out of its range, or a word that is no choice."""
    comments = comments_of(type(cfg))
    fields = dataclasses.fields(cfg)
    for field in fields:
        name, value = field.name, getattr(cfg, field.name)
        choices = choices_of(name, comments.get(name, ""))
        if choices:
            check(
                value in [*choices, field.default],
                f"--{name} {value}: choose one of {', '.join(choices)}"
            )
        if type(field.default) in (int, float):
            check_number(name, value, field.default)
    check_types(vars(cfg), {field.name: type(field.default) for field in fields})
    if getattr(cfg, "keep_every", 0):
        check(
            cfg.keep_every % max(1, cfg.save_every) == 0,
            f"--keep_every {cfg.keep_every}: has to be a multiple of --save_every {cfg.save_every}"
        )


def check_number(name, value, default):
    where = f"--{name} {value}"
    number = isinstance(value, (int, float)) and math.isfinite(value)
    check(number, f"{where}: has to be a finite number")
    if name not in OF_ANY_SIGN.split():
        least = min(0, default)
        check(value >= least, f"{where}: has to be at least {least}")
    if name in ABOVE_ZERO.split():
        check(value > 0, f"{where}: has to be above 0")
    if name in BELOW_ONE.split():
        check(value < 1, f"{where}: a share, has to be below 1")
    if name in UP_TO_ONE.split():
        check(value <= 1, f"{where}: a share, has to be at most 1")


def mean_and_std(text):
    """Return the two numbers of --fbank, or None where it is empty."""
    if not text:
        return None
    try:
        mean, std = map(float, text.split(","))
    except ValueError:
        mean = std = 0.0
    check(
        abs(mean) < 1e3 and 0 < std < 1e3,
        f"--fbank {text}: give mean,std as in 15.41663,6.55582"
    )
    return mean, std


def run(main, Config, doc):
    """Call main with the flags typed.

    A user's mistake, or a full disk, ends in one line on stderr, anything else in a traceback.
    """
    flags = parse(Config, doc)
    message = None
    try:
        main(**flags)
    except (UserError, OSError) as error:
        message = f"error: {error}"
    except torch.OutOfMemoryError:
        message = "error: the device's memory is full; --recompute and less --device_seconds need less"
    except KeyboardInterrupt:
        message = "interrupted; the last checkpoint, if any, is whole"
    except SystemExit as stop:
        message = stop.code
    leave()  # not in a `finally`: there the exception still holds main's model, which holds the group
    sys.exit(message)


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


class Lock:
    """Keep other processes from writing under a path as long as this object, or its process, lives.

    On rank 0. The same process may ask again. Where a disk knows no locks, or the system none (Windows),
    nothing is kept.
    """

    held = weakref.WeakValueDictionary()  # path -> what a Lock keeps open

    def __init__(self, path):
        path = Path(path).absolute()
        self.file = self.held.get(path)
        if self.file or rank():
            return
        try:
            import fcntl
        except ImportError:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.held[path] = LockFile(path.with_name(f".{path.name}.lock"))
        except OSError as error:
            raise UserError(
                f"{path.parent}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        try:
            fcntl.flock(self.file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            del self.held[path]
            raise UserError(
                f"{path}: another process is writing it; wait for its end, or choose another name or folder"
            ) from None
        except OSError:
            pass


class LockFile:
    def __init__(self, path):
        self.number = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)

    def __del__(self):
        os.close(self.number)


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
    number = int(words[0]) >> 1
    torch.manual_seed(number)
    return number


def wrap(model, compile=False):
    """Compile in place, then DDP: the keys of state_dict() stay clean. Returns what to call in training."""
    if compile:
        # one graph, its gradients summed after it. DDP's default, to sum meanwhile, cuts it at every 25 MB of
        # gradients: some 18 graphs of a base model, 55 of a large one, each compiled anew by every rank
        torch._dynamo.config.optimize_ddp = False
        # padded or not, a single clip, evaluation: the default of 8 recompilations is soon used up
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
            group = groups.setdefault(key, dict(params=[], names=[]))
            group["params"].append(parameter)
            group["names"].append(name)

    for (decay, factor), group in groups.items():
        group.update(weight_decay=decay, times=factor)
    return torch.optim.AdamW(list(groups.values()), lr=lr, betas=betas, eps=eps, fused=True)


def moments_of(optimizer):
    """Return {name of the parameter: its moments and number of steps}; filling these in restores them."""
    moments = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            moments[name] = optimizer.state[parameter]
    return moments


def step_if_finite(optimizer, norm):
    """Step and clear the gradients; where their norm is not finite, leave weights and moments as they are.

    The gradients are added up by then, so all ranks do the same, and none waits for its device. Returns
    whether the step was made, a tensor.
    """
    finite = norm.isfinite()
    optimizer.found_inf = (~finite).float()  # fused optimizers do nothing where it is 1
    optimizer.step()
    optimizer.zero_grad()
    return finite


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

FORMAT = 3  # of training state: the names of parameters
RESULTS = r"(\.before|\.step\d+)?\.(pt|jsonl|npz|csv)"  # what a run leaves under one name


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong with what a file holds into a CheckpointError, one line that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        if not isinstance(error, (UserError, OSError)):
            reason = f"damaged, edited or of another kind: {reason or type(error).__name__}"
        raise CheckpointError(f"{path}: {reason}") from None


def note(path, text):
    """Say on stderr, on rank 0, what a file does not say and is assumed."""
    if rank() == 0:
        print(f"{path}: {text}", file=sys.stderr)


OTHER_FILES = {  # how a file begins that is no checkpoint, and what to do
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch that with git lfs pull",
    b"<": "a web page, not the file that it links to; download that",
    b"\x1f\x8b": "a compressed file; unpack it",
    b"RIFF": "a sound, not a checkpoint",
    b"fLaC": "a sound, not a checkpoint",
    b"\x89HDF": "an HDF5 file (Keras?), not a checkpoint of torch"
}


def check_file(path):
    """Raise UserError if a file is no checkpoint of torch, or not what was written."""
    path = Path(path)
    check(path.exists(), "no such checkpoint")
    check(path.is_file(), "a folder or a device, not a checkpoint; name the file in it")
    check(os.access(path, os.R_OK), "no permission to read it")
    with open(path, "rb") as file:
        begin = file.read(100)
    check(begin, "an empty file; copy or download it anew")
    for other, what in OTHER_FILES.items():
        check(not begin.lstrip().startswith(other), what)
    check(
        begin[8:9] != b"{",
        "a safetensors file; make a checkpoint of it with "
        "torch.save(safetensors.torch.load_file(path), 'model.pt')"
    )

    # torch's own reader does not compare the checksums
    if begin.startswith(b"PK"):
        check(zipfile.is_zipfile(path), "its end is missing; copy or download it anew")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            check(any(name.endswith("data.pkl") for name in names), "a zip file; unpack it")
            program = any(name.endswith("constants.pkl") for name in names)
            check(not program, "a TorchScript program; save the state_dict() of its model instead")
            # all are 0 where torch was told to write none
            if any(entry.CRC for entry in entries):
                damaged = archive.testzip()
                check(damaged is None, f"damaged: {damaged} is not what was written; copy it anew")


def check_finite(content, name):
    """Raise UserError if a tensor somewhere in nested dicts is not finite, or holds nothing."""
    if isinstance(content, dict):
        for key, value in content.items():
            check_finite(value, f"{name} {key}")
    elif isinstance(content, torch.Tensor):
        strided = content.layout == torch.strided
        check(strided and not content.is_meta, f"{name}: holds no weights")
        check(content.isfinite().all(), f"{name}: holds NaN or infinite numbers")


def read_checkpoint(path):
    """Return the dict that a file holds, on the CPU, never running code from it. Raises CheckpointError."""
    with reading(path):
        check_file(path)
        try:
            ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        except Exception as error:
            python = re.search(r"GLOBAL (\S+)", str(error))
            if python:
                raise UserError(
                    f"holds Python objects ({python[1]}), perhaps a whole model, whose code is not run; "
                    "where it was made, save its state_dict() instead"
                ) from None
            raise UserError(
                "not a readable checkpoint: damaged, cut short, or another kind of file"
            ) from None
        check(isinstance(ckpt, dict), f"holds a {type(ckpt).__name__}, not a dict of weights")
        for name in ("model", "optimizer"):
            check_finite(ckpt.get(name), name)
    return ckpt


def fingerprint(weights, state=None):
    """Return a hash of tensors by name, and of what else they are known by."""
    digest = hashlib.sha256(repr((state, list(weights))).encode())
    for tensor in weights.values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_state(model, state, path):
    """Do model.load_state_dict(state), or raise CheckpointError."""
    with reading(path):
        check_finite(state, "model")
        own = model.state_dict()
        for name in own.keys() & state.keys():
            alike = state[name].is_floating_point() == own[name].is_floating_point()
            check(alike, f"{name}: is of type {state[name].dtype}")
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"tensors do not fit together: {reason}") from None
        check_finite(model.state_dict(), "model")


def write_whole(path, write):
    """Write a file by write(file), which appears under its name when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_checkpoint(path, **content):
    """Write a checkpoint, on rank 0. Raises UserError where the disk does not take it."""
    if rank() == 0:
        path = Path(path)
        versions = dict(torch=str(torch.__version__), python=platform.python_version())
        content |= dict(format=FORMAT, world=world(), versions=versions)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f"{path.name}.*.partial"):  # by a run that was killed
                left.unlink()
            write_whole(path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:
            # on a full disk torch complains of a file position; the error it was handling says the cause
            cause = error.__context__ or error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise UserError(f"{path}: cannot be written ({reason}){what_is_there(path)}") from None
    barrier()


def what_is_there(path):
    """Say which step a checkpoint is of, for messages."""
    try:
        step = torch.load(path, map_location="meta", weights_only=True, mmap=True)["step"]
    except Exception:
        return ""
    return f"; what stands there is whole, of step {step}: --resume goes on from it"


def second_name(path, name):
    """Let a file be found under another name, too: a link, or a copy where there are no links."""
    if rank() == 0 and Path(path).exists():
        name.unlink(missing_ok=True)
        try:
            os.link(path, name)
        except OSError:
            shutil.copyfile(path, name)


def save_training(path, cfg, optimizer, place, step, **content):
    """Write a checkpoint that --resume continues after this step, with the batch at this place.

    The one before it stays as .before.pt, and every one that --keep_every asks for as .step<number>.pt.
    """
    path = Path(path)
    second_name(path, path.with_suffix(".before.pt"))
    state = dict(optimizer=moments_of(optimizer), step=step, place=place)
    save_checkpoint(path, config=dataclasses.asdict(cfg), **state, **content)
    if cfg.keep_every and step % cfg.keep_every == 0:
        second_name(path, path.with_suffix(f".step{step}.pt"))


# what --resume finds in a checkpoint, beside the model
TRAINING = dict(
    config=dict,
    optimizer=dict,
    step=int,
    place=tuple,
    world=int,
    owed=bool,
    probe=float,
    best=float
)


def begin(Config, flags, name, preset={}, fixed=()):
    """Return (cfg, path, ckpt): defaults < preset < checkpoint < flags typed; what --resume continues.

    name: of the checkpoint in --out_dir, with fields of cfg in braces; fixed: flags that --resume cannot
    change, for what they say has been done.
    """
    cfg = Config(**preset | flags)
    path = f"{cfg.out_dir}/{name.format(**vars(cfg))}.pt"
    if not cfg.resume:
        check_flags(cfg)
        return cfg, path, None

    try:
        ckpt = read_checkpoint(path)
    except CheckpointError as error:
        before = Path(path).with_suffix(".before.pt")
        hint = f"; {before} is the one before: give it this name to go on from there"
        raise CheckpointError(f"{error}{hint if before.exists() else ''}") from None
    with reading(path):
        needed = {"optimizer", "config", "step", "place", "world"}
        check(needed <= set(ckpt), "holds no training state to resume")
        check(
            ckpt.get("format") == FORMAT and set(ckpt["config"]) == set(vars(cfg)),
            "begun by another version of this script, which has to finish it; "
            "to begin anew, leave out --resume"
        )
        check_types(ckpt, TRAINING)
        check_types(ckpt["config"], {key: type(value) for key, value in vars(cfg).items()})
        cfg = Config(**ckpt["config"] | flags)
        check_flags(cfg)
        for flag in fixed:
            same(ckpt["config"], flag, getattr(cfg, flag), f"begun with another --{flag}")
        epoch, number = ckpt["place"]
        possible = 0 <= epoch <= ckpt["step"] and 0 <= number <= ckpt["step"]
        check(possible, "its step and its place cannot be")
    return cfg, path, ckpt


def check_types(content, types):
    """Raise UserError if a value that has a type in `types` is of another."""
    for key in content.keys() & types.keys():
        value, kind = content[key], types[key]
        number = kind is float and type(value) is int
        check(isinstance(value, kind) or number, f"{key} is {value!r:.40}, not a {kind.__name__}")


def same(ckpt, key, value, message):
    """Raise UserError(message) if what is resumed had another value of this key."""
    matches = ckpt is None or ckpt.get(key) == value
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
    before = ckpt["config"] | dict(resume=True)
    other = [f"{name} {before[name]} -> {now}" for name, now in vars(cfg).items() if now != before[name]]
    if rank() == 0 and other:
        print(f"other flags than {path} was begun with: {', '.join(other)}")
    if rank() == 0 and ckpt["step"] >= cfg.max_steps:
        print(f"{path} has made its {cfg.max_steps} steps; for more of them, --max_steps")
    load_state(model, ckpt["model"], path)

    # moments from the checkpoint; learning rates and weight decay are as the flags say now
    parameters = dict(model.named_parameters())
    with reading(path):
        for name, moments in moments_of(optimizer).items():
            for key, value in ckpt["optimizer"][name].items():
                fits = key == "step" or value.shape == parameters[name].shape
                check(fits, f"the moments of {name} are of another model")
                moments[key] = value.to(parameters[name].device)
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
        self.old = {}
        if threading.current_thread() is threading.main_thread():  # Python gives no other thread signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, self.catch)

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

        # the first question comes after one step, whatever the number at which a resumed run begins
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
            # JSON has no NaN, the loss of no steps
            numbers = {key: None if value != value else value for key, value in values.items()}
            self.append(json.dumps(numbers) + "\n")
        for key, value in values.items():
            words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        print("  ".join(words), flush=True)

    def append(self, line):
        """Write a line, or nothing of it where the disk is full; on a new line after one that was cut."""
        size = 0
        try:
            with open(self.path, "ab+") as file:
                size = file.tell()
                file.seek(max(0, size - 1))
                torn = file.read() not in (b"", b"\n")
                file.write(b"\n" * torn + line.encode())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            whole = what_is_there(self.path.with_suffix(".pt"))
            raise UserError(f"{self.path}: cannot be written ({error.strerror}){whole}") from None


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
        self.step, self.skipped_in_a_row = {}, 0
        self.restart()

    def restart(self):
        self.sums, self.seconds, self.began = {}, 0.0, time.perf_counter()
        self.skipped = 0  # steps

    def add(self, sums):
        """Add the sums of one part of a step."""
        add_to(self.step, sums)

    def heard(self, batch, finite):
        """Count a step of this rank: its audio, and its sums where `finite`, a 0-d bool tensor, is True."""
        self.seconds += batch["seconds"] * world()
        for name, value in self.step.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(finite, value, 0.0)
        self.step = {}
        self.skipped = self.skipped + ~finite
        self.skipped_in_a_row = torch.where(finite, 0, self.skipped_in_a_row + 1)

    def check_steps(self, path, batch, names, validate=None):
        """Raise UserError where it is no use to go on, or to save. Waits for the device.

        That is after 20 skipped steps in a row. After fewer the batches may be to blame, or weights that are
        finite and yet of no use: the mean losses over held-out clips, validate(), tell which.
        """
        skipped = int(self.skipped_in_a_row)
        if not skipped:
            return
        if skipped < 20 and (validate is None or all(map(math.isfinite, validate().values()))):
            return
        recordings = names(batch["clip"].cpu().numpy())
        raise UserError(
            f"the gradient has not been finite for {skipped} steps, which were left out; a lower --lr may "
            f"help, or a look at these {len(recordings)} recordings, of which the last step was: "
            f"{', '.join(recordings[:20])}{what_is_there(path)}"
        )

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
        speeds = dict(x_realtime=speed, mfu=speed * self.flops / self.rate)
        skipped = dict(skipped=int(self.skipped))
        self.restart()
        return values | speeds | skipped


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
