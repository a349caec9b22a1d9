"""Flags, optimizer, schedule, checkpoints, signals and log: what every script shares."""
import dataclasses
import json
import signal
import subprocess
import sys

import pytest
import torch

import common
import evaluate
import finetune
import train_mam
import train_tokenizer
from conftest import MICRO, ROOT
from model import Encoder
from train_mam import Config

CPU = torch.device("cpu")

@pytest.mark.parametrize("argv, flags", [
    ("--lr 1 --batch-seconds 3", dict(lr=1.0, batch_seconds=3.0)), ("--no-resume", dict(resume=False))])
def test_only_what_was_typed_is_returned(argv, flags):
    assert common.parse(Config, "", argv.split()) == flags

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

def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path):
    common.save_checkpoint(tmp_path / "new/x.pt", kind="x", model={}, step=1)
    with pytest.raises(Exception, match="pickle"):
        common.save_checkpoint(tmp_path / "new/x.pt", kind="x", model={}, step=2, broken=lambda: 0)
    assert common.read_checkpoint(tmp_path / "new/x.pt")["step"] == 1

def test_earlier_results_move_to_the_next_free_number(tmp_path, capsys):
    for content in "abc":
        common.keep_old(tmp_path / "x.pt")
        for name in ("x.pt", "x.jsonl"):
            (tmp_path / name).write_text(content)
    assert [(tmp_path / name).read_text() for name in ("x.1.pt", "x.2.jsonl", "x.pt")] == ["a", "b", "c"]
    assert capsys.readouterr().out.count("kept the earlier") == 2

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
        assert meter.read()["loss"] == read
    assert str(common.means(dict(loss=torch.tensor(0.0), count=torch.tensor(0)))) == "{'loss': nan}"
