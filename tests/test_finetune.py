"""Fine-tuning: recipes, augmentation and sampling against their definitions, the best step, refusals."""
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import finetune
from audio import fbank, patchify
from common import UserError, make_optimizer, set_lr
from conftest import MICRO, row_of
from evaluate import probabilities, splits_of
from model import Classifier, Encoder, load, random_mask

FAST = dict(model="micro", batch_seconds=8.0, warmup_steps=2, device="cpu")
CPU = torch.device("cpu")

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

# ---- recipes

def test_a_preset_gives_way_to_the_checkpoint_and_that_to_flags(ragged, tmp_path, monkeypatch):
    made, make_optimizer = [], common.make_optimizer
    def noticed(*args, **more):
        made.append(make_optimizer(*args, **more))
        return made[-1]
    monkeypatch.setattr(common, "make_optimizer", noticed)
    flags = dict(data=ragged, task="ks2", out_dir=str(tmp_path), fold="1", model="micro", device="cpu")
    flags |= dict(best=False)
    finetune.main(max_steps=1, mixup=0.1, head_lr=2.0, **flags)
    finetune.main(max_steps=2, lr=7e-4, weight_decay=0.5, head_lr=1.0, resume=True, **flags)
    ckpt = torch.load(tmp_path / "finetune_ragged_fold1.pt", weights_only=True)
    assert (ckpt["config"]["lr"], ckpt["config"]["mixup"]) == (7e-4, 0.1)
    assert [{group["weight_decay"] for group in x.param_groups} for x in made] == [{0.0, 0.01}, {0.0, 0.5}]
    assert [{group["times"] for group in x.param_groups} for x in made] == [{1.0, 2.0}, {1.0}]
    assert {state["step"].item() for state in ckpt["optimizer"].values()} == {2.0}
    assert (ckpt["encoder"]["fbank_mean"], ckpt["encoder"]["grad_decay"]) == (11.41045, 0.3)    # of Table 4

def test_presets_choose_on_valid_where_the_paper_does_and_seldom_look():
    seconds = dict(as2m=190_000, as20k=190_000, esc50=2_000, ks1=6_800, ks2=9_981, er=4_000)     # to evaluate
    for name in seconds:
        cfg = finetune.Config(**finetune.TASKS[name])
        assert cfg.best == (name in ("ks1", "ks2", "er"))
        # a backward pass costs two forward ones
        assert seconds[name] <= 0.02 * 3 * cfg.batch_seconds * cfg.eval_every
        assert cfg.max_steps / cfg.save_every <= 40
    assert finetune.Config(**finetune.TASKS["as2m"]).fbank_std == 0         # the encoder's own

# ---- a run

def test_fine_tuning_learns_and_finished_folds_are_kept(ragged, tmp_path):
    flags = dict(data=ragged, out_dir=str(tmp_path), max_steps=30, eval_every=30, lr=3e-3, **FAST)
    scores = finetune.main(**flags)
    assert scores == {"1": 1.0, "2": 1.0, "3": 1.0}                 # two tones apart
    classifier = load(tmp_path / "finetune_ragged_fold2.pt")
    assert (classifier.labels, classifier.multilabel) == (["a", "b"], False)
    before = os.stat(tmp_path / "finetune_ragged_fold1.pt")
    assert finetune.main(resume=True, **flags) == scores
    assert os.path.samestat(os.stat(tmp_path / "finetune_ragged_fold1.pt"), before)

def test_micro_batches_do_not_change_what_is_learned(ragged, tmp_path):
    flags = dict(data=ragged, out_dir=str(tmp_path), fold="1", max_steps=2, mixup=0.5, spec_augment=0.3,
                 dtype="float32", **FAST)
    finetune.main(name="whole", **flags)
    finetune.main(name="parts", device_seconds=3.0, **flags)
    whole, parts = (load(tmp_path / f"finetune_{name}_fold1.pt").state_dict() for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)

def test_the_best_on_valid_is_chosen_there_and_tested_once(ragged, tmp_path):
    flags = dict(data=ragged, out_dir=str(tmp_path), fold="1", max_steps=36, eval_every=6, lr=3e-3)
    result = finetune.main(best=True, valid_share=0.4, **flags, **FAST)
    stem = tmp_path / "finetune_ragged_fold1"
    lines = [json.loads(line) for line in open(f"{stem}.jsonl")]
    valid = {line["step"]: line["valid_score"] for line in lines if "valid_score" in line}
    best = torch.load(f"{stem}_best.pt", weights_only=True)
    assert list(valid) == [6, 12, 18, 24, 30, 36]
    assert best["step"] == max(valid, key=valid.get)                # the first of the best
    pack, tested = data.Pack(ragged), np.load(f"{stem}.npz")
    test = splits_of(pack, fold="1")["1"][2]
    assert np.array_equal(tested["scores"], probabilities(load(f"{stem}_best.pt"), pack, test, CPU).numpy())
    assert result["1"] == np.mean(tested["scores"].argmax(1) == tested["targets"].argmax(1))

def test_the_best_is_chosen_on_no_clip_to_test_on(ragged, tmp_path, monkeypatch):
    asked = []
    def judge(model, pack, recordings, *rest):
        asked.append(list(recordings))
        return 0.5, 1.0
    monkeypatch.setattr(finetune, "judge", judge)
    flags = dict(fold="1", max_steps=2, eval_every=1, best=True, valid_share=0.4)
    finetune.main(data=ragged, out_dir=str(tmp_path), **flags, **FAST)
    valid = splits_of(data.Pack(ragged), fold="1", valid_share=0.4)["1"][1]
    assert asked == 2 * [list(valid)]

@pytest.mark.parametrize("flags, message", [
    (dict(task="esc"), "--task esc: choose one of custom, as2m"), (dict(data=""), "--data PACK is missing"),
    (dict(balance="unknown"), "needs a class named unknown"),
    (dict(init="scratch,scratch"), "can be probed: python evaluate.py --probe mlp"),
    (dict(patchout=60.0), "a share, has to be below 1"),
    (dict(loss="bce", smoothing=0.1), "--smoothing is for --loss ce"),
    (dict(best=True), "--best chooses on a valid split.* add --valid_share 0.2")])
def test_what_makes_no_sense_is_refused(flags, message, toy, tmp_path):
    with pytest.raises(UserError, match=message):
        finetune.main(**dict(data=toy, out_dir=str(tmp_path)) | FAST | flags)

def test_a_recording_of_25_s_is_trained_on_in_pieces_and_tested_once(tmp_path):
    def read(row):
        return np.sin(np.arange(int(row["seconds"] * 16000)) * (0.1, 0.5)[row["labels"][0] == "b"]) * 0.3
    seconds = [1, 2, 1, 2, 25, 3, 25, 2]
    rows = [row_of(i, "ab"[i % 2], ("train", "test")[i > 4], seconds=seconds[i]) for i in range(8)]
    data.write_pack(tmp_path / "pack", rows, read)
    value = finetune.main(data=f"{tmp_path}/pack", out_dir=str(tmp_path), max_steps=2, **FAST)[""]
    run = np.load(tmp_path / "finetune_pack.npz")
    assert run["paths"].tolist() == ["5", "6", "7"]
    assert np.allclose(run["scores"].sum(1), 1)
    assert value == np.mean(run["scores"].argmax(1) == run["targets"].argmax(1))

def test_epochs_are_drawn_from_the_training_clips_and_steps_augmented_anew(toy, tmp_path, monkeypatch):
    keys, chances, kinds, augment, losses = [], [], set(), finetune.augment, finetune.losses
    def draw(train, labels, classes, balance, key):
        assert np.array_equal(train, np.flatnonzero(data.Pack(toy).table[1] == "train"))
        keys.append((balance, *key))
        return train[:2]                        # an epoch is one batch
    def noticed_losses(logits, *args):
        kinds.add(logits.dtype)
        return losses(logits, *args)
    def noticed(wav, lengths, targets, cfg, random):
        chances.append(random.initial_seed())
        return augment(wav, lengths, targets, cfg, random)
    monkeypatch.setattr(finetune, "draw", draw)
    monkeypatch.setattr(finetune, "augment", noticed)
    monkeypatch.setattr(finetune, "losses", noticed_losses)
    flags = dict(data=toy, out_dir=str(tmp_path), max_steps=3, log_every=1, workers=0)
    finetune.main(seed=5, balance="weights", dtype="bfloat16", **FAST | flags)
    lines = [json.loads(line) for line in open(tmp_path / "finetune_toy.jsonl")]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3]
    assert keys[:3] == [("weights", 5, epoch) for epoch in range(3)]
    assert len(set(chances)) == 3
    assert kinds == {torch.float32}

def test_an_untrained_head_finds_all_classes_alike_and_an_encoder_from_scratch_knows_the_pack(toy, tmp_path):
    finetune.main(data=toy, out_dir=str(tmp_path), max_steps=1, **FAST | dict(lr=1e-12))
    assert np.allclose(np.load(tmp_path / "finetune_toy.npz")["scores"], 0.1, atol=1e-6)
    info, cfg = data.Pack(toy).info, load(tmp_path / "finetune_toy.pt").encoder.cfg
    assert (cfg.fbank_mean, cfg.fbank_std) == (info["fbank_mean"], info["fbank_std"])

@pytest.mark.parametrize("several", [False, True])
def test_several_labels_are_several_yes_or_no_questions(several, tmp_path, random_encoder):
    labels = [["a"], ["b"], ["a", "b"]] if several else [["a"], ["b"], ["a"]]
    rows = [row_of(i, labels[i % 3], ("train", "test")[i > 5]) for i in range(12)]
    data.write_pack(tmp_path / "pack", rows, lambda row: np.linspace(-1, 1, 6000 + 500 * int(row["path"]))**3)
    finetune.main(data=f"{tmp_path}/pack", out_dir=str(tmp_path), max_steps=1, **FAST)
    assert load(tmp_path / "finetune_pack.pt").multilabel == several

    # score and mean loss, by their definitions
    pack, model = data.Pack(tmp_path / "pack"), Classifier(random_encoder, ["a", "b"], several).eval()
    cfg, test = finetune.Config(dtype="float32"), np.arange(6, 12)
    p = torch.cat([model.predict(pack.wav(i)[None]).detach() for i in test]).double()
    truth = pack.table[0][test]
    due = -(p.log()[truth].sum() + several * (1 - p).log()[~truth].sum()) / (12 if several else 6)
    loss = finetune.judge(model, pack, test, pack.table[0], several, cfg, CPU)[1]
    assert loss == pytest.approx(due.item(), rel=1e-4)

# ---- augmentation

def test_rolling_shifts_each_clip_within_its_length():
    wav, lengths = torch.arange(1.0, 11).repeat(4, 1), torch.tensor([10, 6, 10, 3])
    wav = wav * (torch.arange(10) < lengths[:, None])
    rolled = finetune.augment(wav, lengths, torch.eye(4), finetune.Config(), seeded())[0]
    for before, after, n in zip(wav, rolled, lengths):
        assert any(torch.equal(after[:n], before[:n].roll(shift)) for shift in range(n))
        assert not after[n:].any()

    wav, lengths, targets = torch.arange(8.0).repeat(20000, 1), torch.full((20000,), 8), torch.zeros(20000, 1)
    rolled = finetune.augment(wav, lengths, targets, finetune.Config(), seeded())[0]
    shares = torch.bincount(rolled[:, 0].long(), minlength=8) / 20000
    assert (shares - 1 / 8).abs().max() < 0.01

def test_mixup_mixes_sounds_and_targets_alike_by_a_beta_distribution():
    wav, lengths = torch.rand(4, 10), torch.tensor([10, 6, 10, 3])
    cfg = finetune.Config(roll=False, mixup=0.8)
    mixed, longest, shares = finetune.augment(wav, lengths, torch.eye(4), cfg, seeded(1))
    torch.testing.assert_close(mixed, shares @ wav)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert longest.tolist() == [max(lengths[shares[i] > 0]) for i in range(4)]

    random = seeded()
    shares = [finetune.augment(torch.zeros(64, 1), torch.ones(64), torch.eye(64), cfg, random)[2].diagonal()
              for batch in range(300)]
    shares = torch.cat(shares)[torch.cat(shares) < 1]               # the others were mixed with themselves
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.004      # Beta(a, a)

def test_spec_augment_is_its_definition():
    x, frames, share = torch.randn(300, 60, 128) + 5, torch.randint(17, 61, (300,)), 0.3
    chance, widths = torch.rand(300, 2, 2, generator=seeded()), set()
    for clip, masked, n, numbers in zip(x, finetune.spec_augment(x, frames, share, chance), frames, chance):
        for axis, size in ((0, int(n)), (1, 128)):
            width = math.floor(numbers[axis, 0] * round(share * size))
            start = math.floor(numbers[axis, 1] * (size - width + 1))
            clip.narrow(axis, start, width).zero_()
        widths.add(width)
        assert torch.equal(masked, clip)
    assert widths == set(range(38))     # below round(0.3 * 128) = 38, as torchaudio's FrequencyMasking(38)

def test_normalised_features_are_masked_and_each_clip_leaves_out_other_patches(toy, random_encoder):
    wav = data.Pack(toy).wav(0)[None].repeat(3, 1)
    x, chance = random_encoder.normalise(fbank(wav)), torch.rand(3, 2, 2)
    cfg, noise = finetune.Config(spec_augment=0.5, patchout=0.75), torch.rand(3, 144)
    for lengths in (torch.full((3,), 48000), torch.tensor([48000, 16000, 2800])):
        frames = torch.tensor([len(fbank(clip[None, :n])[0]) for clip, n in zip(wav, lengths)])
        inputs = wav, lengths, chance, noise, lengths.min() == 48000, random_encoder, cfg
        patches, valid, keep = finetune.prepare(*inputs)
        assert torch.equal(patches, patchify(finetune.spec_augment(x, frames, 0.5, chance)))
        assert keep.shape == (3, 36)
        assert not torch.equal(keep[0], keep[1])
        tokens = torch.full((3,), 144) if valid is None else valid.sum(1)
        assert torch.equal(tokens, frames // 16 * 8)
        assert torch.equal((keep < 144).sum(1), (tokens / 4).round().long())

def test_a_classifier_of_some_patches_averages_those(random_encoder):
    model = Classifier(random_encoder, ["a", "b", "c"]).eval()
    patches, valid = torch.randn(2, 48, 256), torch.arange(48) < torch.tensor([[48], [24]])
    keep = random_mask(torch.rand(2, 48), valid, 0.5)[0]
    tokens = model.head(random_encoder(patches, valid, keep))
    averages = torch.stack([tokens[0].mean(0), tokens[1, :12].mean(0)])
    torch.testing.assert_close(model(patches, valid, keep), averages)

def test_losses_are_means_over_classes_summed_over_clips():
    logits, targets = torch.randn(5, 3), F.one_hot(torch.tensor([0, 1, 2, 0, 1])).float()
    several = finetune.losses(logits, targets, finetune.Config(loss="bce"))
    torch.testing.assert_close(several["loss"], 5 * F.binary_cross_entropy_with_logits(logits, targets))
    smooth = finetune.losses(logits, targets, finetune.Config(loss="ce", smoothing=0.3))
    torch.testing.assert_close(smooth["loss"], -((0.7 * targets + 0.1) * logits.log_softmax(1)).sum())

# ---- sampling and learning rates

def test_rare_classes_are_drawn_more_often():
    """By AST's weights: a clip by the sum over its classes of 1000 / (clips of the class + 0.01)."""
    labels, clips_of = [[0]] * 60 + [[1]] * 20 + [[0, 2]] * 5 + [[]] * 2, [65, 20, 5]
    train = np.arange(10, 97)
    pairs = np.array([(clip, k) for clip, classes in enumerate(labels) for k in classes]).T
    weight = np.array([sum(1000 / (clips_of[k] + 0.01) for k in classes) for classes in labels])
    def draw(*key):
        return finetune.draw(train, pairs, "abc", "weights", key)
    epochs = [draw(3, epoch) for epoch in range(3000)]
    shares = np.bincount(np.concatenate(epochs), minlength=100)[10:97] / 3000 / 87
    assert np.abs(shares - weight / weight.sum()).max() < 5 * math.sqrt(0.05 / 3000 / 87)
    assert np.array_equal(epochs[7], draw(3, 7))
    assert not np.array_equal(epochs[7], epochs[8])

def test_keyword_epochs_are_balanced():
    """The footnote of Table 4: each class has half the size of the unknown class, in every epoch."""
    sizes = dict(yes=7, _silence_=3, _unknown_=41, no=30)
    label = np.repeat(np.arange(4), list(sizes.values()))
    def draw(epoch):
        return finetune.draw(np.arange(81), (np.arange(81), label), list(sizes), "unknown", (0, epoch))
    times = np.bincount(draw(0), minlength=81)
    assert set(times[label == 2]) == {1}
    for k in (0, 1, 3):
        assert times[label == k].sum() == 20
        assert np.ptp(times[label == k]) <= 1
    assert sorted(draw(0)) != sorted(draw(1))

def test_layer_wise_learning_rates_are_beits():
    model = Classifier(Encoder(MICRO), ["a"])
    cfg = finetune.Config(lr=8.0, warmup_steps=0, lr_decay=0.5, head_lr=3.0)
    optimizer = make_optimizer(model, 8.0, 0.1, times=lambda name: finetune.lr_times(name, 2, cfg))
    set_lr(optimizer, cfg, 0)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    due = {"head": 24.0, "blocks.1": 4.0, "blocks.0": 2.0}
    for name, parameter in model.named_parameters():
        expect = next((rate for part, rate in due.items() if part in name), 1.0)
        assert rates[id(parameter)] == expect, name

def test_a_mean_of_the_filter_bank_without_its_deviation_is_refused(ragged, tmp_path):
    with pytest.raises(UserError, match="--fbank_mean: say --fbank_std as well"):
        finetune.main(data=ragged, out_dir=str(tmp_path), max_steps=1, warmup_steps=1, fbank_mean=11.7)
