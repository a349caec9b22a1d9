"""Flags, optimizer, schedule, checkpoints, signals and log: what every script shares."""
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import common
import evaluate
import finetune
import train_mam
import train_tokenizer
from common import UserError
from conftest import MICRO, ROOT
from model import PRESETS, Encoder
from tools import bench, gpu_check, infer, report
from train_mam import Config

CPU = torch.device("cpu")

@pytest.mark.parametrize("argv, flags", [
    ("--lr 1 --batch-seconds 3", dict(lr=1.0, batch_seconds=3.0)), ("--no-resume", dict(resume=False))])
def test_only_what_was_typed_is_returned(argv, flags):
    assert common.parse(Config, "", argv.split()) == flags

def test_every_number_of_every_program_has_a_range():
    for module in (train_mam, train_tokenizer, finetune, evaluate, infer, report, bench, gpu_check):
        for field in dataclasses.fields(module.Config):
            if type(field.default) in (int, float):
                wrong = [float("nan"), float("inf")] + [-2] * (field.name != "fbank_mean")
                for value in wrong:
                    with pytest.raises(UserError, match=f"--{field.name} {value}: has to be"):
                        common.check_flags(module.Config(**{field.name: value}))
    common.check_flags(train_mam.Config(predictor_dim=0, crop_seconds=0, warmup_steps=0))

@pytest.mark.parametrize("flags, message", [
    (dict(mask_ratio=1.0), "--mask_ratio 1.0: a share, has to be below 1"),
    (dict(mask_ratio=0.0), "--mask_ratio 0.0: has to be above 0"),
    (dict(lr=0.0), "--lr 0.0: has to be above 0"),
    (dict(lr="1e-3"), "--lr 1e-3: has to be a finite number"),          # from Python
    (dict(max_steps=1.5), "max_steps is 1.5, not a int"), (dict(data=["a"]), "data is .*, not a str"),
    (dict(dtype="half"), "--dtype half: choose one of auto, float32, bfloat16")])
def test_a_value_that_makes_no_sense_is_named(flags, message):
    with pytest.raises(UserError, match=message):
        common.begin(Config, flags, "x")

def test_a_size_or_a_task_that_was_added_is_accepted_as_typed(monkeypatch):
    for flag, table in (("model", PRESETS), ("task", finetune.TASKS)):
        with pytest.raises(SystemExit):
            common.parse(finetune.Config, "", [f"--{flag}", "mine"])
        monkeypatch.setitem(table, "mine", next(iter(table.values())))
        assert common.parse(finetune.Config, "", [f"--{flag}", "mine"]) == {flag: "mine"}
        common.check_flags(finetune.Config(**{flag: "mine"}))

@pytest.mark.parametrize("argv, message", [
    ("--itre 2", "unrecognized arguments: --itre"), ("--step 2", "unrecognized arguments: --step"),
    ("--model huge", "invalid choice: 'huge'"), ("--seed many", "invalid int value: 'many'")])
def test_a_flag_that_makes_no_sense_is_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        common.parse(Config, "", argv.split())
    assert message in capsys.readouterr().err

@pytest.mark.parametrize("script", [train_mam, train_tokenizer, finetune, evaluate])
def test_help_lists_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit):
        common.parse(script.Config, script.__doc__, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name}" in text
        assert f"[{field.default!r}]" in text

def test_a_mistake_ends_the_command_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "train_mam.py", "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere is not a pack")
    assert done.stderr.count("\n") == 1

@pytest.mark.parametrize("amx, avx512", [(False, False), (True, False), (False, True)])
def test_bfloat16_where_the_processor_is_fast_at_it(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    x = torch.ones(2, 2)
    with common.autocast(CPU):
        assert (x @ x).dtype == (torch.bfloat16 if amx or avx512 else torch.float32)
    with common.autocast(CPU, "float32"):
        assert (x @ x).dtype == torch.float32

def test_learning_rates():
    assert [common.lr_at(step, 1.0, 4, 10) for step in (0, 3, 4, 7, 10)] == [0.25, 1.0, 1.0, 0.5, 0.0]
    assert common.lr_at(4, 1.0, 4, 10, "cosine") == 1.0
    assert common.lr_at(7, 1.0, 4, 10, "cosine") == pytest.approx(0.5)

def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    encoder = Encoder(MICRO)
    groups = common.make_optimizer(encoder, 1.0, 0.1).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(encoder.parameters()))
    for name, parameter in encoder.named_parameters():
        matrix = name.endswith(("weight", "weight_v")) and "ln" not in name
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name

def test_every_step_of_every_rank_and_seed_draws_numbers_of_its_own(monkeypatch):
    numbers, draws = set(), set()
    for seed, step, rank in 2 * list(itertools.product((0, 1), repeat=3)):
        monkeypatch.setattr(common, "rank", lambda: rank)
        numbers.add(common.seed_step(seed, step))
        draws.add(torch.rand(()).item())
    assert len(numbers) == len(draws) == 8

@pytest.mark.parametrize("owner, name", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_a_save_that_breaks_off_leaves_the_old_checkpoint(owner, name, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        if name == "save":
            args[1].write(b"the beginning of a file")
        raise OSError("no space left")
    common.save_checkpoint(tmp_path / "new/x.pt", kind="x", model={}, step=1)
    before = (tmp_path / "new/x.pt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Exception, match="no space left"):
        patch.setattr(owner, name, full)
        common.save_checkpoint(tmp_path / "new/x.pt", kind="x", model={}, step=2)
    assert (tmp_path / "new/x.pt").read_bytes() == before
    common.save_checkpoint(tmp_path / "new/x.pt", kind="x", model={}, step=3)
    assert common.read_checkpoint(tmp_path / "new/x.pt")["step"] == 3

def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    sync, replace, moments = os.fsync, os.replace, []
    def noticed_sync(file):
        moments.append(("on the disk", os.stat(file).st_size))
        sync(file)
    def noticed_replace(old, new):
        moments.append((new.name, os.stat(old).st_size))
        replace(old, new)
    monkeypatch.setattr(os, "fsync", noticed_sync)
    monkeypatch.setattr(os, "replace", noticed_replace)
    for write in (lambda path: common.save_checkpoint(path, kind="x", model={}),
                  lambda path: common.write_whole(path, lambda file: file.write(b"whole"))):
        moments.clear()
        write(tmp_path / "x.pt")
        size = (tmp_path / "x.pt").stat().st_size
        assert moments[:2] == [("on the disk", size), ("x.pt", size)]

def test_a_full_disk_is_one_line_that_says_which_step_is_whole(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(tmp_path / "x.pt", 7)
    log = common.Log(tmp_path / "x.pt")
    log(step=7)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="x.pt: cannot be written .No space left on device.*whole, of step 7"):
        save(tmp_path / "x.pt", 9)
    assert not list(tmp_path.glob("*.partial"))
    assert common.read_checkpoint(tmp_path / "x.pt")["step"] == 7

def test_of_a_log_line_that_a_full_disk_does_not_take_nothing_is_left(tmp_path):
    """A limit on the size of files stands for the disk."""
    save(tmp_path / "x.pt", 7)
    program = f"""if True:
        import common, resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        log = common.Log("{tmp_path}/x.pt")
        [log(step=step) for step in range(9)]"""
    command = [sys.executable, "-c", program]
    error = subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stderr.splitlines()[-1]
    assert "x.jsonl: cannot be written (File too large)" in error and "of step 7" in error
    text = (tmp_path / "x.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [0, 1] and text.endswith("}\n")

def test_a_log_goes_on_on_a_new_line_after_one_that_was_cut(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n{"st')
    for step in (2, 3):
        common.Log(tmp_path / "x.pt")(step=step)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"st'] and [json.loads(line)["step"] for line in lines[2:]] == [2, 3]

def test_a_folder_that_cannot_be_written_is_named_before_anything_is_done(tmp_path):
    (tmp_path / "out").touch()                                  # a file of this name
    with pytest.raises(UserError, match="/out: cannot be written .*; choose another folder"):
        common.Lock(tmp_path / "out/mam_iter1.pt")

def test_two_processes_do_not_write_the_same_files(tmp_path):
    program = "import common, sys; lock = common.Lock(sys.argv[1]); print('has it', flush=True); input()"
    command = [sys.executable, "-c", program, tmp_path / "x.pt"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(UserError, match="x.pt: another process is writing it"):
            common.Lock(tmp_path / "x.pt")
        another = common.Lock(tmp_path / "y.pt")
        other.kill()                        # a crash leaves nothing behind that locks
    first, again = common.Lock(tmp_path / "x.pt"), common.Lock(tmp_path / "x.pt")   # the same process may
    del first
    assert again.file.number and another.file.number

def test_earlier_results_move_to_the_next_free_number(tmp_path, capsys):
    for content in "abc":
        common.keep_old(tmp_path / "x.pt")
        for name in ("x.pt", "x.jsonl"):
            (tmp_path / name).write_text(content)
    assert [(tmp_path / name).read_text() for name in ("x.1.pt", "x.2.jsonl", "x.pt")] == ["a", "b", "c"]
    assert capsys.readouterr().out.count("kept the earlier") == 2

def save(path, step, **flags):
    """Save as the scripts do."""
    cfg = Config(**flags)
    optimizer = common.make_optimizer(torch.nn.Linear(1, 1), 1.0, 0.0)
    common.save_training(path, cfg, optimizer, (0, step), step, kind="x", model={})

@pytest.mark.parametrize("links", [True, False])
def test_the_last_two_checkpoints_are_kept_and_every_one_asked_for(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: os.stat("no such"))     # as on a FAT disk
    for step in (2, 4, 6, 8):
        save(tmp_path / "x.pt", step, keep_every=4, save_every=2)
    steps = {path.name: common.read_checkpoint(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"x.pt": 8, "x.before.pt": 6, "x.step4.pt": 4, "x.step8.pt": 8}
    common.keep_old(tmp_path / "x.pt")
    assert {path.name for path in tmp_path.iterdir()} == {name.replace("x.", "x.1.") for name in steps}

def test_of_a_damaged_checkpoint_the_one_before_is_named(tmp_path):
    for step in (2, 4):
        save(tmp_path / "x.pt", step)
    (tmp_path / "x.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a readable checkpoint.*x.before.pt is the one before: give it"):
        common.begin(Config, dict(out_dir=str(tmp_path), resume=True), "x")

def test_what_is_kept_for_good_has_to_be_saved_at_all(tmp_path):
    with pytest.raises(UserError, match="--keep_every 15: has to be a multiple of --save_every 10"):
        common.begin(Config, dict(keep_every=15, save_every=10), "x")

def test_what_is_kept_for_good_has_to_be_saved_by_the_flags_of_a_run_that_goes_on(tmp_path):
    save(tmp_path / "x.pt", 2, keep_every=300, save_every=100)
    flags = dict(out_dir=str(tmp_path), resume=True)
    assert common.begin(Config, flags | dict(keep_every=500), "x")[0].keep_every == 500
    with pytest.raises(UserError, match="--keep_every 300: has to be a multiple of --save_every 200"):
        common.begin(Config, flags | dict(save_every=200), "x")

@pytest.mark.parametrize("first, seconds, steps", [
    (1, 0.101, [1, 20, 39]), (1, 0.7, range(1, 41, 2)), (1, 4.0, range(1, 41)),
    (100_001, 4.0, range(100_001, 100_041))])               # of a run that is resumed
def test_ranks_ask_each_other_every_two_seconds_or_every_slow_step(first, seconds, steps, monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common, "all_sum", lambda x: asked.append(step) or 2 * x)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    stop = common.Stop()
    for step in range(first, first + 40):
        clock[0] += seconds
        assert not stop.now(step, CPU)
    stop.close()
    assert asked == list(steps)

def test_a_script_can_run_in_a_thread_where_signals_do_not_come():
    with ThreadPoolExecutor(1) as pool:
        stop = pool.submit(common.Stop).result()
    assert not stop.now(1, CPU)
    stop.close()

def test_a_first_signal_asks_to_stop_and_a_second_ends_at_once():
    before, stop = signal.getsignal(signal.SIGTERM), common.Stop()
    try:
        assert not stop.now(1, CPU)
        signal.raise_signal(signal.SIGTERM)
        assert stop.now(2, CPU)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGTERM) is before

def test_the_log_has_a_line_for_people_and_one_for_programs(tmp_path, capsys):
    common.Log(tmp_path / "new/x.pt")("epoch", step=1, loss=0.123456)
    assert capsys.readouterr().out.startswith("epoch  step 1  loss 0.1235  minutes ")
    values = json.loads((tmp_path / "new/x.jsonl").read_text())
    assert values.pop("minutes") > 0                # since the command began
    assert values == dict(step=1, loss=0.123456)

def test_a_meter_gives_the_means_since_it_was_last_read():
    meter = common.Meter(CPU)
    for read in (3.0, 1.0):
        for loss, count in ((4 * read, 2), (read, 3)):
            meter.add(dict(loss=torch.tensor(loss), count=torch.tensor(count)))
            meter.heard(dict(seconds=1.0), torch.tensor(True))
        assert meter.read()["loss"] == read
    assert str(common.means(dict(loss=torch.tensor(0.0), count=torch.tensor(0)))) == "{'loss': nan}"

def test_sums_are_exact_over_millions_of_tokens():
    sums = {}
    for value in [2.0**25] + 3 * [1.0]:             # which float32 would leave where it is
        common.add_to(sums, dict(count=torch.tensor(value)))
    assert sums["count"].item() == 2**25 + 3

def test_the_speed_is_that_of_all_ranks_in_the_time_of_training(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = common.Meter(CPU, flops=3.0)
    for name, value in (("world", 4), ("rank", 0)):
        monkeypatch.setattr(common, name, lambda value=value: value)
    meter.rate = 60.0                                   # of all devices
    clock[0] += 2
    meter.heard(dict(seconds=10.0), torch.tensor(True))
    with meter.paused():
        clock[0] += 50
    values = meter.read()
    assert (values["x_realtime"], values["mfu"]) == (20.0, 1.0)

@pytest.mark.parametrize("kind, products", [("cpu", 1), ("cuda", 20)])
def test_the_rate_at_products_is_of_many_per_wait_on_a_gpu(kind, products, monkeypatch):
    """A pretended GPU that asks for a product in no time and for its result in a second, however many."""
    class Product:
        dtype = torch.float32
        def __matmul__(self, other):
            return self
        def __getitem__(self, index):
            return self
        def to(self, dtype):
            return self
        def item(self):
            clock.append(1.0)
    clock = []
    monkeypatch.setattr(torch, "randn", lambda *shape, device: Product())
    monkeypatch.setattr(common, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(common.timeit, "repeat", functools.partial(timeit.repeat, timer=lambda: sum(clock)))
    assert common.matrix_rate(torch.device(kind), n=10) == products * 2 * 10**3

def test_sending_pins_for_a_gpu_and_nothing_else():
    class Sent:
        pinned = False
        def pin_memory(self):
            self.pinned = True
            return self
        def to(self, device, non_blocking):
            return device.type, non_blocking, self.pinned
    assert common.send(Sent(), torch.device("cuda")) == ("cuda", True, True)
    assert common.send(torch.arange(3), CPU).tolist() == [0, 1, 2]
