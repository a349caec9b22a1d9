"""The three training scripts: learning, resuming, several ranks, mistakes. Run as a user runs them, or main() in-process."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common
import finetune
import train_mam
import train_tokenizer
from common import UserError, lr_at, make_optimizer
from conftest import MICRO, ROOT
from model import CheckpointError, Encoder, load
from tokenizer import load_tokenizer

FAST = dict(model="micro", predictor_dim=32, predictor_heads=2, predictor_blocks=1, batch_seconds=20.0, warmup_steps=2, log_every=2,
            device="cpu")
TOKENIZER = dict(codes=64, code_dim=16, estimator_blocks=1, batch_seconds=20.0, warmup_steps=2, log_every=2, device="cpu")

def content(path):
    return torch.load(path, weights_only=True)

def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def log(path):
    return [json.loads(line) for line in open(path)]

@pytest.fixture(scope="module")
def loop(toy, tmp_path_factory):
    """The whole loop once: iteration 1, tokenizer 2, iteration 2."""
    out = str(tmp_path_factory.mktemp("out"))
    results = [train_mam.main(data=toy, out_dir=out, max_steps=60, lr=3e-3, **FAST),
               train_tokenizer.main(data=toy, out_dir=out, max_steps=40, lr=2e-3, **TOKENIZER),
               train_mam.main(data=toy, out_dir=out, iter=2, max_steps=6, **FAST)]
    return out, results

def test_the_loop_learns(loop):
    out, (first, tokenizer, second) = loop
    lines = log(f"{out}/mam_iter1.jsonl")
    assert first["valid_loss"] < lines[1]["loss"] - 0.2 and lines[-1]["step"] == 60
    assert {"loss", "accuracy", "lr", "x_realtime", "mfu"} <= lines[1].keys() and 0 < lines[1]["mfu"] < 1 and lines[0]["codes_used"] > 500
    assert tokenizer["valid_cosine"] > log(f"{out}/tokenizer_iter2.jsonl")[0]["cosine"] + 0.2 and tokenizer["valid_codes_used"] > 20
    assert second["step"] == 6 and np.isfinite(second["valid_loss"])
    assert content(f"{out}/mam_iter2.pt")["encoder"]["fbank_mean"] == content(f"{out}/mam_iter1.pt")["encoder"]["fbank_mean"] != 15.41663

def test_training_leaves_its_tokens_beside_the_pack(loop, toy):
    assert len([f for f in os.listdir(toy) if f.startswith("tokens-") and f.endswith(".bin")]) == 1

def test_a_classifier_teaches_its_logits(ragged, tmp_path):
    finetune.main(data=ragged, out_dir=str(tmp_path), model="micro", max_steps=4, fold="1", device="cpu", name="t")
    train_tokenizer.main(data=ragged, out_dir=str(tmp_path), iter=3, teacher=f"{tmp_path}/finetune_t_fold1.pt", max_steps=2,
                         **{**TOKENIZER, "codes": 16})
    assert content(tmp_path / "tokenizer_iter3.pt")["tokenizer"]["target_width"] == 2

def test_released_files_are_starts_teachers_and_tokenizers(golden, official, ragged, tmp_path):
    out = dict(data=ragged, out_dir=str(tmp_path), max_steps=2, device="cpu", batch_seconds=8.0)
    small = dict(predictor_dim=32, predictor_heads=2, predictor_blocks=1)
    train_mam.main(tokenizer=str(official("tokenizer")), init=str(official("encoder")), **small, **out)
    assert load(tmp_path / "mam_iter1.pt").cfg.dim == 64
    train_tokenizer.main(teacher=str(official("finetuned")), codes=16, code_dim=8, estimator_blocks=1, **out)
    finetune.main(init=str(official("encoder")), fold="1", **out)
    assert load(tmp_path / "finetune_ragged_fold1.pt").encoder.cfg.fbank_mean == 15.41663      # the encoder's own statistics stay

def test_one_clip_is_enough_to_start(tmp_path, write_wav):
    import data
    write_wav("one/a.wav", 0.1 * np.random.default_rng(0).standard_normal(64000))
    data.main(["folder", str(tmp_path / "one"), "--out", str(tmp_path / "pack")])
    result = train_mam.main(data=str(tmp_path / "pack"), out_dir=str(tmp_path), max_steps=2, **FAST)     # nothing to hold out
    assert np.isnan(result["valid_loss"]) and result["step"] == 2
    result = train_tokenizer.main(data=str(tmp_path / "pack"), out_dir=str(tmp_path), max_steps=2, **{**TOKENIZER, "codes": 8})
    assert result["step"] == 2

# ---- resuming

def resume_is_exact(main, name, tmp_path, **flags):
    main(out_dir=str(tmp_path / "whole"), max_steps=10, save_every=100, **flags)
    # the same run, interrupted after step 5 by a signal from outside
    started = []
    from common import Stop
    class StopAtFive(Stop):
        def now(self, step, device):
            if step == 5 and not started:
                started.append(step)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().now(step, device)
    import common
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Stop", StopAtFive)
        try:
            main(out_dir=str(tmp_path / "parts"), max_steps=10, save_every=100, **flags)
        except SystemExit:
            pass
    assert content(tmp_path / "parts" / name)["step"] == 5
    main(out_dir=str(tmp_path / "parts"), resume=True) if main is not finetune.main else main(out_dir=str(tmp_path / "parts"), resume=True, **flags)
    a, b = content(tmp_path / "whole" / name), content(tmp_path / "parts" / name)
    assert b["step"] == 10 and same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"]) and a["place"] == b["place"]

def test_resuming_continues_bit_for_bit(toy, loop, tmp_path):
    PRESET = dict(dropout=0.1, attention_dropout=0.1, layerdrop=0.2)        # also what is random in the model
    import dataclasses
    from model import PRESETS
    PRESETS["noisy"] = dataclasses.replace(MICRO, **PRESET)
    resume_is_exact(train_mam.main, "mam_iter1.pt", tmp_path / "mam", data=toy, **{**FAST, "model": "noisy"})
    resume_is_exact(train_tokenizer.main, "tokenizer_iter2.pt", tmp_path / "tok", data=toy, teacher=f"{loop[0]}/mam_iter1.pt", **TOKENIZER)
    resume_is_exact(finetune.main, "finetune_toy.pt", tmp_path / "ft", data=toy, model="noisy", batch_seconds=20.0, mixup=0.3, device="cpu",
                    test_split="test", log_every=2, dropout=0.1, layerdrop=0.2, spec_augment=0.2, balance="weights", best=True, valid_share=0.3, eval_every=2)

def test_a_new_run_keeps_the_old_result(toy, tmp_path, capsys):
    for seed in (1, 2):
        train_mam.main(data=toy, out_dir=str(tmp_path), max_steps=1, seed=seed, **FAST)
    assert content(tmp_path / "mam_iter1.1.pt")["config"]["seed"] == 1 and content(tmp_path / "mam_iter1.pt")["config"]["seed"] == 2
    assert "kept the earlier" in capsys.readouterr().out

def test_resuming_with_another_tokenizer_is_refused(toy, tmp_path):
    train_mam.main(data=toy, out_dir=str(tmp_path), max_steps=1, **FAST)
    tokenizer = content(tmp_path / "tokenizer_iter1.pt")
    tokenizer["model"]["codebook"][0] *= -1
    torch.save(tokenizer, tmp_path / "tokenizer_iter1.pt")
    with pytest.raises(UserError, match="is not the tokenizer that .* was trained with"):
        train_mam.main(out_dir=str(tmp_path), resume=True, max_steps=2)

@pytest.mark.parametrize("amx, avx512", [(False, False), (True, False), (False, True)])
def test_bfloat16_where_the_processor_is_fast_at_it(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    x = torch.ones(2, 2)
    with common.autocast(torch.device("cpu")):
        assert (x @ x).dtype == (torch.bfloat16 if amx or avx512 else torch.float32)
    with common.autocast(torch.device("cpu"), "float32"):
        assert (x @ x).dtype == torch.float32

def test_flags_typed_win_over_the_checkpoint(toy, tmp_path):
    train_mam.main(data=toy, out_dir=str(tmp_path), max_steps=1, **FAST)
    train_mam.main(out_dir=str(tmp_path), resume=True, max_steps=2, weight_decay=0.5, lr=7e-4)
    ckpt = content(tmp_path / "mam_iter1.pt")
    assert ckpt["config"]["predictor_dim"] == 32 and ckpt["config"]["lr"] == 7e-4
    assert sorted(g["weight_decay"] for g in ckpt["optimizer"]["param_groups"]) == [0.0, 0.5]

# ---- several ranks

def torchrun(ranks, script, *flags, timeout=240):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(ROOT / script),
                           *map(str, flags)], capture_output=True, text=True, timeout=timeout, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

def gradients(path):
    """After one step, Adam's first moment is (1 - beta1) times the (clipped) gradient."""
    state = content(path)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() / 0.1 for s in state.values()]).double()

def compare_gradients(tmp_path, script, name, flags, variants):
    """One step from the same start (a run of one step, to share what is drawn at the start) at several numbers of ranks."""
    import shutil
    flags = [*flags, "--dtype", "float32"]
    torchrun(1, script, *flags, "--max_steps", 1, "--out_dir", tmp_path / "start")
    first, found = gradients(tmp_path / "start" / f"{name}.pt"), {}
    for label, ranks, extra in variants:
        shutil.copytree(tmp_path / "start", tmp_path / label)
        torchrun(ranks, script, *flags, *extra, "--max_steps", 2, "--resume", "--out_dir", tmp_path / label)
        found[label] = gradients(tmp_path / label / f"{name}.pt") - 0.9 * first
    assert found["1"].norm() > 0
    for label, grad in found.items():
        assert (grad - found["1"]).abs().max() <= 1e-6 * max(1.0, found["1"].abs().max()), label
        assert (grad - found["1"]).norm() <= 2e-5 * found["1"].norm(), label

ONE, TWO, FOUR = ("1", 1, []), ("2", 2, []), ("4", 4, [])

def test_ranks_give_the_gradient_of_one_in_pretraining(toy, tmp_path):
    compare_gradients(tmp_path, "train_mam.py", "mam_iter1", ["--data", toy, "--clip", 1e9, "--batch_seconds", 21, "--predictor_dim", 32,
        "--predictor_heads", 2, "--predictor_blocks", 1], [ONE, TWO, FOUR, ("micro-steps", 1, ["--device_seconds", 6])])

def test_ranks_give_the_gradient_of_one_in_distillation(toy, loop, tmp_path):
    compare_gradients(tmp_path, "train_tokenizer.py", "tokenizer_iter2", ["--data", toy, "--clip", 1e9, "--batch_seconds", 21, "--teacher",
        f"{loop[0]}/mam_iter1.pt", "--codes", 32, "--code_dim", 8, "--estimator_blocks", 1], [ONE, TWO])

def test_ranks_give_the_gradient_of_one_in_fine_tuning(toy, loop, tmp_path):
    compare_gradients(tmp_path, "finetune.py", "finetune_toy", ["--data", toy, "--clip", 1e9, "--batch_seconds", 24, "--no-roll", "--init",
        f"{loop[0]}/mam_iter1.pt"], [ONE, TWO])

CODEBOOKS = """
import sys; sys.path.insert(0, {root!r}); sys.path.insert(0, {root!r} + "/tests")
import torch, torch.distributed as dist, common, conftest, train_tokenizer, tokenizer
seen, revived, update = [], [], tokenizer.Codebook.update_
def spy(self, *args):
    result = update(self, *args); revived.append(int(result)); seen.append(torch.cat([self.weight.flatten(), self.cluster_size])); return result
tokenizer.Codebook.update_ = spy
train_tokenizer.main(data={toy!r}, out_dir={out!r}, teacher={teacher!r}, max_steps=8, codes=64, code_dim=16, estimator_blocks=1,
                     batch_seconds=20.0, revive=0.95, warmup_steps=1, device="cpu")
assert sum(revived) > 0, "no code was revived"
for mine in seen:
    first = mine.clone(); dist.broadcast(first, 0); assert torch.equal(mine, first)
assert not torch.equal(seen[0], seen[-1])
open({out!r} + f"/equal{{dist.get_rank()}}", "w").write(str(len(seen)))
dist.barrier(); common.leave()
"""

def test_codebooks_are_equal_on_all_ranks(toy, loop, tmp_path):
    (tmp_path / "spy.py").write_text(CODEBOOKS.format(root=str(ROOT), toy=toy, out=str(tmp_path), teacher=f"{loop[0]}/mam_iter1.pt"))
    torchrun(2, tmp_path / "spy.py")
    assert [(tmp_path / f"equal{rank}").read_text() for rank in (0, 1)] == ["8", "8"]

THREADS = """
import sys; sys.path.insert(0, {root!r})
import os, common, train_mam
train_mam.main(data={toy!r}, out_dir={out!r}, max_steps=1, batch_seconds=8.0, device="cpu")
threads = lambda: [name for t in os.listdir("/proc/self/task") if "gloo" in (name := open(f"/proc/self/task/{{t}}/comm").read())]
assert threads()
common.leave()
assert not threads(), threads()
"""

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_group_outlives_it(toy, tmp_path):
    """One that did aborted a rank, now and then, after its last step."""
    (tmp_path / "threads.py").write_text(THREADS.format(root=str(ROOT), toy=toy, out=str(tmp_path)))
    torchrun(2, tmp_path / "threads.py")

def test_two_ranks_run_the_loop(ragged, toy, tmp_path):
    out = ["--out_dir", tmp_path, "--max_steps", 4, "--batch_seconds", 8, "--log_every", 2, "--data"]
    small = ["--predictor_dim", 32, "--predictor_heads", 2, "--predictor_blocks", 1]
    first = torchrun(2, "train_mam.py", *out, f"{ragged}:0.5,{toy}:0.5", *small)
    assert first.count("step 4 ") == 2 and "on 2 x cpu" in first       # one rank prints: training and validation
    torchrun(2, "train_tokenizer.py", *out, ragged, "--codes", 32, "--code_dim", 8)
    torchrun(2, "train_mam.py", *out, ragged, *small, "--iter", 2)
    two = torchrun(2, "finetune.py", *out, ragged, "--init", tmp_path / "mam_iter2.pt", "--eval_every", 2)
    assert "over 3 folds" in two

@pytest.mark.slow
def test_two_nodes_run_as_one(toy, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", f"127.0.0.1:{port}", "train_mam.py", "--data", toy, "--out_dir", str(tmp_path), "--max_steps", "3",
               "--batch_seconds", "8", "--device", "cpu", "--log_every", "1"]
    nodes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
             for _ in range(2)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "".join(said)
    assert sum("on 2 x cpu" in text for text in said) == 1 and (tmp_path / "mam_iter1.pt").exists()     # one rank of the two prints and saves

def test_files_of_another_version_are_explained(toy, loop, tmp_path):
    for name, main in (("mam_iter1", train_mam.main), ("tokenizer_iter2", train_tokenizer.main)):
        ckpt = content(f"{loop[0]}/{name}.pt")
        ckpt["config"]["old_flag"] = 1
        torch.save(ckpt, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match="begun by another version of this script .--old_flag."):
            main(out_dir=str(tmp_path), resume=True)
    del ckpt["model"]["target_map"]
    torch.save(ckpt, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="old.pt: not as this version writes tokenizers: .*target_map"):
        load_tokenizer(tmp_path / "old.pt")

@pytest.mark.slow
def test_ranks_agree_on_the_statistics_of_the_targets(toy, loop, tmp_path):
    found = {}
    for ranks in (1, 2):
        torchrun(ranks, "train_tokenizer.py", "--data", toy, "--out_dir", tmp_path / str(ranks), "--teacher", f"{loop[0]}/mam_iter1.pt", "--device", "cpu", "--targets",
                 "whiten", "--max_steps", 1, "--codes", 32, "--code_dim", 8, "--estimator_blocks", 1, "--batch_seconds", 20)
        found[ranks] = content(tmp_path / str(ranks) / "tokenizer_iter2.pt")["model"]
    assert torch.allclose(found[1]["target_mean"], found[2]["target_mean"], atol=1e-5)
    products = [found[n]["target_map"] @ found[n]["target_map"].T for n in (1, 2)]      # of eigenvectors the sign is free
    assert torch.allclose(*products, rtol=1e-2, atol=1e-2 * products[0].abs().max())

def test_resuming_on_other_sounds_is_refused(toy, ragged, tmp_path):
    train_mam.main(data=toy, out_dir=str(tmp_path), max_steps=1, **FAST)
    with pytest.raises(UserError, match="begun on other sounds"):
        train_mam.main(data=ragged, out_dir=str(tmp_path), resume=True)

# ---- the command line

def run(script, *flags, cwd=None):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True, cwd=cwd, timeout=120)

@pytest.mark.parametrize("script, flags, message", [
    ("train_mam.py", ["--itre", "2"], "unrecognized arguments: --itre"), ("train_mam.py", ["--model", "huge"], "invalid choice: 'huge'"),
    ("train_mam.py", ["--data", "nowhere"], "error: nowhere is not a pack"), ("train_mam.py", ["--resume"], "error: out/mam_iter1.pt: no such checkpoint"),
    ("train_tokenizer.py", [], "make it with: python train_mam.py --iter 1"), ("finetune.py", [], "--data PACK is missing"),
    ("train_mam.py", ["--save_every", "0"], "--save_every 0: has to be above 0"), ("train_mam.py", ["--seed", "-1"], "seeds are not negative"),
    ("tokenizer.py", ["nowhere.pt", "--data", "x"], "error: nowhere.pt: no such checkpoint"), ("data.py", ["folder", "nowhere", "--out", "x"], "no such folder")])
def test_mistakes_are_explained_in_one_line(script, flags, message, tmp_path):
    done = run(script, *flags, cwd=tmp_path)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr

def test_a_missing_tokenizer_is_explained(toy, tmp_path):
    with pytest.raises(UserError, match="tokenizer_iter2.pt: no such tokenizer; make it with: python train_tokenizer.py --iter 2 --data"):
        train_mam.main(data=toy, out_dir=str(tmp_path), iter=2, **FAST)

@pytest.mark.parametrize("script", ["train_mam.py", "train_tokenizer.py", "finetune.py"])
def test_help_lists_every_flag_with_its_default(script):
    import importlib
    module = importlib.import_module(script[:-3])
    text = " ".join(run(script, "--help").stdout.split())
    for name, field in module.Config.__dataclass_fields__.items():
        assert f"--{name}" in text and f"[{field.default!r}]" in text
    assert run(script, "--help").stdout.count("\n  --") == len(module.Config.__dataclass_fields__)

@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_saves_and_says_so(toy, tmp_path, workers):
    process = subprocess.Popen([sys.executable, ROOT / "train_mam.py", "--data", toy, "--out_dir", tmp_path, "--max_steps", "100000", "--log_every", "1",
                                "--batch_seconds", "8", "--workers", str(workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 2 "):
            os.killpg(process.pid, signal.SIGTERM)      # as torchrun and a terminal do: to the data workers, too
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "go on with --resume" in rest, error
    assert content(tmp_path / "mam_iter1.pt")["step"] >= 2 and not list(tmp_path.glob("*.partial"))

# ---- small pieces

def test_learning_rates():
    assert [lr_at(s, 1.0, 4, 10) for s in (0, 3, 4, 7, 10)] == [0.25, 1.0, 1.0, 0.5, 0.0]
    assert lr_at(7, 1.0, 4, 10, "cosine") == pytest.approx(0.5) and lr_at(4, 1.0, 4, 10, "cosine") == 1.0

def test_minutes_count_from_the_start_of_the_command(tmp_path, monkeypatch):
    """Also in a log that is opened later, as for the scores of each fold."""
    monkeypatch.setattr(common, "STARTED", time.time() - 90)
    common.Log(tmp_path / "x.jsonl")(step=1)
    assert json.loads((tmp_path / "x.jsonl").read_text())["minutes"] == pytest.approx(1.5, abs=0.01)

def test_weight_decay_is_for_matrices_only():
    encoder = Encoder(MICRO)
    names = {id(p): name for name, p in encoder.named_parameters()}
    groups = make_optimizer(encoder, 1.0, 0.1).param_groups
    found = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert len(found) == len(names) == sum(len(g["params"]) for g in groups)
    for name, decay in found.items():
        matrix = name.endswith(("weight", "weight_v")) and "ln" not in name
        assert decay == (0.1 if matrix else 0.0), name
