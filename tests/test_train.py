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
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import evaluate
import finetune
import train_mam
import train_tokenizer
from audio import fbank, is_silent, patchify
from common import UserError
from conftest import MICRO, ROOT, row_of, save_classifier
from model import (PREDICTORS, PRESETS, Classifier, Encoder, EncoderConfig, MaskedAudioModel, Transformer,
                   load, random_mask)
from tokenizer import Codebook, RandomProjectionTokenizer, SelfDistilledTokenizer, load_tokenizer, whitening

SHARED = dict(batch_seconds=21.0, warmup_steps=2, log_every=2, device="cpu")
MAM = SHARED | dict(model="micro")
TOKENIZER = SHARED | dict(codes=64, code_dim=16, estimator_blocks=1)
FINETUNE = SHARED | dict(model="micro", batch_seconds=24.0)
CPU = torch.device("cpu")
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
def uneven(tmp_path_factory):
    """The path of a pack of 45 clips of 0.2 to 1.5 s to train on, a third of each silent, and 4 to test on.

    However they are dealt out, no two ranks have the same number of clips, tokens and targets.
    """
    def read(row):
        noise = np.random.default_rng(int(row["path"])).standard_normal(3200 + 450 * int(row["path"]))
        return (0.1 * noise * (np.arange(len(noise)) < len(noise) * 2 / 3)).astype(np.float32)
    rows = [row_of(i, "ab"[i % 2], ("train", "test")[i > 44]) for i in range(49)]
    path = tmp_path_factory.mktemp("packs") / "toy"
    data.write_pack(path, rows, read)
    return str(path)

@pytest.fixture(scope="module")
def begun(uneven, loop, tmp_path_factory):
    """A folder where every script has taken one step, of all clips, whole."""
    out = tmp_path_factory.mktemp("begun")
    flags = dict(data=uneven, out_dir=str(out), max_steps=1, clip=1e9, dtype="float32", batch_seconds=75.0)
    train_mam.main(crop_seconds=0.0, mask_ratio=0.6, **MAM | flags)
    teacher = f"{loop[0]}/mam_iter1.pt"
    train_tokenizer.main(teacher=teacher, crop_seconds=0.0, beta=0.5, dropout=0.0, **TOKENIZER | flags)
    finetune.main(roll=False, **FINETUNE | flags)           # rolling draws for the clips of a rank
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

# ---- steps whose gradient is not finite

@pytest.fixture
def spoil(monkeypatch):
    """spoil(script, steps): the filter bank of a clip is NaN in these steps of the script's training."""
    def of(script, steps):
        step, seed_step, fbank = [], common.seed_step, script.fbank
        def count(seed, number):
            step.append(number)
            return seed_step(seed, number)
        def spoiled(wav):
            x = fbank(wav)
            if step and step[-1] in steps and not evaluating:
                x[0] = torch.nan
            return x
        evaluating = []
        def quiet(function):
            def run(*args, **kwargs):
                evaluating.append(True)
                values = function(*args, **kwargs)
                evaluating.pop()
                return values
            return run
        name = "judge" if script is finetune else "validate"
        monkeypatch.setattr(script, name, quiet(getattr(script, name)))
        monkeypatch.setattr(common, "seed_step", count)
        monkeypatch.setattr(script, "fbank", spoiled)
    return of

def flags_of(script, loop, toy, out):
    own = {train_mam: MAM, train_tokenizer: TOKENIZER | dict(teacher=f"{loop[0]}/mam_iter1.pt"),
           finetune: FINETUNE}[script]
    return own | dict(data=toy, out_dir=str(out), lr=1e-3)

def tensors_of(path):
    """Return all that training has moved: weights, moments, codebook."""
    ckpt = content(path)
    moments = [list(state.values()) for state in ckpt["optimizer"].values()]
    return sum(moments, list(ckpt["model"].values()))

@every_script
def test_a_nan_leaves_its_step_out_and_nothing_else(script, loop, toy, tmp_path, spoil):
    spoil(script, [2])
    flags = flags_of(script, loop, toy, tmp_path / "parts")
    flags |= dict(device_seconds=10.0, log_every=1, save_every=1)
    script.main(max_steps=3, keep_every=1, **flags)
    stem = tmp_path / "parts" / NAMES[script]
    before, after = tensors_of(f"{stem}.step2.pt"), tensors_of(f"{stem}.step3.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert [line["skipped"] for line in log(f"{stem}.jsonl") if "skipped" in line] == [0, 0, 1]
    script.main(max_steps=5, resume=True, **flags)
    script.main(max_steps=5, keep_every=1, **flags | dict(out_dir=str(tmp_path / "whole")))
    resumed, whole = tensors_of(f"{stem}.pt"), tensors_of(tmp_path / "whole" / f"{NAMES[script]}.pt")
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(resumed, whole))
    assert not all(torch.equal(a, b) for a, b in zip(after, whole))

@every_script
def test_nan_in_every_step_ends_the_run_and_names_the_recordings(script, loop, toy, tmp_path, spoil):
    spoil(script, range(2, 100))
    flags = flags_of(script, loop, toy, tmp_path) | dict(save_every=2, eval_every=100)
    with pytest.raises(UserError, match=r"not been finite for 20 steps.*recordings.*toy/.*of step 20"):
        script.main(max_steps=60, **flags)
    assert all(x.isfinite().all() for x in tensors_of(tmp_path / f"{NAMES[script]}.pt"))

@every_script
def test_a_learning_rate_that_ruins_the_weights_spares_the_checkpoint(script, loop, toy, tmp_path):
    flags = flags_of(script, loop, toy, tmp_path)
    script.main(max_steps=3, **flags)
    path = tmp_path / f"{NAMES[script]}.pt"
    whole = path.read_bytes()
    with pytest.raises(UserError, match="not been finite for .* of step 3: --resume"):
        script.main(max_steps=9, resume=True, **flags | dict(lr=1e30))
    assert path.read_bytes() == whole

# ---- what a step sees

def half_silent():
    """Return a batch, a tokenizer and the codes (B, T) by it, -1 where there is nothing to predict.

    Noise, then silence, then padding. Row r of the patches has the 2,800 samples from 2,560 r on.
    """
    torch.manual_seed(0)
    wav, lengths, tokenizer = torch.zeros(3, 16000), [16000, 9000, 6000], RandomProjectionTokenizer(64)
    for clip, n in zip(wav, (8000, 8000, 6000)):
        clip[:n].normal_(std=0.1)
    batch = dict(wav=(wav * 32768).short(), lengths=torch.tensor(lengths), noise=torch.rand(3, 48))
    batch = data.to_device(batch, CPU)
    codes = tokenizer.codes(fbank(batch["wav"]))
    codes[0, 32:] = codes[1, 24:] = codes[2, 16:] = -1
    return batch, tokenizer, codes

def test_neither_silence_nor_padding_is_predicted(random_encoder):
    batch, tokenizer, codes = half_silent()
    inputs, targets = train_mam.prepare(batch, random_encoder, tokenizer, 0.5)
    assert torch.equal(inputs["patches"], random_encoder.patches(batch["wav"])[0])
    assert (inputs["keep"] < 48).sum(1).tolist() == [24, 12, 8]
    due = [[clip[t].item() if t < 48 else -1 for t in row] for clip, row in zip(codes, inputs["masked"])]
    assert targets.tolist() == due
    assert -1 in due[0]

    # the loss is of what is predicted, in float32
    logits = torch.randn(*targets.shape, 64).bfloat16()
    logits[0, 0, targets[0, 0]] = 9
    sums = train_mam.losses(lambda **inputs: logits, inputs, targets)
    logits = logits.double()
    there = [(b, m) for b in range(3) for m in range(24) if due[b][m] >= 0]
    expect = sum(-logits[b, m].log_softmax(0)[due[b][m]] for b, m in there)
    assert sums["loss"].item() == pytest.approx(expect.item(), rel=1e-5)
    assert sums["count"] == len(there)
    assert sums["accuracy"] == sum(logits[b, m].argmax() == due[b][m] for b, m in there)

def test_neither_silence_nor_padding_is_put_into_the_codebook(random_encoder, distilled):
    batch, _, codes = half_silent()
    use = train_tokenizer.prepare(batch, distilled, random_encoder, train_tokenizer.Config())[2]
    assert torch.equal(use, codes >= 0)

@every_script
def test_models_are_in_train_mode_in_steps_and_nowhere_else(script, toy, ragged, loop, tmp_path, monkeypatch):
    """Also what a file of an encoder becomes, and teachers: whatever gets no gradient has no dropout."""
    modes, forward = [], Transformer.forward
    def noticed(self, *args, **kwargs):
        modes.append((torch.is_grad_enabled(), *{module.training for module in self.modules()}))
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(Transformer, "forward", noticed)
    encoder, tokenizer = f"{loop[0]}/mam_iter1.pt", f"{loop[0]}/tokenizer_iter2.pt"
    more = {train_mam: dict(init=encoder, tokenizer=tokenizer, probe=ragged, predictor_dim=32),
            train_tokenizer: {}, finetune: dict(init=encoder)}
    script.main(max_steps=2, eval_every=1, **flags_of(script, loop, toy, tmp_path) | more[script])
    assert set(modes) == {(True, True), (False, False)}
    modes.clear()
    evaluate.main(data=ragged, out_dir=str(tmp_path), model="micro", probe="knn", device="cpu")
    assert set(modes) == {(False, False)}

@every_script
def test_steps_follow_the_schedule_and_draw_from_seeds_of_their_own(script, toy, loop, tmp_path, monkeypatch):
    seeds, others, seed_step, deal = [], set(), common.seed_step, data.deal
    def noticed_step(*key):
        if not seeds:
            others.add(torch.initial_seed())            # of weights
        seeds.append(key)
        return seed_step(*key)
    def noticed_deal(plan, seed, place=(0, 0)):
        others.add(seed)                                # of crops, noise
        return deal(plan, seed, place)
    monkeypatch.setattr(common, "seed_step", noticed_step)
    monkeypatch.setattr(data, "deal", noticed_deal)
    flags = flags_of(script, loop, toy, tmp_path) | dict(max_steps=5, lr=6e-3, seed=3, log_every=1)
    script.main(**flags)
    assert seeds == [(3, step) for step in range(5)]
    assert others == {3}
    rates = [line["lr"] for line in log(tmp_path / f"{NAMES[script]}.jsonl") if "lr" in line]
    falling = [4.5e-3, 1.5e-3] if script == finetune else [4e-3, 2e-3]     # as a cosine, or linearly
    assert rates == pytest.approx([3e-3, 6e-3, 6e-3, *falling])

@every_script
def test_the_gradient_of_all_parameters_together_is_clipped(script, toy, loop, tmp_path):
    script.main(max_steps=1, clip=1e-3, **flags_of(script, loop, toy, tmp_path))
    path = tmp_path / f"{NAMES[script]}.pt"
    assert (10 * moments(path)).norm().item() == pytest.approx(1e-3, rel=1e-3)
    squares = 0.02 * (10 * moments(path))**2            # beta 0.98
    torch.testing.assert_close(moments(path, "exp_avg_sq"), squares, rtol=1e-4, atol=1e-20)

def test_the_codebook_starts_from_and_follows_what_sounds(uneven, loop, tmp_path, monkeypatch):
    """In closed form from the counts of one step: moving average, use of codes, and those that start anew."""
    started, start_ = [], Codebook.start_
    def noticed(self, z, **options):
        started.append(len(z))
        start_(self, z, **options)
    monkeypatch.setattr(Codebook, "start_", noticed)
    flags = dict(data=uneven, crop_seconds=0.0, batch_seconds=75.0, max_steps=1, lr=1e-9, decay=0.5)
    flags |= dict(teacher=f"{loop[0]}/mam_iter1.pt", log_every=1, dtype="float32")
    def logged_and_saved(revive):
        train_tokenizer.main(**TOKENIZER | flags, revive=revive, out_dir=str(tmp_path))
        line = next(line for line in log(tmp_path / "tokenizer_iter2.jsonl") if "loss" in line)
        return line, load_tokenizer(tmp_path / "tokenizer_iter2.pt").codebook.cluster_size
    line, after = logged_and_saved(revive=0.0)
    counts = 2 * after - 75 * 50 / 64           # before: the tokens of a step, shared by the codes
    pack, sounds = data.Pack(uneven), data.Sounds(uneven, 0.0, 75.0)
    heard = [fbank(pack.wav(clip)[None]) for clip in np.concatenate(sounds.train)]
    assert torch.allclose(counts, counts.round(), atol=1e-3)
    sounding = sum((~is_silent(features)).sum() for features in heard)
    assert counts.sum().round() == started[0] == sounding
    used = torch.special.entr(counts.round() / counts.round().sum()).sum().exp().item()
    assert line["perplexity"] == pytest.approx(used, rel=1e-4)
    assert line["revived"] == 0
    line, _ = logged_and_saved(revive=0.9)
    assert line["revived"] == (after < 0.9 * after.mean()).sum() > 0

# ---- stopping and resuming

class StopAtFive(common.Stop):
    """As if a signal came from outside during the fifth step."""
    def now(self, step, device):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return super().now(step, device)

def test_the_best_before_an_interruption_stays_the_best(toy, tmp_path, monkeypatch):
    scores = iter([0.9, 0.2, 0.3, 0.4])
    monkeypatch.setattr(finetune, "judge", lambda *_: (next(scores), 1.0))
    flags = dict(out_dir=str(tmp_path), max_steps=8, eval_every=2, best=True, valid_share=0.3)
    flags = FINETUNE | flags | dict(data=toy)
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(common, "Stop", StopAtFive)
        finetune.main(**flags)
    finetune.main(resume=True, **flags)
    best = content(tmp_path / "finetune_toy_best.pt")
    assert (best["step"], best["best"]) == (2, 0.9)

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

@every_script
def test_an_evaluation_that_a_signal_prevents_is_made_up_for(script, toy, loop, tmp_path, monkeypatch):
    flags = flags_of(script, loop, toy, tmp_path) | dict(max_steps=5, eval_every=5)
    if script is finetune:
        flags |= dict(best=True, valid_share=0.3)
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(common, "Stop", StopAtFive)
        script.main(**flags)
    name = "valid_score" if script is finetune else "valid_loss"
    lines = tmp_path / f"{NAMES[script]}.jsonl"
    assert not any(name in line for line in log(lines))
    script.main(resume=True, **flags)
    assert [line["step"] for line in log(lines) if name in line] == [5]

def test_a_new_run_keeps_the_old_result(begun, uneven, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    train_mam.main(data=uneven, out_dir=str(tmp_path), max_steps=1, seed=2, **MAM)
    assert content(tmp_path / "mam_iter1.1.pt")["config"]["seed"] == 0
    assert content(tmp_path / "tokenizer_iter1.1.pt")["tokenizer"]["seed"] == 0
    assert content(tmp_path / "mam_iter1.pt")["config"]["seed"] == 2
    assert content(tmp_path / "tokenizer_iter1.pt")["tokenizer"]["seed"] == 2

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
def test_resuming_on_other_labels_or_splits_is_refused(script, begun, uneven, tmp_path):
    """Of a pack whose table was edited, and, in pre-training, with another choice of splits."""
    name, pack = f"{NAMES[script]}.pt", shutil.copytree(uneven, tmp_path / "toy")
    ckpt = content(begun / name)
    ckpt["config"]["data"] = str(pack)
    torch.save(ckpt, tmp_path / name)
    table = (pack / "clips.csv").read_text()
    (pack / "clips.csv").write_text(table.replace("46,a,test", "46,a,train"))
    with pytest.raises(UserError, match="begun on other sounds or (splits|labels)"):
        script.main(data=str(pack), out_dir=str(tmp_path), resume=True)
    if script is not finetune:
        with pytest.raises(UserError, match="begun on other sounds or splits"):
            script.main(data=uneven, out_dir=str(tmp_path), resume=True, splits="all")

@every_script
def test_a_run_that_goes_on_with_other_flags_says_which(script, begun, uneven, tmp_path, capsys):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    script.main(data=uneven, out_dir=str(tmp_path), resume=True, lr=1e-5, max_steps=1)
    said = re.search("^other flags than .* was begun with: (.*)$", capsys.readouterr().out, re.M)[1]
    assert set(re.findall(r"(\w+) \S+ -> ", said)) == {"lr", "out_dir"}

@pytest.mark.parametrize("script, flags", [
    (train_mam, dict(model="tiny")), (train_mam, dict(init="x.pt")), (train_mam, dict(projection="plain")),
    (train_tokenizer, dict(model="tiny")), (train_tokenizer, dict(dropout=0.2)),
    (train_tokenizer, dict(from_teacher=False)),
    (finetune, dict(init="x.pt")), (finetune, dict(model="tiny"))])
def test_a_flag_that_nothing_can_heed_any_more_is_refused(script, flags, begun, uneven):
    with pytest.raises(UserError, match=f"{NAMES[script]}.pt: begun with another --{next(iter(flags))};"):
        script.main(data=uneven, out_dir=str(begun), resume=True, **flags)

@every_script
def test_what_a_file_was_fine_tuned_with_is_not_inherited(script, toy, tmp_path):
    worn = dict(layerdrop=0.3, grad_decay=0.5, input_dropout=0.1, activation_dropout=0.1)
    save_classifier(Encoder(dataclasses.replace(MICRO, **worn)), tmp_path / "worn.pt", ["a", "b"])
    start = {"teacher" if script is train_tokenizer else "init": str(tmp_path / "worn.pt")}
    own = {train_mam: MAM, train_tokenizer: TOKENIZER, finetune: FINETUNE}[script]
    script.main(data=toy, out_dir=str(tmp_path), max_steps=1, **own | start)
    encoder = content(tmp_path / f"{NAMES[script]}.pt")["encoder"]
    assert [encoder[name] for name in worn] == [0, 1, 0, 0]

def test_resuming_a_run_that_is_through_says_so_and_keeps_it(begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    before = content(tmp_path / "mam_iter1.pt")
    train_mam.main(out_dir=str(tmp_path), resume=True, max_steps=before["step"])
    assert f"has made its {before['step']} steps; for more of them, --max_steps" in capsys.readouterr().out
    assert content(tmp_path / "mam_iter1.pt")["step"] == before["step"]

@every_script
@pytest.mark.parametrize("change, message", [
    (dict(format=1), "another version of this script"), (dict(config={}), "another version of this script"),
    (dict(packs=["others"], pack="another"), "begun on other sounds")])
def test_resuming_what_does_not_fit_is_refused(script, change, message, begun, uneven, tmp_path):
    name = f"{NAMES[script]}.pt"
    torch.save(content(begun / name) | change, tmp_path / name)
    with pytest.raises(UserError, match=message):
        script.main(data=uneven, out_dir=str(tmp_path), resume=True)

@pytest.mark.parametrize("script, flags, message", [
    (train_mam, dict(resume=True), "mam_iter1.pt: no such checkpoint"),
    (train_mam, dict(iter=2), "tokenizer_iter2.pt: .* python train_tokenizer.py --iter 2 --data .* --out"),
    (train_tokenizer, {}, "mam_iter1.pt: .*make it with: python train_mam.py --iter 1 --data .* --out_dir"),
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

def take_second_step(begun, out, uneven, **more):
    """Go on by one step with every script, in a copy of `begun`."""
    if common.rank() == 0:
        shutil.copytree(begun, out)
    common.barrier()
    flags = dict(out_dir=str(out), max_steps=2, resume=True, **more)
    train_mam.main(**flags)
    train_tokenizer.main(**flags)
    finetune.main(data=uneven, **flags)

def lose_second_step(begun, out, uneven):
    """Take the second step while the last rank alone has a loss of NaN in it."""
    for script in NAMES:
        def spoiled(*args, losses=script.losses):
            result = losses(*args)
            sums = result if isinstance(result, dict) else result[0]
            if torch.is_grad_enabled() and common.rank() == common.world() - 1:
                sums["loss"] = sums["loss"] * torch.nan
            return result
        script.losses = spoiled
    take_second_step(begun, out, uneven)

def measure_together(out, toy):
    """Let a codebook follow, whitening measure, and scores be of, what every rank has its part of."""
    torch.manual_seed(0)
    codebook, everything = Codebook(16, 8), torch.randn(4, 120, 8)
    z = everything.chunk(common.world(), 1)[common.rank()]
    codebook.start_(z[0], per_step=120, centres=torch.arange(16))
    for step in z:
        codebook.update_(step, codebook(step)[1], torch.ones(len(step), dtype=torch.bool))
    mean, matrix = whitening(z.flatten(0, 1))
    heard = evaluate.over_recordings(data.Pack(toy), np.arange(80), lambda wav, lengths: wav[:, ::5000], CPU)
    if common.rank() == 0:
        measured = dict(mean=mean, precision=matrix @ matrix.T, heard=heard, **codebook.state_dict())
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

def on_ranks(out, begun, uneven, toy, ragged):
    """Do on each of several ranks, or on the only one, what the tests below look at."""
    common.setup("cpu")
    take_second_step(begun, out / "step", uneven, device_seconds=15.0 if common.world() > 1 else 0.0)
    measure_together(out, toy)
    if common.world() == 2:
        run_the_loop(out / "loop", f"{ragged}:0.5,{toy}:0.5", ragged)
        lose_second_step(begun, out / "lost", uneven)

@pytest.fixture(scope="module")
def ranks(begun, uneven, toy, ragged, tmp_path_factory):
    """A folder of what one rank wrote, in one part and in several, and what two wrote and printed."""
    out = tmp_path_factory.mktemp("ranks")
    packs = uneven, toy, ragged
    on_ranks(out / "1", begun, *packs)
    take_second_step(begun, out / "parts/step", uneven, device_seconds=6.0)
    (out / "printed.txt").write_text(start_ranks(2, out / "2", begun, *packs))
    return out

def start_ranks(world, *names):
    """Run this file as several ranks, as torchrun does, and return what the first printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=world)
    shared |= dict(OMP_NUM_THREADS=1, PYTHONPATH=ROOT)
    processes = []
    for rank in range(world):
        environment = {name: str(value) for name, value in dict(shared, RANK=rank, LOCAL_RANK=rank).items()}
        processes.append(subprocess.Popen([sys.executable, __file__, *map(str, names)], cwd=ROOT, text=True,
                                          env=os.environ | environment, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT))
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert not any(process.returncode for process in processes), "".join(printed)
    return printed[0]

def moments(path, order="exp_avg"):
    states = content(path)["optimizer"].values()
    return torch.cat([state[order].flatten() for state in states]).double()

def mean_loss(name, begun, uneven, teacher):
    """Return the loss of the second step of a script by its definition, and the model."""
    ckpt, sounds, pack = content(begun / f"{name}.pt"), data.Sounds(uneven, 0.0, 75.0), data.Pack(uneven)
    encoder = Encoder(EncoderConfig(**ckpt["encoder"]))
    made = {NAMES[train_mam]: lambda: MaskedAudioModel(encoder, 1024, 1, 32),
            NAMES[train_tokenizer]: lambda: SelfDistilledTokenizer(encoder, **ckpt["tokenizer"]),
            NAMES[finetune]: lambda: Classifier(encoder, pack.classes)}
    model = made[name]()
    model.load_state_dict(ckpt["model"])
    if name == NAMES[finetune]:
        clips = np.argsort(-pack.samples[:45], kind="stable")
        batch = data.to_device(data.Clips([pack])[[(clip, 0, 1, i) for i, clip in enumerate(clips)]], CPU)
        x, valid = patchify(encoder.normalise(fbank(batch["wav"]))), batch["valid"]
        logits = model(x, valid, random_mask(batch["noise"], valid, 0.6)[0])
        return F.cross_entropy(logits, pack.table[0][clips].float().argmax(1)), model

    batch = data.to_device(next(sounds.batches(ckpt["place"])), CPU)
    if name == NAMES[train_mam]:
        inputs, targets = train_mam.prepare(batch, encoder, load_tokenizer(begun / "tokenizer_iter1.pt"), 0.6)
        return F.cross_entropy(model(**inputs).mT, targets, ignore_index=-1), model
    cfg = train_tokenizer.Config(dtype="float32")
    inputs, target, _ = train_tokenizer.prepare(batch, model, load(teacher), cfg)
    predicted, commitment, _, _ = model(**inputs)
    loss = 1 - F.cosine_similarity(predicted, target, dim=-1) + 0.5 * commitment
    return loss[batch["valid"]].mean(), model

@pytest.mark.parametrize("name", NAMES.values())
def test_ranks_and_parts_give_the_gradient_of_one_of_the_mean_loss(name, begun, ranks, uneven, loop):
    """Parts on one rank, and on two, where gradients are added up over ranks after the last part."""
    def gradient(run):          # Adam's first moment: 0.9 times the one before + 0.1 times the gradient
        return 10 * moments(ranks / run / f"step/{name}.pt") - 9 * moments(begun / f"{name}.pt")
    one = gradient("1")
    assert one.norm() > 0
    for run in ("2", "parts"):
        assert (gradient(run) - one).norm() <= 2e-5 * one.norm(), run

    loss, model = mean_loss(name, begun, uneven, f"{loop[0]}/mam_iter1.pt")
    logged = [line["loss"] for line in log(ranks / f"1/step/{name}.jsonl") if "loss" in line]
    assert logged[-1] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert one.norm().item() == pytest.approx(norm.item(), rel=1e-3)

@pytest.mark.parametrize("name", NAMES.values())
def test_ranks_and_parts_log_what_one_does(name, begun, ranks):
    def logged(run, key):       # after the second step; what is measured by the clock aside
        lines = log(ranks / run / f"step/{name}.jsonl")[len(log(begun / f"{name}.jsonl")):]
        values = next((line for line in lines if key in line), {})
        return {name: values[name] for name in values.keys() - {"minutes", "x_realtime", "mfu"}}
    assert {"loss", "step"} <= logged("1", "loss").keys()
    for run in ("2", "parts"):
        assert logged(run, "loss") == pytest.approx(logged("1", "loss"), rel=1e-5)
    assert ("valid_loss" in logged("1", "valid_loss")) == (name != NAMES[finetune])
    for run in ("2", "parts"):
        assert logged(run, "valid_loss") == pytest.approx(logged("1", "valid_loss"), rel=1e-5)

def test_ranks_agree_on_codebook_statistics_and_scores(ranks):
    torch.testing.assert_close(content(ranks / "2/measured.pt"), content(ranks / "1/measured.pt"))

@pytest.mark.slow
def test_four_ranks_do_as_one(begun, ranks, uneven, toy, ragged):
    start_ranks(4, ranks / "4", begun, uneven, toy, ragged)
    torch.testing.assert_close(content(ranks / "4/measured.pt"), content(ranks / "1/measured.pt"))
    for name in NAMES.values():
        one, four = (moments(ranks / run / f"step/{name}.pt") for run in "14")
        assert (four - one).norm() <= 2e-5 * (one - 0.9 * moments(begun / f"{name}.pt")).norm()

@pytest.mark.parametrize("name", NAMES.values())
def test_a_nan_of_one_rank_leaves_the_step_out_on_all(name, begun, ranks):
    before, after = tensors_of(begun / f"{name}.pt"), tensors_of(ranks / f"2/lost/{name}.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert content(ranks / f"2/lost/{name}.pt")["step"] == 2
    assert sum(line.get("skipped", 0) for line in log(ranks / f"2/lost/{name}.jsonl")) == 1

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
    out, begun, *packs = sys.argv[1:]
    on_ranks(Path(out), Path(begun), *packs)
    common.leave()
