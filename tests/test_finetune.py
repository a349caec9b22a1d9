"""Fine-tuning, probes, ensembles and the scores they are judged by."""
import csv
import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import finetune
from common import UserError, make_optimizer
from conftest import MICRO, ROOT
from model import Classifier, Encoder, fbank, load, num_tokens, patchify, random_mask

FAST = dict(model="micro", batch_seconds=8.0, warmup_steps=2, device="cpu")

def save_classifier(encoder, path, labels, seed, multilabel=False):
    """A file as finetune.py writes it, with a random head."""
    torch.manual_seed(seed)
    model = Classifier(encoder, labels, multilabel)
    torch.nn.init.normal_(model.head.weight)
    torch.save(dict(kind="classifier", encoder=dataclasses.asdict(encoder.cfg), labels=labels, multilabel=multilabel,
                    model=model.state_dict()), path)
    return str(path)

def log(path):
    return [json.loads(line) for line in open(path)]

@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """30 clips of 0.3 to 1.2 s with one or two labels of three, one more class that never occurs; train, valid, test."""
    path = tmp_path_factory.mktemp("packs") / "tagged"
    labels = [["a"], ["b"], ["a", "b"], ["c"], ["a", "c"]]
    rows = [dict(path=f"clip{i}.wav", labels=labels[i % 5], split=("train", "valid", "test")[i // 10], group="", n=4800 + i * 480)
            for i in range(30)]
    tone = lambda row: sum(0.2 * np.sin(np.arange(row["n"]) * dict(a=0.05, b=0.3, c=1.0)[name])
                           for name in row["labels"]).astype(np.float32)
    data.write_pack(path, rows, tone, classes=["a", "b", "c", "never"])
    return str(path)

# ---- recipes

TABLE_4 = """
steps            | 50000 | 80000 | 80000 | 80000 | 80000 | 80000
warm-up          | 5000 | 8000 | 8000 | 8000 | 8000 | 8000
batch, seconds   | 6400 | 800 | 300 | 100 | 100 | 300
layer-wise decay | 0.6 | 0.3 | 0.2 | 0.3 | 0.3 | 1.0
peak lr          | 1e-4 | 3e-5 | 3e-5 | 1e-4 | 1e-4 | 3e-5
weighted         | weights | none | none | unknown | none | none
dropout          | 0 | 0 | 0 | 0 | 0 | 0
layer dropout    | 0.1 | 0.1 | 0.1 | 0.1 | 0.1 | 0.1
roll             | True | True | True | False | False | True
SpecAug          | 0.3 | 0.3 | 0.2 | 0.3 | 0.3 | 0.15
mixup            | 0.8 | 0.8 | 0 | 0.8 | 0.8 | 0
loss             | bce | bce | ce | bce | bce | ce
mean             | 15.41663 | 15.41663 | 11.72215 | 11.43905 | 11.41045 | 12.0889
std              | 6.55582 | 6.55582 | 10.60431 | 5.64913 | 5.67857 | 4.29147
weight decay     | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 0.01"""
FIELDS = ("max_steps warmup_steps batch_seconds grad_decay lr balance dropout layerdrop roll spec_augment mixup loss "
          "fbank_mean fbank_std weight_decay").split()

def test_presets_are_table_4():
    rows = [line.split("|")[1:] for line in TABLE_4.strip().splitlines()]
    for i, task in enumerate("as2m as20k esc50 ks1 ks2 er".split()):
        for field, row in zip(FIELDS, rows):
            found, due = finetune.TASKS[task][field], row[i].strip()
            assert str(found) == due or float(found) == float(due), (task, field)
        finetune.Config(**finetune.TASKS[task])         # names that exist
    assert finetune.TASKS["custom"] == {}

def test_defaults_then_preset_then_checkpoint_then_flags(ragged, tmp_path, random_encoder):
    torch.save(dict(kind="mam", encoder=dataclasses.asdict(MICRO),
                    model={"encoder." + k: v for k, v in random_encoder.state_dict().items()}), tmp_path / "e.pt")
    flags = dict(data=ragged, out_dir=str(tmp_path), fold="1", device="cpu", init=str(tmp_path / "e.pt"))
    finetune.main(task="ks2", max_steps=1, mixup=0.1, **flags)
    first = torch.load(tmp_path / "finetune_ragged_fold1.pt", weights_only=True)
    assert (first["config"]["lr"], first["config"]["mixup"], first["config"]["smoothing"]) == (1e-4, 0.1, 0.0)
    assert ((first["encoder"]["fbank_mean"], first["encoder"]["grad_decay"], first["encoder"]["layerdrop"]) == (11.41045, 0.3, 0.1)
            and first["multilabel"])
    finetune.main(resume=True, max_steps=2, lr=7e-4, **flags)
    config = torch.load(tmp_path / "finetune_ragged_fold1.pt", weights_only=True)["config"]
    assert (config["task"], config["lr"], config["mixup"], config["weight_decay"]) == ("ks2", 7e-4, 0.1, 0.01)
    with pytest.raises(UserError, match="was begun with --task ks2"):
        finetune.main(task="er", resume=True, **flags)
    # the encoder's own statistics: without a preset, or where typed
    for extra in (dict(), dict(task="esc50", fbank_std=0.0)):
        finetune.main(max_steps=1, **extra, **flags)
        assert load(tmp_path / "finetune_ragged_fold1.pt").encoder.cfg.fbank_mean == MICRO.fbank_mean

def test_fine_tuning_learns_and_finished_folds_are_kept(ragged, tmp_path):
    flags = dict(data=ragged, out_dir=str(tmp_path), max_steps=30, eval_every=30, lr=3e-3, **FAST)
    scores = finetune.main(**flags)
    assert scores.keys() == {"1", "2", "3"} and min(scores.values()) == 1.0         # two tones apart
    classifier = load(tmp_path / "finetune_ragged_fold2.pt")
    assert classifier.labels == ["a", "b"] and not classifier.multilabel
    before = os.path.getmtime(tmp_path / "finetune_ragged_fold1.pt")
    assert finetune.main(resume=True, **flags) == scores and os.path.getmtime(tmp_path / "finetune_ragged_fold1.pt") == before

def test_micro_batches_do_not_change_what_is_learned(ragged, tmp_path):
    flags = dict(data=ragged, out_dir=str(tmp_path), fold="1", max_steps=2, roll=True, mixup=0.5, spec_augment=0.3,
                 dtype="float32", **FAST)
    for name, seconds in (("whole", 0.0), ("parts", 3.0)):
        finetune.main(name=name, device_seconds=seconds, **flags)
    a, b = (load(tmp_path / f"finetune_{name}_fold1.pt").state_dict() for name in ("whole", "parts"))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5

def test_the_best_on_valid_is_chosen_there_and_tested_once(tagged, tmp_path, monkeypatch):
    """Scores on valid are dictated; the middle evaluation has to be the one that is tested."""
    dictated, seen = iter([0.2, 0.9, 0.9, 0.3]), []
    monkeypatch.setattr(finetune, "score", lambda scores, targets, several: next(dictated))
    monkeypatch.setattr(finetune, "report", lambda stem, pack, test, scores, targets, text="": seen.append(scores) or dict(mAP=0.0))
    flags = dict(data=tagged, out_dir=str(tmp_path), max_steps=8, eval_every=2, lr=1e-2, **FAST)
    finetune.main(best=True, **flags)
    chosen, last = (load(tmp_path / f"finetune_tagged{end}.pt") for end in ("_best", ""))
    assert torch.load(tmp_path / "finetune_tagged_best.pt", weights_only=True)["step"] == 4
    pack = data.Pack(tagged)
    of = lambda model: finetune.probabilities(model, pack, np.arange(20, 30), finetune.Config(), torch.device("cpu"))
    assert len(seen) == 1 and torch.equal(seen[0], of(chosen)) and not torch.equal(seen[0], of(last))
    keys = set().union(*(line.keys() for line in log(tmp_path / "finetune_tagged.jsonl")))
    assert "valid_score" in keys and "test_score" not in keys

def test_choosing_on_test_clips_is_refused(ragged, tmp_path):
    with pytest.raises(UserError, match="--best chooses on a valid split.* add --valid_share 0.2"):
        finetune.main(data=ragged, out_dir=str(tmp_path), best=True, **FAST)
    splits, _ = finetune.splits_of(data.Pack(ragged), valid_share=0.25)
    for train, valid, test in splits.values():
        assert len(valid) == 4 and len(test) == 8 and sorted([*train, *valid, *test]) == list(range(24))
    assert finetune.main(data=ragged, out_dir=str(tmp_path), best=True, valid_share=0.25, fold="1", max_steps=2, eval_every=1, **FAST)

def test_packs_that_cannot_be_fine_tuned_on(toy, tmp_path, ragged):
    data.write_pack(tmp_path / "plain", [dict(path=str(i), labels=[], split="", group="") for i in range(3)],
                    lambda row: np.ones(4000, np.float32) * 0.1)
    for pack, flags, message in ((tmp_path / "plain", {}, "has no labels"), (ragged, dict(fold="7"), "has the folds 1, 2, 3, not 7"),
                                 (toy, dict(test_split="later"), "training needs train and test"),
                                 (toy, dict(task="esc"), "--task esc: choose one of custom, as2m"),
                                 (toy, dict(balance="unknown", max_steps=1), "needs a class named unknown"),
                                 (toy, dict(init="scratch,scratch"), "can be probed: --probe mlp"),
                                 (toy, dict(init="nowhere:f", probe="knn"), "No module named 'nowhere'"),
                                 (toy, dict(init="math:f", probe="knn"), "a function in it"),
                                 (toy, dict(probe="linear,svm"), "choose of linear, mlp, knn"),
                                 (toy, dict(patchout=60.0), "a share, from 0 to below 1"),
                                 (toy, dict(loss="bce", smoothing=0.1), "--smoothing is for --loss ce"),
                                 (ragged, dict(ensemble="a.pt"), "write {fold} in their names"),
                                 (toy, dict(probe="knn", layers="all", init="scratch,scratch"), "single encoder of ours")):
        with pytest.raises(UserError, match=message):
            finetune.main(data=str(pack), device="cpu", out_dir=str(tmp_path), **flags)

# ---- augmentation and sampling, against their definitions

def test_roll_and_mixup():
    wav, lengths = torch.arange(1.0, 11).repeat(4, 1), torch.tensor([10, 6, 10, 3])
    wav = wav * (torch.arange(10) < lengths[:, None])
    batch, targets = dict(wav=wav, lengths=lengths), torch.eye(4)
    rolled, _, same_targets = finetune.augment(batch, targets, finetune.Config(roll=True), torch.Generator().manual_seed(0))
    for before, after, n in zip(wav, rolled, lengths):
        assert any(torch.equal(after[:n], before[:n].roll(k)) for k in range(n)) and not after[n:].any()
    assert torch.equal(targets, same_targets) and not torch.equal(rolled, wav)
    mixed, longest, shares = finetune.augment(batch, targets, finetune.Config(roll=False, mixup=0.8), torch.Generator().manual_seed(1))
    assert torch.allclose(mixed, shares @ wav, atol=1e-5) and torch.allclose(shares.sum(1), torch.ones(4))
    assert all(longest[i] == max(lengths[j] for j in range(4) if shares[i, j] > 0) for i in range(4))

def test_mixup_shares_are_beta_distributed_and_shifts_uniform():
    B, a = 20000, 0.8
    batch = dict(wav=torch.arange(8.0).repeat(B, 1), lengths=torch.full((B,), 8))
    index = torch.arange(B, dtype=torch.float64)[:, None]
    _, _, mixed = finetune.augment(batch, torch.cat([index, index**2], 1), finetune.Config(roll=False, mixup=a),
                                   torch.Generator().manual_seed(0))
    m, s, i = mixed[:, 0], mixed[:, 1], index[:, 0]             # m = w i + (1 - w) j, s = w i^2 + (1 - w) j^2: solve for w
    j = (s - m * i) / (m - i)
    w = ((m - j) / (i - j))[(i - m).abs() > 1]
    assert abs(w.mean() - 0.5) < 0.01 and abs(w.var() - 1 / (4 * (2 * a + 1))) < 0.004        # Beta(a, a)
    rolled = finetune.augment(batch, index, finetune.Config(roll=True), torch.Generator().manual_seed(0))[0]
    assert (torch.bincount(rolled[:, 0].long(), minlength=8) / B - 1 / 8).abs().max() < 0.01

def test_spec_augment_is_its_definition():
    x, frames, share = torch.randn(300, 60, 128) + 5, torch.randint(17, 61, (300,)), 0.3
    chance = torch.rand(300, 2, 2, generator=torch.Generator().manual_seed(0))
    found, widths = finetune.spec_augment(x, frames, share, chance), []
    for b in range(300):
        due = x[b].clone()
        for axis, size in ((0, int(frames[b])), (1, 128)):
            width = math.floor(chance[b, axis, 0] * round(share * size))
            start = math.floor(chance[b, axis, 1] * (size - width + 1))
            assert 0 <= start <= size - width
            (due[start:start + width] if axis == 0 else due[:, start:start + width]).zero_()
        widths.append(width)
        assert torch.equal(found[b], due)
    assert set(widths) == set(range(38))        # round(0.3 * 128) = 38: bins 0 .. 37, as torchaudio's FrequencyMasking(38)

def test_training_masks_normalised_features_of_each_clip_on_its_own(toy, tmp_path, monkeypatch):
    seen, original = [], finetune.patchify
    monkeypatch.setattr(finetune, "patchify", lambda x: seen.append(x) or original(x))
    finetune.main(data=toy, out_dir=str(tmp_path), spec_augment=0.5, max_steps=1, **{**FAST, "batch_seconds": 30.0})
    bins = [tuple((x == 0).all(0).nonzero().flatten().tolist()) for x in seen[0]]
    times = [tuple((x == 0).all(1).nonzero().flatten().tolist()) for x in seen[0]]
    assert len(bins) == 10 and len(set(bins)) > 7 and len(set(times)) > 7           # one mask for the whole batch would be one
    for x, bins, times in zip(seen[0], bins, times):
        assert (x == 0).sum() == len(bins) * len(x) + len(times) * 128 - len(bins) * len(times)
        assert all(b - a == 1 for mask in (bins, times) for a, b in zip(mask, mask[1:]))

def test_patchout_leaves_out_patches_in_training_only(toy, tmp_path, monkeypatch):
    seen, forward = [], Encoder.forward
    def spy(self, patches, valid=None, keep=None, **options):
        seen.append((self.training, None if keep is None else keep.shape[1] / patches.shape[1]))
        return forward(self, patches, valid, keep, **options)
    monkeypatch.setattr(Encoder, "forward", spy)
    finetune.main(data=toy, out_dir=str(tmp_path), max_steps=2, patchout=0.75, **FAST)
    assert ({share for training, share in seen if training} == {36 / 144}
            and [share for training, share in seen if not training][1:]         # the first counts the arithmetic of a step
            == [None] * (sum(not training for training, _ in seen) - 1))
    assert all(0 < line["mfu"] < 1.5 for line in log(tmp_path / "finetune_toy.jsonl") if "mfu" in line)

def test_a_classifier_of_some_patches_averages_those(random_encoder):
    torch.manual_seed(0)
    model = Classifier(random_encoder, ["a", "b", "c"]).eval()
    patches, valid = torch.randn(2, 48, 256), torch.arange(48) < torch.tensor([[48], [24]])
    keep = random_mask(torch.rand(2, 48), valid, 0.5)[0]
    tokens = model.head(random_encoder(patches, valid, keep))
    expect = torch.stack([tokens[0].mean(0), tokens[1, :12].mean(0)])
    assert torch.allclose(model(patches, valid, keep), expect, atol=1e-6)
    everything = torch.arange(48).expand(2, 48)
    assert torch.allclose(model(patches, None, everything), model(patches), atol=1e-5)

def test_weighted_sampling():
    """Expected draws: AST's weights, the sum over a clip's classes of 1000 / (count + 0.01), with replacement."""
    labels = [[0]] * 60 + [[1]] * 20 + [[0, 2]] * 5 + [[]] * 2
    targets, train = torch.zeros(100, 3, dtype=torch.bool), np.arange(10, 97)
    for i, row in zip(train, labels):
        targets[i, row] = True
    count = [65, 20, 5]
    due = np.array([sum(1000 / (count[c] + 0.01) for c in row) for row in labels])
    drawn = [finetune.draw(train, targets, "abc", "weights", (3, epoch)) for epoch in range(3000)]
    assert all(len(d) == 87 for d in drawn) and len(set(drawn[0])) < 87
    found = np.bincount(np.concatenate(drawn), minlength=100)[10:97] / 3000 / 87
    assert np.abs(found - due / due.sum()).max() < 5 * math.sqrt(0.05 / 3000 / 87)
    assert np.array_equal(drawn[7], finetune.draw(train, targets, "abc", "weights", (3, 7))) and not np.array_equal(drawn[7], drawn[8])
    assert not np.array_equal(drawn[7], finetune.draw(train, targets, "abc", "weights", (4, 7)))
    batches = data.epoch_batches(np.full(100, 16000), 160000, (3, 7), [drawn[7]])
    assert sorted(np.concatenate(batches)) == sorted(drawn[7])          # repeats stay repeats

def test_keyword_epochs_are_balanced():
    """Footnote of Table 4: each class is balanced to half the size of the unknown class, for every epoch."""
    sizes = dict(yes=7, _silence_=3, _unknown_=41, no=30)
    targets = torch.zeros(sum(sizes.values()), 4, dtype=torch.bool)
    label = np.repeat(np.arange(4), list(sizes.values()))
    targets[np.arange(len(label)), label] = True
    drawn = finetune.draw(np.arange(len(label)), targets, list(sizes), "unknown", (0, 0))
    times = np.bincount(drawn, minlength=len(label))
    for c, (name, n) in enumerate(sizes.items()):
        of = times[label == c]
        assert set(of) == {1} if name == "_unknown_" else of.sum() == 20 and of.max() - of.min() <= 1
    assert sorted(drawn) != sorted(finetune.draw(np.arange(len(label)), targets, list(sizes), "unknown", (0, 1)))

def test_training_draws_what_the_balance_says(tagged, tmp_path, monkeypatch):
    asked, original = [], data.epoch_batches
    monkeypatch.setattr(data, "epoch_batches", lambda samples, size, key, subsets=None, **more: (
        asked.append((key, subsets[0])) or original(samples, size, key, subsets, **more)))
    finetune.main(data=tagged, out_dir=str(tmp_path), balance="weights", max_steps=2, seed=5, **FAST)
    key, drawn = next((key, clips) for key, clips in asked if len(key) == 2)
    targets = finetune.splits_of(data.Pack(tagged))[1]
    assert np.array_equal(drawn, finetune.draw(np.arange(10), targets, "abcd", "weights", key)) and len(set(drawn)) < 10

def test_layer_wise_learning_rates_are_beit_s():
    model, cfg = Classifier(Encoder(MICRO), ["a"]), finetune.Config(lr_decay=0.5, head_lr=3.0)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 8.0, 0.1, times=lambda name: finetune.lr_times(name, 2, cfg))
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    due = {"head": 24.0, "encoder.blocks.1.": 4.0, "encoder.blocks.0.": 2.0, "encoder.": 1.0}
    assert len(found) == len(names) and {(g["betas"], g["eps"]) for g in optimizer.param_groups} == {((0.9, 0.98), 1e-8)}
    for name, lr in found.items():
        assert lr == next(value for start, value in due.items() if name.startswith(start)), name

def test_gradients_shrink_towards_the_input(random_encoder):
    """The released layer-wise decay: block i of L gets its gradient times r^(L - 1 - i), what is before them r^L."""
    grads = {}
    for r in (1.0, 0.5):
        random_encoder.cfg = dataclasses.replace(MICRO, grad_decay=r)
        random_encoder.position_bias.table.requires_grad_(False)        # goes around the blocks, unscaled, as in the released code
        random_encoder.zero_grad()
        torch.manual_seed(0)
        random_encoder(torch.randn(2, 24, 256)).square().sum().backward()
        grads[r] = {name: p.grad.clone() for name, p in random_encoder.named_parameters() if p.grad is not None}
    for name, grad in grads[1.0].items():
        times = 1.0 if name.startswith("blocks.1") else 0.5 if name.startswith("blocks.0") else 0.25
        assert torch.allclose(grads[0.5][name], times * grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max())), name

# ---- scores

def naive(scores, truth):
    """Average precision by thresholds, AUC by pairs."""
    expect, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        new = truth[chosen].sum() / truth.sum()
        expect, recall = expect + (new - recall) * truth[chosen].mean(), new
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[truth == 1] for n in scores[truth == 0]]
    return expect, np.mean(pairs)

def test_average_precision_and_auc_equal_their_definitions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, truth = rng.integers(0, 6, 20), rng.integers(0, 2, 20)
        truth[:2] = 0, 1
        assert finetune.ranking(scores, truth) == pytest.approx(naive(scores, truth), abs=1e-12)
    assert np.isnan(finetune.ranking(scores, truth * 0)).all()
    targets = torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 0, 0]])          # no positive of the third class: left out
    assert finetune.score(torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.8, 0.2], [0.8, 0.1, 0.1]]), targets, multilabel=True) == 1.0

def test_scores_equal_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    scores, truth = torch.from_numpy(rng.integers(0, 30, (200, 12)) / 30), torch.from_numpy(rng.integers(0, 4, (200, 12)) == 0)
    assert finetune.score(scores, truth, True) == pytest.approx(
        metrics.average_precision_score(truth, scores, average="macro"), abs=1e-12)
    assert np.mean([finetune.ranking(s, t)[1] for s, t in zip(scores.numpy().T, truth.numpy().T)]) == pytest.approx(
        metrics.roc_auc_score(truth, scores, average="macro"), abs=1e-12)

def test_the_files_of_a_run_give_its_scores(tagged, tmp_path, capsys):
    value = finetune.main(data=tagged, out_dir=str(tmp_path), max_steps=20, lr=3e-3, **FAST)[""]
    assert f"mAP {100 * value:.1f} %" in capsys.readouterr().out
    found = np.load(tmp_path / "finetune_tagged.npz")
    assert list(found["paths"]) == [f"clip{i}.wav" for i in range(20, 30)] and list(found["classes"]) == ["a", "b", "c", "never"]
    assert found["targets"].tolist()[:3] == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]
    naives = [naive(s, t) for s, t in zip(found["scores"].T[:3], found["targets"].T[:3])]
    assert value == pytest.approx(np.mean([ap for ap, _ in naives]), abs=1e-12)
    last = log(tmp_path / "finetune_tagged.jsonl")[-1]
    assert (last["mAP"], last["classes_scored"], last["classes"], last["clips"]) == (value, 3, 4, 10) and "accuracy" not in last
    area = np.mean([auc for _, auc in naives])
    # AUC = Phi(d' / sqrt 2)
    assert last["d_prime"] == math.inf if area == 1 else math.erf(last["d_prime"] / 2) == pytest.approx(2 * area - 1, abs=1e-9)
    rows = list(csv.DictReader(open(tmp_path / "finetune_tagged.csv")))
    assert [row["class"] for row in rows] == ["a", "b", "c", "never"] and [row["clips"] for row in rows] == ["6", "4", "4", "0"]
    assert [float(row["average_precision"]) for row in rows[:3]] == pytest.approx([ap for ap, _ in naives]) and rows[3]["auc"] == "nan"

# ---- frozen probes

def test_frozen_probes(ragged, tmp_path, capsys):
    flags = dict(data=ragged, out_dir=str(tmp_path), model="micro", device="cpu")
    for extra in (dict(freeze=True), dict(probe="linear", layers="all"), dict(probe="mlp"), dict(probe="knn"), dict(probe="knn_xares")):
        scores = finetune.main(**flags, **extra)        # (10 epochs of 16 clips teach a mlp nothing)
        assert scores.keys() == {"1", "2", "3"} and (min(scores.values()) > 0.8 or extra["probe"] == "mlp"), extra
        printed = capsys.readouterr().out
        assert "% over 3 folds" in printed and ("epochs chosen on the test clips" in printed) == (extra.get("probe") == "mlp")
    together = finetune.main(probe="linear,knn", **flags)
    assert together == dict(linear=finetune.main(probe="linear", **flags), knn=finetune.main(probe="knn", **flags))
    assert np.load(tmp_path / "knn_ragged_fold2.npz")["scores"].shape == (8, 2) and (tmp_path / "linear_ragged_fold1.1.npz").exists()

def test_nearest_neighbours_are_x_ares_s():
    rng = np.random.default_rng(0)
    x, y, t = rng.standard_normal((40, 6)), np.eye(5)[rng.integers(0, 5, 40)], rng.standard_normal((300, 6))
    found = finetune.knn_probe(*map(torch.from_numpy, (x, y, t)))
    for i in range(0, 300, 7):
        cosine = np.array([a @ t[i] / np.linalg.norm(a) / np.linalg.norm(t[i]) for a in x])
        near = np.argsort(-cosine)[:10]
        weight = np.exp(cosine[near] / 0.07)
        assert np.allclose(found[i], sum(w * y[n] for w, n in zip(weight / weight.sum(), near)))
    trainer = pytest.importorskip("xares.trainer")
    theirs = trainer.KNN(torch.from_numpy(x), torch.from_numpy(y).argmax(1), num_classes=5)(torch.from_numpy(t))
    assert (torch.allclose(finetune.knn_probe(*map(torch.from_numpy, (x, y, t)), xares=True), theirs)
            and not torch.allclose(found, theirs))

def test_the_mlp_track_learns():
    centres, y = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)), torch.arange(1200) % 5
    x = centres[y] + 0.3 * torch.randn(1200, 20, generator=torch.Generator().manual_seed(1))
    y = F.one_hot(y).bool()
    for several in (False, True):
        found = finetune.mlp_probe(x[:800], y[:800], x[800:1000], y[800:1000], x[1000:], several)
        assert finetune.score(found, y[1000:], several) > (0.8 if several else 0.98)
    assert torch.equal(found, finetune.mlp_probe(x[:800], y[:800], x[800:1000], y[800:1000], x[1000:], True))         # seeded

def test_the_mlp_track_has_x_ares_s_schedule_and_choice(monkeypatch):
    x, y = torch.randn(100, 6), torch.eye(5)[torch.arange(100) % 5].bool()
    rates, valid, tests = [], iter([0.1, 0.3, 0.2, 0.5, 0.4, 0.5, 0.1, 0.1, 0.1, 0.1]), []
    step, forward = torch.optim.Adam.step, torch.nn.Linear.forward
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    monkeypatch.setattr(finetune, "score", lambda *args: next(valid))
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: [
        forward(self, x), tests.append(forward(self, x).detach()) if len(x) == 7 else None][0])
    found = finetune.mlp_probe(x, y, x[:9], y[:9], torch.randn(7, 6))
    due = [1e-3 + (1e-4 - 1e-3) / 2 * (1 - math.cos(math.pi * epoch / 10)) for epoch in range(10)]
    assert rates == pytest.approx(np.repeat(due, 4)) and rates[-1] == pytest.approx(1.22e-4, rel=1e-2)      # 4 batches of 32 an epoch
    assert len(tests) == 3 and torch.equal(found, tests[-1])            # the fourth epoch is the first that reached 0.5

# ---- ensembles

class Foreign(torch.nn.Module):
    """Any module (wav) -> (B, T, D): mean and peak of every 40 ms; it knows nothing of padding."""
    def forward(self, wav):
        x = wav.unfold(1, 640, 640)
        return torch.stack([x.mean(-1), x.amax(-1), x.square().mean(-1)], -1)

def test_a_feature_ensemble_is_its_definition(random_encoder):
    ensemble = finetune.Ensemble([random_encoder, Foreign()])
    wav, lengths = torch.randn(3, 24000) * 0.1, torch.tensor([24000, 9000, 3000])
    x, valid = ensemble.features(wav, lengths)
    assert x.shape == (3, 72, 35)
    for b, n in enumerate(lengths):
        own, foreign = random_encoder.features(wav[b:b + 1, :n])[0][0], Foreign()(wav[b:b + 1, :n])[0]
        T = max(len(own), len(foreign))
        assert valid[b].sum() == T
        for t in range(T):              # linear interpolation between token centres, constant beyond the outer ones
            for part, columns in ((own, slice(0, 32)), (foreign, slice(32, 35))):
                place = min(max((t + 0.5) * len(part) / T - 0.5, 0), len(part) - 1)
                low = int(place)
                due = part[low] * (1 - place + low) + part[min(low + 1, len(part) - 1)] * (place - low)
                assert torch.allclose(x[b, t, columns], due, atol=2e-5)

def test_several_encoders_are_probed_side_by_side(ragged, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from test_finetune import Foreign")
    monkeypatch.chdir(tmp_path)
    scores = finetune.main(data=ragged, out_dir=str(tmp_path), model="micro", device="cpu", init="scratch,mine:Foreign",
                           probe="linear", fold="1")
    assert scores["1"] > 0.7

def test_a_dasheng_joins(random_encoder):
    dasheng = pytest.importorskip("dasheng.pretrained.pretrained").Dasheng(embed_dim=192, depth=2, num_heads=3).eval()
    x, valid = finetune.Ensemble([random_encoder, dasheng]).features(torch.randn(2, 80000) * 0.1, torch.tensor([80000, 48000]))
    assert x.shape == (2, 248, 32 + 192) and valid.sum(1).tolist() == [248, 144]       # 125 and 75 tokens of 40 ms, brought to ours

def test_probabilities_are_averaged(random_encoder, ragged, tmp_path, capsys):
    members = [save_classifier(random_encoder, tmp_path / f"m{i}_2.pt", labels, i) for i, labels in enumerate((["a", "b"], ["b", "a"]))]
    flags = dict(data=ragged, out_dir=str(tmp_path), device="cpu", dtype="float32", fold="2")
    parts = []
    for member in members:
        finetune.main(ensemble=member, **flags)
        parts.append(np.load(tmp_path / "ensemble_ragged_fold2.npz")["scores"])
    value = finetune.main(ensemble=f"{tmp_path}/m0_{{fold}}.pt,{tmp_path}/m1_{{fold}}.pt", **flags)["2"]
    found, printed = np.load(tmp_path / "ensemble_ragged_fold2.npz"), capsys.readouterr().out
    assert np.allclose(found["scores"], (parts[0] + parts[1]) / 2, atol=1e-12) and np.allclose(found["scores"].sum(1), 1)
    assert value == np.mean(found["scores"].argmax(1) == found["targets"].argmax(1))
    wav, lengths = data.pad_batch([data.Pack(ragged).audio(i).astype(np.float32) / 32768 for i in range(1, 24, 3)])
    # classes by name, not by place
    assert np.allclose(parts[1], load(members[1]).predict(wav, lengths).detach()[:, [1, 0]], atol=1e-5)
    assert all(f"m{i}_{{fold}}.pt fold 2: accuracy" in printed for i in (0, 1)) and "their mean fold 2: accuracy" in printed
    with pytest.raises(UserError, match="not a classifier of the classes"):
        finetune.main(ensemble=save_classifier(random_encoder, tmp_path / "other.pt", ["a", "x"], 0), **flags)

# ---- several ranks

RUNS = """
import sys; sys.path.insert(0, {root!r})
import common, finetune
finetune.main(ensemble={member!r}, fold="1", **{flags!r})
finetune.main(init={member!r}, probe="mlp", **{{**{flags!r}, "data": {toy!r}}})
finetune.main(init={member!r}, fold="3", max_steps=3, batch_seconds=100.0, roll=False, **{flags!r})
common.leave()
"""

def test_two_ranks_score_as_one(ragged, toy, random_encoder, tmp_path):
    """Bit for bit and every clip once, where ranks share four batches, and where there is but one."""
    member = save_classifier(random_encoder, tmp_path / "m.pt", ["a", "b"], 0)
    for ranks, launcher in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        script = tmp_path / f"run{ranks}.py"
        script.write_text(RUNS.format(root=str(ROOT), member=member, toy=toy,
                                      flags=dict(data=ragged, out_dir=str(tmp_path / str(ranks)), device="cpu")))
        done = subprocess.run([sys.executable, *launcher, script], capture_output=True, text=True, timeout=240,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        # one rank prints
        assert done.stdout.count("m.pt fold 1: accuracy") == done.stdout.count("their mean fold 1: accuracy") == 1
    for name in ("ensemble_ragged_fold1", "mlp_toy", "finetune_ragged_fold3"):
        one, two = (np.load(tmp_path / str(ranks) / f"{name}.npz") for ranks in (1, 2))
        exact = not name.startswith("finetune")         # training sums its gradients in another order
        assert np.array_equal(one["scores"], two["scores"]) if exact else np.allclose(one["scores"], two["scores"], atol=1e-4), name
        a, b = (log(tmp_path / str(ranks) / f"{name}.jsonl")[-1] for ranks in (1, 2))
        assert {**a, "minutes": 0} == {**b, "minutes": 0} and a["clips"] == (20 if name == "mlp_toy" else 8)

# ---- benchmark suites

def test_x_ares_finds_an_encoder(random_encoder, tmp_path, monkeypatch):
    """The assertions of its audio_encoder_checker and of its loader, and what its tasks feed: clips of up to ten minutes."""
    monkeypatch.setenv("BEATS_CHECKPOINT", save_classifier(random_encoder, tmp_path / "m.pt", ["a"], 0))
    module = __import__("runs.xares_encoder", fromlist=["x"])
    names = [name for name in dir(module) if name.endswith("Encoder")]
    assert names == ["BeatsEncoder"]
    encoder = module.BeatsEncoder()
    assert (isinstance(encoder, torch.nn.Module)
            and (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 32, 20))
    assert encoder(torch.randn(2, 50000)).shape == (2, 3125 // 20 // 8 * 8, 32) and encoder(torch.randn(50000)).shape == (1, 152, 32)
    assert encoder(torch.randn(1, 100)).shape == (1, 48, 32)            # padded to a second
    long = torch.randn(1, 600 * 16000 + 5000) * 0.1
    x = encoder(long)
    assert x.shape == (1, 60 * 496 + 48, 32) and not x.requires_grad
    assert torch.allclose(x[:, 496:992], random_encoder.features(long[:, 160000:320000])[0], atol=1e-5)
    monkeypatch.delenv("BEATS_CHECKPOINT")
    with pytest.raises(UserError, match="BEATS_CHECKPOINT="):
        module.BeatsEncoder()
    checker = pytest.importorskip("xares.audio_encoder_checker")
    assert checker.check_audio_encoder(encoder)

def test_hear_s_contract(random_encoder, tmp_path):
    """What hear-validator asserts, on its sounds: 16 of 2 s, 8 of 3.74 s; and one longer than a chunk."""
    import runs.hear_beats as module
    model = module.load_model(save_classifier(random_encoder, tmp_path / "m.pt", ["a"], 0))
    assert isinstance(model, torch.nn.Module) and model.sample_rate in (16000, 22050, 44100, 48000)
    assert isinstance(model.scene_embedding_size, int) and isinstance(model.timestamp_embedding_size, int)
    for sounds, seconds in ((16, 2.0), (8, 3.74), (1, 25.0), (2, 0.1)):
        audio = torch.rand(sounds, int(seconds * 16000)) * 2 - 1
        x, times = module.get_timestamp_embeddings(audio, model)
        assert x.dtype == torch.float32 and x.shape == (*times.shape, model.timestamp_embedding_size) and times.shape[0] == sounds
        step = times.diff(dim=1)
        # even, at most 50 ms
        assert times.dtype == torch.float32 and (step - 40).abs().max() < 1e-3 if times.shape[1] > 1 else times.shape[1] == 1
        assert (times >= 0).all() and (times[:, -1] <= max(seconds * 1000, 87.5)).all() and torch.isfinite(x).all()
        scene = module.get_scene_embeddings(audio, model)
        assert scene.dtype == torch.float32 and scene.shape == (sounds, model.scene_embedding_size) and torch.isfinite(scene).all()
        if seconds > 1:
            assert times[0, -1] > seconds * 1000 - 250          # reaches the end
    with pytest.raises(UserError, match="give a checkpoint"):
        module.load_model("")

def test_hear_s_timestamps_are_even_for_twenty_minutes():
    import runs.hear_beats as module
    class Nothing(torch.nn.Module):
        features = lambda self, wav: (torch.zeros(1, num_tokens(wav.shape[1]), 1), None)
    times = module.get_timestamp_embeddings(torch.zeros(1, 1200 * 16000), Nothing())[1]
    assert (times.diff() - 40).abs().max() < 1e-3 and times[0, -1] > 1200e3 - 250

def test_hear_s_timestamps_are_where_the_sound_is():
    """A click moves the embeddings whose 175 ms hold it, seen without attention's mixing: by the filter bank alone."""
    import runs.hear_beats as module
    class Energy(torch.nn.Module):
        features = lambda self, wav: (patchify(fbank(wav)).mean(-1, keepdim=True), None)
    audio = torch.zeros(1, 16000 * 12)
    click = 10.5        # seconds, in the second chunk
    audio[0, int(click * 16000)] = 1
    x, times = module.get_timestamp_embeddings(audio, Energy())
    moved = times[0, (x[0, :, 0] > x[0].min() + 0.1)]
    assert (moved - click * 1000).abs().max() <= 87.5 + 1 and len(moved) in (4, 5)
