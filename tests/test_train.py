"""What the three training loops share: they learn, resume bit for bit, are the same on any number of ranks.

Run by torchrun, this file is one of several ranks: see on_ranks.
"""
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import finetune
import train_mam
import train_tokenizer
from common import UserError
from conftest import MICRO, ROOT
from model import PREDICTORS, PRESETS, load
from tokenizer import Codebook, whitening

SHARED = dict(batch_seconds=21.0, warmup_steps=2, log_every=2, device="cpu")
MAM = SHARED | dict(model="micro")
TOKENIZER = SHARED | dict(codes=64, code_dim=16, estimator_blocks=1)
FINETUNE = SHARED | dict(model="micro", batch_seconds=24.0)
NAMES = {train_mam: "mam_iter1", train_tokenizer: "tokenizer_iter2", finetune: "finetune_toy"}
every_script = pytest.mark.parametrize("script", NAMES)

def content(path):
    return torch.load(path, weights_only=True)

def log(path):
    return [json.loads(line) for line in open(path)]

@pytest.fixture(scope="module")
def loop(toy, ragged, tmp_path_factory):
    """The folder of iteration 1, tokenizer 2 and iteration 2, and the results of the first two."""
    out = tmp_path_factory.mktemp("loop")
    flags = dict(data=toy, out_dir=str(out))
    first = train_mam.main(max_steps=60, lr=3e-3, **flags, **MAM)
    tokenizer = train_tokenizer.main(max_steps=40, lr=2e-3, **flags, **TOKENIZER)
    train_mam.main(iter=2, max_steps=6, probe=ragged, **flags, **MAM)
    return out, first, tokenizer

@pytest.fixture(scope="module")
def begun(toy, loop, tmp_path_factory):
    """A folder where every script has taken one step."""
    out = tmp_path_factory.mktemp("begun")
    flags = dict(data=toy, out_dir=str(out), max_steps=1, clip=1e9, dtype="float32")
    train_mam.main(**flags, **MAM)
    train_tokenizer.main(teacher=f"{loop[0]}/mam_iter1.pt", **flags, **TOKENIZER)
    finetune.main(roll=False, **flags, **FINETUNE)          # rolling draws for the clips of a rank
    return out

# ---- learning

def test_the_loop_learns(loop, toy):
    out, first, tokenizer = loop
    losses = [line["loss"] for line in log(out / "mam_iter1.jsonl") if "loss" in line]
    assert np.mean(losses[-5:]) < losses[0] - 0.3
    assert {"valid_loss", "valid_accuracy"} <= set(first)
    assert tokenizer["valid_cosine"] > log(out / "tokenizer_iter2.jsonl")[0]["cosine"] + 0.2
    assert log(out / "tokenizer_iter2.jsonl")[-2]["codes_used"] > 12
    assert load(out / "mam_iter2.pt").cfg.fbank_mean == data.Pack(toy).info["fbank_mean"]

def test_released_files_are_starts_teachers_and_tokenizers(official, ragged, tmp_path):
    flags = dict(data=ragged, out_dir=str(tmp_path), max_steps=2)
    encoder, tokenizer, classifier = (str(official(kind)) for kind in ("encoder", "tokenizer", "finetuned"))
    train_mam.main(tokenizer=tokenizer, init=encoder, predictor_dim=32, predictor_blocks=1, **flags, **SHARED)
    assert load(tmp_path / "mam_iter1.pt").cfg.dim == 64
    train_tokenizer.main(teacher=classifier, **flags, **TOKENIZER)          # its logits
    width = content(tmp_path / "tokenizer_iter2.pt")["tokenizer"]["target_width"]
    assert width == len(load(classifier).labels)
    finetune.main(init=encoder, fold="1", **flags, **SHARED)
    assert load(tmp_path / "finetune_ragged_fold1.pt").encoder.cfg.fbank_mean == 15.41663

def test_one_clip_is_enough_to_start(tmp_path, write_wav):
    write_wav("one/a.wav", 0.1 * np.random.default_rng(0).standard_normal(64000))
    data.main(["folder", str(tmp_path / "one"), "--out", str(tmp_path / "pack")])
    flags = dict(data=str(tmp_path / "pack"), out_dir=str(tmp_path), max_steps=2)
    assert "valid_loss" not in train_mam.main(**flags, **MAM)               # nothing to hold out
    assert train_tokenizer.main(**flags, **TOKENIZER)["step"] == 2

def test_the_papers_tokenizers_do_not_start_from_their_teacher(loop, toy, tmp_path):
    flags = dict(data=toy, teacher=f"{loop[0]}/mam_iter1.pt", max_steps=1, lr=1e-9) | TOKENIZER
    teacher = load(f"{loop[0]}/mam_iter1.pt").state_dict()
    for preset in ("", "ssl", "sl"):
        train_tokenizer.main(out_dir=str(tmp_path), preset=preset, crop_seconds=2.56, **flags)
        model = content(tmp_path / "tokenizer_iter2.pt")["model"]
        same = torch.allclose(model["encoder.patch.weight"], teacher["patch.weight"], atol=1e-6)
        assert same == (preset == "")

# ---- stopping and resuming

class StopAtFive(common.Stop):
    """As if a signal came from outside during the fifth step."""
    def now(self, step, device):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return super().now(step, device)

@every_script
def test_an_interrupted_run_goes_on_bit_for_bit(script, toy, loop, tmp_path, monkeypatch):
    noisy = dataclasses.replace(MICRO, dropout=0.1, attention_dropout=0.1, layerdrop=0.2)
    monkeypatch.setitem(PRESETS, "noisy", noisy)
    monkeypatch.setitem(PREDICTORS, "noisy", (1, 32))
    noise_of = {
        train_mam: MAM | dict(model="noisy"),
        train_tokenizer: TOKENIZER | dict(teacher=f"{loop[0]}/mam_iter1.pt", dropout=0.1, disturb=0.5),
        finetune: FINETUNE | dict(dropout=0.1, layerdrop=0.2, spec_augment=0.2, mixup=0.3, balance="weights",
                                  best=True, valid_share=0.3, eval_every=2)}
    flags = dict(data=toy, max_steps=10) | noise_of[script]
    script.main(out_dir=str(tmp_path / "whole"), **flags)
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(common, "Stop", StopAtFive)
        script.main(out_dir=str(tmp_path / "parts"), **flags)
    whole, parts = (tmp_path / folder / f"{NAMES[script]}.pt" for folder in ("whole", "parts"))
    assert content(parts)["step"] == 5
    script.main(out_dir=str(tmp_path / "parts"), resume=True, **flags)
    for key in {"step", "model", "optimizer", "place", "best"} & content(whole).keys():
        torch.testing.assert_close(content(whole)[key], content(parts)[key], rtol=0, atol=0)

def test_a_new_run_keeps_the_old_result(begun, toy, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    train_mam.main(data=toy, out_dir=str(tmp_path), max_steps=1, seed=2, **MAM)
    assert content(tmp_path / "mam_iter1.1.pt")["config"]["seed"] == 0
    assert content(tmp_path / "tokenizer_iter1.1.pt")["tokenizer"]["seed"] == 0
    assert content(tmp_path / "mam_iter1.pt")["config"]["seed"] == 2

def test_resuming_on_other_sounds_or_codes_is_refused(begun, ragged, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="begun on other sounds"):
        train_mam.main(out_dir=str(tmp_path), resume=True, data=ragged)
    tokenizer = content(tmp_path / "tokenizer_iter1.pt")
    tokenizer["model"]["codebook"][0] *= -1
    torch.save(tokenizer, tmp_path / "tokenizer_iter1.pt")
    with pytest.raises(UserError, match="begun with another tokenizer"):
        train_mam.main(out_dir=str(tmp_path), resume=True)

@every_script
@pytest.mark.parametrize("change, message", [
    (dict(format=1), "another version of this script"), (dict(config={}), "another version of this script"),
    (dict(packs=["others"], pack="another"), "begun on other sounds")])
def test_resuming_what_does_not_fit_is_refused(script, change, message, begun, toy, tmp_path):
    name = f"{NAMES[script]}.pt"
    torch.save(content(begun / name) | change, tmp_path / name)
    with pytest.raises(UserError, match=message):
        script.main(data=toy, out_dir=str(tmp_path), resume=True)

@pytest.mark.parametrize("script, flags, message", [
    (train_mam, dict(resume=True), "mam_iter1.pt: no such checkpoint"),
    (train_mam, dict(iter=2), "tokenizer_iter2.pt: .* it with: python train_tokenizer.py --iter 2 --data"),
    (train_tokenizer, {}, "mam_iter1.pt: .*make it with: python train_mam.py --iter 1 --data"),
    (train_tokenizer, dict(codes=70_000), "--codes 70000: at most 65536")])
def test_mistakes_are_explained(script, flags, message, toy, tmp_path):
    with pytest.raises(UserError, match=message):
        script.main(**dict(data=toy, out_dir=str(tmp_path), device="cpu") | flags)

# ---- several ranks

def torchrun(ranks, *command):
    """Start a group of ranks, a process."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

def take_second_step(begun, out, toy, **more):
    """Go on by one step with every script, in a copy of `begun`."""
    if common.rank() == 0:
        shutil.copytree(begun, out)
    common.barrier()
    flags = dict(out_dir=str(out), max_steps=2, resume=True, **more)
    train_mam.main(**flags)
    train_tokenizer.main(**flags)
    finetune.main(data=toy, **flags)

def measure_together(out):
    """Let a codebook follow, and whitening measure, vectors of which every rank has its part."""
    torch.manual_seed(0)
    codebook, everything = Codebook(16, 8), torch.randn(4, 120, 8)
    z = everything.chunk(common.world(), 1)[common.rank()]
    codebook.start_(z[0], per_step=120, centres=torch.arange(16))
    for step in z:
        codebook.update_(step, codebook(step)[1], torch.ones(len(step), dtype=torch.bool))
    mean, matrix = whitening(z.flatten(0, 1))
    if common.rank() == 0:
        measured = dict(mean=mean, precision=matrix @ matrix.T, **codebook.state_dict())
        torch.save(measured, out / "measured.pt")

def run_the_loop(out, packs, ragged):
    """Train everything once, with codes revived. Every rank writes the weights that it ends with."""
    save = common.save_checkpoint
    def save_on_every_rank(path, **content):
        torch.save(content["model"], f"{path}.{common.rank()}")
        save(path, **content)
    common.save_checkpoint = save_on_every_rank
    flags = dict(out_dir=str(out), max_steps=4) | SHARED
    train_mam.main(data=packs, model="micro", **flags)
    train_tokenizer.main(data=ragged, revive=0.95, decay=0.9, **flags | TOKENIZER)
    train_mam.main(data=ragged, iter=2, model="micro", **flags)
    finetune.main(data=ragged, init=f"{out}/mam_iter2.pt", eval_every=2, **flags)

def on_ranks(out, begun, toy, ragged):
    """Do on each of several ranks, or on the only one, what the tests below look at."""
    common.setup("cpu")
    take_second_step(begun, out / "step", toy)
    measure_together(out)
    if common.world() == 2:
        run_the_loop(out / "loop", f"{ragged}:0.5,{toy}:0.5", ragged)

@pytest.fixture(scope="module")
def ranks(begun, toy, ragged, tmp_path_factory):
    """A folder of what one, two and four ranks wrote, and what two printed."""
    out = tmp_path_factory.mktemp("ranks")
    on_ranks(out / "1", begun, toy, ragged)
    take_second_step(begun, out / "parts/step", toy, device_seconds=6.0)
    for world in (4, 2):
        process = torchrun(world, __file__, out / str(world), begun, toy, ragged)
        output, error = process.communicate(timeout=240)
        assert process.returncode == 0, output + error
        (out / "printed.txt").write_text(output)
    return out

@pytest.mark.parametrize("name", NAMES.values())
def test_ranks_and_parts_give_the_gradient_of_one(name, begun, ranks):
    def moments(path):
        state = content(path)["optimizer"]["state"].values()
        return torch.cat([moment["exp_avg"].flatten() for moment in state]).double()
    def gradient(run):          # Adam's first moment: 0.9 times the one before + 0.1 times the gradient
        return 10 * moments(ranks / run / f"step/{name}.pt") - 9 * moments(begun / f"{name}.pt")
    one = gradient("1")
    assert one.norm() > 0
    for run in ("2", "4", "parts"):
        assert (gradient(run) - one).norm() <= 2e-5 * one.norm(), run

def test_ranks_agree_on_codebook_and_statistics(ranks):
    for world in "24":
        torch.testing.assert_close(content(ranks / world / "measured.pt"), content(ranks / "1/measured.pt"))

def test_two_ranks_run_the_loop_as_one(ranks):
    printed = (ranks / "printed.txt").read_text()
    assert len(re.findall("^step 4  loss", printed, re.M)) == 6     # three trainings, three folds, one rank
    assert sum(line.get("revived", 0) for line in log(ranks / "2/loop/tokenizer_iter2.jsonl")) > 0
    for name in ("mam_iter1", "tokenizer_iter2", "mam_iter2", "finetune_ragged_fold3"):
        first, second = (content(ranks / f"2/loop/{name}.pt.{rank}") for rank in (0, 1))
        torch.testing.assert_close(first, second, rtol=0, atol=0)

@pytest.mark.slow
def test_an_interrupt_of_two_ranks_saves_and_says_so(toy, tmp_path):
    flags = ["--data", toy, "--out_dir", tmp_path, "--max_steps", 100000, "--log_every", 1, "--device", "cpu"]
    process = torchrun(2, "train_mam.py", *flags)
    for line in process.stdout:
        if line.startswith("step 2 "):
            os.killpg(process.pid, signal.SIGTERM)      # as a terminal does: to all processes
            break
    printed, error = process.communicate(timeout=60)
    assert "go on with --resume" in printed, error
    assert content(tmp_path / "mam_iter1.pt")["step"] >= 2

@pytest.mark.slow
def test_no_rank_aborts_when_its_work_is_done(toy, tmp_path):
    for _ in range(5):
        flags = ["--data", toy, "--out_dir", tmp_path, "--max_steps", 1, "--device", "cpu"]
        process = torchrun(2, "train_mam.py", *flags)
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error

if __name__ == "__main__":
    out, begun, toy, ragged = sys.argv[1:]
    on_ranks(Path(out), Path(begun), toy, ragged)
    common.leave()
