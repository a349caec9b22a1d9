"""Splits, scores, frozen probes and ensembles."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
from audio import num_tokens, pad_batch
from common import UserError
from conftest import row_of, save_classifier
from data import Pack
from model import load

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """The path of a pack of 30 clips with one or two labels of three, and a class that never occurs."""
    labels = [["a"], ["b"], ["a", "b"], ["c"], ["a", "c"]]
    rows = [row_of(i, labels[i % 5], ("train", "valid", "test")[i // 10]) for i in range(30)]
    def read(row):
        time, speed = np.arange(4800 + 480 * int(row["path"])), dict(a=0.05, b=0.3, c=1.0)
        return 0.2 * sum(np.sin(time * speed[name]) for name in row["labels"])
    path = tmp_path_factory.mktemp("packs") / "tagged"
    data.write_pack(path, rows, read, ["a", "b", "c", "never"])
    return str(path)

# ---- scores

def naive_average_precision(scores, truth):
    """Mean over the positives of the precision among all that score at least as high."""
    return np.mean([truth[scores >= score].mean() for score in scores[truth]])

def test_average_precision_equals_its_definition():
    random = np.random.default_rng(0)
    for _ in range(50):
        scores, truth = random.integers(0, 6, 20), random.integers(0, 2, 20).astype(bool)       # many ties
        truth[0] = True
        due = naive_average_precision(scores, truth)
        assert evaluate.average_precision(scores, truth) == pytest.approx(due, abs=1e-12)
    assert np.isnan(evaluate.average_precision(scores, truth & False))

# ---- splits

def test_every_fold_is_tested_once_and_trained_on_otherwise(ragged):
    for fold, (train, valid, test) in evaluate.splits_of(Pack(ragged)).items():
        assert test.tolist() == list(range(int(fold) - 1, 24, 3))
        assert sorted([*train, *test]) == list(range(24))
        assert not len(valid)
    assert list(evaluate.splits_of(Pack(ragged), fold="1,3")) == ["1", "3"]

def test_splits_go_by_their_names(tagged):
    train, valid, test = evaluate.splits_of(Pack(tagged), valid_share=0.5)[""]      # it has a valid split
    assert [train.tolist(), valid.tolist(), test.tolist()] == np.arange(30).reshape(3, 10).tolist()
    assert evaluate.splits_of(Pack(tagged), test_split="valid")[""][2].tolist() == valid.tolist()

def test_a_share_of_the_training_recordings_is_held_out_whole(tmp_path):
    rows = [row_of(i, ["a"], str(i % 3)) for i in range(12)]
    data.write_pack(tmp_path / "pack", rows, lambda row: np.linspace(-1, 1, 9600)**3, max_seconds=0.2)
    for split in evaluate.splits_of(Pack(tmp_path / "pack"), valid_share=0.25).values():
        train, valid, test = map(set, split)
        assert [len(train), len(valid), len(test)] == [6, 2, 4]
        assert train | valid | test == set(range(12))

def test_a_recording_without_a_label_is_left_out_and_said(tmp_path, capsys):
    rows = [row_of(i, "ab"[i % 2], ("train", "test")[i // 8]) for i in range(16)]
    rows += [row_of(16, split="train"), row_of(17, split="test"), row_of(18, "ab")]      # and one of no split
    def read(row):
        return 0.1 * np.sin(np.arange(8000) * (0.1 + 0.4 * (int(row["path"]) % 2)))
    data.write_pack(tmp_path / "pack", rows, read)
    flags = dict(data=f"{tmp_path}/pack", out_dir=str(tmp_path), model="micro", device="cpu")
    assert evaluate.main(probe="knn", **flags) == {"": 1.0}
    assert "no recording has several labels; 2 without one are left out" in capsys.readouterr().out
    assert len(np.load(tmp_path / "knn_pack.npz")["paths"]) == 8

def test_a_split_of_which_nothing_has_a_label_is_refused(tmp_path):
    rows = [row_of(0, "a", "train"), row_of(1, "b", "train"), row_of(2, split="test")]
    data.write_pack(tmp_path / "pack", rows, lambda row: np.linspace(-1, 1, 8000)**3)
    with pytest.raises(UserError, match="nothing in test has a label"):
        evaluate.main(data=f"{tmp_path}/pack", model="micro", device="cpu", out_dir=str(tmp_path))

def test_a_test_split_in_which_no_class_occurs_is_refused(tmp_path):
    rows = [row_of(0, "ab", "train"), row_of(1, "b", "train"), row_of(2, split="test")]
    data.write_pack(tmp_path / "pack", rows, lambda row: np.linspace(-1, 1, 8000)**3)
    with pytest.raises(UserError, match="nothing in test has a label"):
        evaluate.main(data=f"{tmp_path}/pack", probe="mlp", model="micro", device="cpu", out_dir="out")

@pytest.mark.parametrize("init", ["out/mam:iter1.pt", "C:/models/beats.pt", "http://host/beats.pt"])
def test_a_file_with_a_colon_in_its_name_is_not_imported(init):
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate.open_encoder(init)

def test_features_that_are_not_finite_are_refused(random_encoder, ragged):
    random_encoder.ln.weight.data.fill_(1e38)
    with pytest.raises(UserError, match="features of ragged: some are not finite"):
        evaluate.extract(random_encoder, Pack(ragged), np.arange(3), torch.device("cpu"))

# ---- recordings that were cut

@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    """The path of a pack of eight recordings of 0.9 to 25 s, which are cut into clips of 10 s."""
    def read(row):
        noise = np.random.default_rng(int(row["path"])).standard_normal(int(row["seconds"] * 16000))
        return 0.1 * noise * np.linspace(0.1, 1, len(noise))
    seconds = [25, 9.6, 0.9, 12, 3, 21, 10, 5]
    rows = [row_of(i, "ab"[i % 2], ("train", "test")[i < 3], seconds=seconds[i]) for i in range(8)]
    path = tmp_path_factory.mktemp("packs") / "utterances"
    data.write_pack(path, rows, read)
    return str(path)

def pieces_of(pack, recording):
    return [pack.wav(clip)[None] for clip in np.flatnonzero(pack.index["row"] == recording)]

def test_pieces_of_a_recording_are_one_by_their_tokens(utterances, random_encoder, tmp_path):
    pack = Pack(utterances)
    save_classifier(random_encoder, tmp_path / "x.pt", ["a", "b"])
    model = load(tmp_path / "x.pt")
    features = evaluate.extract(random_encoder, pack, np.arange(8), CPU, "float32")
    spread = evaluate.extract(random_encoder, pack, np.arange(8), CPU, "float32", layers="all")
    p = evaluate.probabilities(model, pack, np.arange(8), CPU, "float32")
    for recording in (0, 1, 2):
        pieces = pieces_of(pack, recording)
        tokens = torch.cat([random_encoder.features(piece)[0][0] for piece in pieces])
        torch.testing.assert_close(features[recording], tokens.mean(0), atol=1e-5, rtol=1e-4)
        states = torch.cat([random_encoder.features(piece, layer="all")[0][:, 0] for piece in pieces], 1)
        std = states.std(1, correction=0).flatten()
        torch.testing.assert_close(spread[recording, len(std):], std, atol=1e-3, rtol=1e-2)
        counts = torch.tensor([float(num_tokens(piece.shape[1])) for piece in pieces])
        mean = (counts @ torch.cat([model.predict(piece) for piece in pieces]) / counts.sum()).double()
        torch.testing.assert_close(p[recording], mean, atol=1e-5, rtol=1e-4)

def test_scores_and_files_have_one_row_a_recording(utterances, tmp_path, random_encoder):
    save_classifier(random_encoder, tmp_path / "x.pt", ["a", "b"])
    flags = dict(data=utterances, out_dir=str(tmp_path), device="cpu")
    evaluate.main(probe="knn", model="micro", **flags)
    evaluate.main(ensemble=f"{tmp_path}/x.pt", **flags)
    for name in ("knn", "ensemble"):
        run = np.load(tmp_path / f"{name}_utterances.npz")
        assert run["paths"].tolist() == ["0", "1", "2"]                 # three pieces, one, and one
        assert len(run["scores"]) == len(run["targets"]) == 3
        table = np.genfromtxt(tmp_path / f"{name}_utterances.csv", delimiter=",", skip_header=1)
        assert table[:, 1].tolist() == [2, 1]

# ---- frozen probes

@pytest.mark.parametrize("several", [False, True])
def test_probes_learn(several):
    random = torch.Generator().manual_seed(0)
    label = torch.arange(1200) % 5
    x = torch.randn(5, 20, generator=random)[label] + 0.3 * torch.randn(1200, 20, generator=random)
    y = F.one_hot(label).bool()
    y[:, 0] |= several & y[:, 1]
    (x, x_valid, x_test), (y, y_valid, y_test) = x.split([800, 200, 200]), y.split([800, 200, 200])
    linear, knn = evaluate.linear_probe(x[:200], y[:200], x_test, several), evaluate.knn_probe(x, y, x_test)
    mlp, again = [evaluate.mlp_probe(x, y, x_valid, y_valid, x_test, several) for _ in range(2)]
    for scores, least in ((linear, 0.98), (knn, 0.98), (mlp, 0.8)):
        assert evaluate.score(scores, y_test, several) > least
    assert torch.equal(mlp, again)              # seeded

@pytest.mark.parametrize("probe", ["linear", "mlp", "knn"])
def test_a_score_does_not_depend_on_what_else_is_tested(probe):
    torch.manual_seed(0)
    x, y, x_test = torch.randn(60, 8), F.one_hot(torch.arange(60) % 3).bool(), 5 * torch.randn(9, 8) + 3
    def scores(x_test):
        if probe == "mlp":
            return evaluate.mlp_probe(x, y, x[:20], y[:20], x_test)
        return {"linear": evaluate.linear_probe, "knn": evaluate.knn_probe}[probe](x, y, x_test)
    torch.testing.assert_close(scores(x_test[4:5]), scores(x_test)[4:5])

def test_a_linear_probe_is_the_minimum_of_its_loss_on_all_clips_by_the_penalty_that_is_best_on_a_fifth():
    torch.manual_seed(0)
    label, penalties = torch.arange(90) % 3, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    x, y = torch.randn(90, 12) * torch.arange(1, 13) + 2, F.one_hot(label).bool()
    x[:, :3] += 0.7 * y * torch.arange(1, 4)

    # scores of the mean clip are the bias, and of clips one standard deviation away a row of the weights more
    mean, std = x.mean(0), x.std(0)
    scores = evaluate.linear_probe(x, y, torch.cat([mean + torch.diag(std), mean[None]])).double()
    weights, bias = scores[:12] - scores[12], scores[12]
    z = ((x - mean) / std).double()
    error = (z @ weights + bias).softmax(1) - y.double()        # the slope of the cross-entropy in the scores
    slope = z.T @ error / 90
    penalty = -(slope * weights).sum() / weights.square().sum()
    assert (slope + penalty * weights).abs().max() < 1e-4
    assert error.mean(0).abs().max() < 1e-4                     # there is no penalty on the bias

    held = torch.randperm(90, generator=torch.Generator().manual_seed(0)) % 5 == 0
    values = []
    for penalty_tried in penalties:
        fitted = evaluate.fit_linear(z[~held], y[~held], penalty_tried)
        values.append(((z[held] @ fitted[:-1] + fitted[-1]).argmax(1) == label[held]).double().mean().item())
    assert len(set(values)) > 1
    assert penalty.item() == pytest.approx(penalties[values.index(max(values))], rel=0.05)

def test_an_mlp_is_that_of_the_best_epoch_on_valid_and_of_its_seed(monkeypatch):
    torch.manual_seed(0)
    label, values, score = torch.randint(3, (900,)), [], evaluate.score
    x, y = torch.randn(900, 8) + 0.5 * F.one_hot(label, 8), F.one_hot(label).bool()
    y[600:] = y[600:].roll(1, 1)                # so that it gets worse and worse
    parts = x[:600], y[:600], x[600:], y[600:], x[600:]
    def noticed(*args):
        values.append(score(*args))
        return values[-1]
    monkeypatch.setattr(evaluate, "score", noticed)
    best, other = evaluate.mlp_probe(*parts), evaluate.mlp_probe(*parts, seed=1)
    assert len(values) == 2 * 10
    assert score(best, y[600:], False) == max(values[:10]) > values[9]
    assert not torch.equal(best, other)

def test_epochs_of_an_mlp_are_chosen_on_the_valid_split(tagged, random_encoder, monkeypatch):
    pack = Pack(tagged)
    splits, labels, several = evaluate.task_of(evaluate.Config(data=tagged), pack)
    frozen = evaluate.Frozen(random_encoder, pack, splits, labels, CPU, "float32")
    monkeypatch.setattr(evaluate, "mlp_probe", lambda *args: args)
    _, _, x_valid, y_valid, x_test, *_ = frozen.probe("mlp", splits[""], several)
    assert torch.equal(x_valid, frozen.x[10:20])
    assert torch.equal(y_valid, labels[np.arange(10, 20)])
    assert torch.equal(x_test, frozen.x[20:])

def test_of_several_folds_mean_and_standard_deviation_are_printed(capsys):
    evaluate.print_results({"1": 0.5, "2": 0.6, "3": 0.8}, "accuracy", "x")
    assert "x: accuracy 63.3 +- 15.3 % over 3 folds" in capsys.readouterr().out     # of a sample: n - 1

def test_another_seed_is_another_encoder_from_scratch(ragged, tmp_path):
    scores = []
    for seed in (1, 1, 2):
        flags = dict(data=ragged, fold="1", probe="knn", model="micro", device="cpu", out_dir=str(tmp_path))
        evaluate.main(seed=seed, **flags)
        scores.append(np.load(tmp_path / "knn_ragged_fold1.npz")["scores"])
    assert np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[1], scores[2])

def test_the_probe_score_of_an_encoder_is_the_mean_over_folds(ragged, random_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_encoder", lambda *args, **kwargs: random_encoder)
    values = evaluate.main(data=ragged, init="x.pt", device="cpu", out_dir=str(tmp_path), dtype="float32")
    score = evaluate.probe_score(random_encoder, Pack(ragged), CPU, "float32")
    assert score == pytest.approx(np.mean(list(values.values())))

def test_nearest_neighbours_are_their_definition():
    random = np.random.default_rng(0)
    x, x_test = random.standard_normal((40, 6)), random.standard_normal((300, 6))
    y = np.eye(5)[random.integers(0, 5, 40)]
    scores = evaluate.knn_probe(*map(torch.from_numpy, (x, y, x_test)))
    for i in range(0, 300, 7):
        cosine = x @ x_test[i] / np.linalg.norm(x, axis=1) / np.linalg.norm(x_test[i])
        near = np.argsort(-cosine)[:10]
        weight = np.exp(cosine[near] / 0.07)
        assert np.allclose(scores[i], (weight / weight.sum()) @ y[near])

def test_probes_from_the_command_line(ragged, tmp_path, capsys):
    flags = dict(data=ragged, out_dir=str(tmp_path), model="micro", device="cpu")
    together = evaluate.main(probe="linear,knn,mlp", **flags)
    out = capsys.readouterr().out
    assert out.count("% over 3 folds") == 3
    assert "% over 3 folds (epochs chosen on what is tested" in out                 # of the MLP
    for probe in ("linear", "knn"):
        assert evaluate.main(probe=probe, **flags) == together[probe]
        assert min(together[probe].values()) > 0.8
    assert (tmp_path / "linear_ragged_fold1.1.npz").exists()                        # earlier results are kept
    assert min(evaluate.main(probe="linear", layers="all", **flags).values()) > 0.8

def test_the_files_of_a_run_give_its_scores(tagged, tmp_path, capsys):
    value = evaluate.main(data=tagged, out_dir=str(tmp_path), model="micro", device="cpu")[""]
    assert f"linear: mAP {100 * value:.1f} %" in capsys.readouterr().out
    run = np.load(tmp_path / "linear_tagged.npz")
    assert run["paths"].tolist() == [str(i) for i in range(20, 30)]
    assert run["classes"].tolist() == ["a", "b", "c", "never"]
    assert run["targets"][:3].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]

    precision = [naive_average_precision(run["scores"][:, k], run["targets"][:, k]) for k in range(3)]
    assert value == pytest.approx(np.mean(precision), abs=1e-12)
    line = json.loads((tmp_path / "linear_tagged.jsonl").read_text())
    assert (line["mAP"], line["classes_scored"], line["classes"], line["recordings"]) == (value, 3, 4, 10)
    table = np.genfromtxt(tmp_path / "linear_tagged.csv", delimiter=",", skip_header=1)
    assert table[:, 1].tolist() == [6, 4, 4, 0]                                     # clips
    assert table[:, 2] == pytest.approx([*precision, np.nan], nan_ok=True)

# ---- ensembles

class Foreign(torch.nn.Module):
    """Any module (wav) -> (B, T, D): mean, peak and power of every 40 ms. It knows nothing of padding."""
    def forward(self, wav):
        x = wav.unfold(1, 640, 640)
        return torch.stack([x.mean(-1), x.amax(-1), x.square().mean(-1)], -1)

@torch.no_grad()
def test_a_feature_ensemble_is_its_definition(random_encoder):
    wav, lengths = 0.1 * torch.randn(3, 24000), torch.tensor([24000, 9000, 3000])
    x, valid = evaluate.Ensemble([random_encoder, Foreign()]).features(wav, lengths)
    assert x.shape == (3, 72, 35)
    for b, n in enumerate(lengths):
        members = random_encoder.features(wav[b:b + 1, :n])[0][0], Foreign()(wav[b:b + 1, :n])[0]
        T = max(map(len, members))
        assert valid[b].tolist() == [True] * T + [False] * (72 - T)
        due = []                        # linear between the centres of tokens, constant beyond the outer ones
        for tokens in members:
            centres = (np.arange(T) + 0.5) * len(tokens) / T - 0.5
            due += [np.interp(centres, np.arange(len(tokens)), column) for column in tokens.T]
        assert np.allclose(x[b, :T].T, due, atol=2e-5)

def test_several_encoders_are_probed_side_by_side(ragged, tmp_path, monkeypatch):
    (tmp_path / "others.py").write_text("from test_evaluate import Foreign")
    monkeypatch.chdir(tmp_path)
    values = evaluate.main(data=ragged, model="micro", device="cpu", init="scratch,others:Foreign", fold="1")
    assert values["1"] > 0.7

def test_probabilities_are_averaged_fold_by_fold(random_encoder, ragged, tmp_path, capsys):
    for fold in "12":
        save_classifier(random_encoder, tmp_path / f"x_{fold}.pt", ["a", "b"])
        save_classifier(random_encoder, tmp_path / f"y_{fold}.pt", ["b", "a"])
    files = f"{tmp_path}/x_{{fold}}.pt,{tmp_path}/y_{{fold}}.pt"
    flags = dict(data=ragged, out_dir=str(tmp_path), device="cpu", dtype="float32")
    values = evaluate.main(ensemble=files, fold="1,2", **flags)
    assert list(values) == [*files.split(","), "ensemble"]
    assert capsys.readouterr().out.count("% over 2 folds") == 3

    run = np.load(tmp_path / "ensemble_ragged_fold2.npz")
    wav, lengths = pad_batch([Pack(ragged).wav(i).numpy() for i in range(1, 24, 3)])
    x, y = [load(tmp_path / f"{name}_2.pt").predict(wav, lengths).detach() for name in "xy"]
    assert np.allclose(run["scores"], (x + y[:, [1, 0]]) / 2, atol=1e-6)            # classes by name
    assert values["ensemble"]["2"] == np.mean(run["scores"].argmax(1) == run["targets"].argmax(1))

def test_classes_of_a_member_are_put_in_the_order_of_the_pack(random_encoder, ragged, tmp_path):
    """Three of them in a cycle, whose order is not its own inverse."""
    save_classifier(random_encoder, tmp_path / "x.pt", ["b", "c", "a"])
    pack, recordings = Pack(ragged), np.arange(4)
    pack.classes = ["a", "b", "c"]
    scores = evaluate.ensemble([str(tmp_path / "x.pt")], "", pack, recordings, CPU, "float32")["ensemble"]
    own = evaluate.probabilities(load(tmp_path / "x.pt"), pack, recordings, CPU, "float32")
    assert torch.allclose(scores, own[:, [2, 0, 1]])

def test_mistakes_are_explained(toy, ragged, tmp_path, random_encoder):
    data.write_pack(tmp_path / "plain", [row_of(0)], lambda row: np.linspace(-1, 1, 4000)**3)
    save_classifier(random_encoder, tmp_path / "x.pt", ["a", "x"])
    for pack, flags, message in ((tmp_path / "plain", {}, "has no labels"),
                                 (ragged, dict(fold="7"), "has the folds 1, 2, 3, not 7"),
                                 (toy, dict(test_split="later"), "training needs the splits train and test"),
                                 (toy, dict(init="nowhere:f"), "No module named 'nowhere'"),
                                 (toy, dict(init="math:f"), "a function in it"),
                                 (toy, dict(probe="linear,svm"), "choose of linear, mlp, knn"),
                                 (toy, dict(layers="all", init="scratch,scratch"), "single encoder of ours"),
                                 (ragged, dict(ensemble="a.pt"), "write {fold} in their names"),
                                 (ragged, dict(ensemble=f"{tmp_path}/x.pt", fold="1"), "not a classifier")):
        with pytest.raises(UserError, match=message):
            evaluate.main(data=str(pack), device="cpu", out_dir=str(tmp_path), **flags)
