"""The pictures: a sound with its codes and guesses, and the curves of runs."""
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

import train_mam
from audio import fbank, num_tokens
from common import UserError
from conftest import MICRO, save_classifier
from model import Encoder, MaskedAudioModel, export_official
from tokenizer import RandomProjectionTokenizer
from tools import curves, picture, plots

# ---- picture.py

@pytest.fixture
def noise():
    """Three seconds of noise, a second of silence."""
    sounding = 0.1 * torch.randn(48000, generator=torch.Generator().manual_seed(0))
    return torch.cat([sounding, torch.zeros(16000)])

@pytest.fixture
def pair(noise):
    """A random model with its predictor, and the tokenizer whose codes it guesses."""
    torch.manual_seed(0)
    tokenizer = RandomProjectionTokenizer(n_codes=16).fit_([(noise[None], torch.tensor([64000]))])
    return MaskedAudioModel(Encoder(dataclasses.replace(MICRO)), 16, 2, 24, 4).eval(), tokenizer

@pytest.fixture
def files(pair, tmp_path):
    """The paths of both, as train_mam.py writes them."""
    model, tokenizer = pair
    torch.save(tokenizer.state(), tmp_path / "tokenizer_iter1.pt")
    torch.save(dict(kind="mam", encoder=dataclasses.asdict(model.encoder.cfg), model=model.state_dict(),
                    tokenizer=tokenizer.id()), tmp_path / "mam_iter1.pt")
    return str(tmp_path / "mam_iter1.pt"), str(tmp_path / "tokenizer_iter1.pt")

def test_three_quarters_are_hidden_and_all_of_them_that_sound_are_guessed(pair, noise):
    features, codes, hidden, guesses = picture.guess(*pair, noise)
    T = num_tokens(len(noise))
    assert torch.equal(features, fbank(noise[None])[0])
    assert len(codes) == len(hidden) == len(guesses) == T and hidden.sum() == T - round(T / 4)
    sounding = torch.arange(T) // 8 * 2560 < 48000                      # the row begins before the silence
    assert torch.equal(codes[sounding], pair[1].encode(noise[None])[0][sounding])
    assert torch.equal(codes >= 0, sounding) and torch.equal(guesses >= 0, hidden & sounding)
    assert not torch.equal(picture.guess(*pair, noise, seed=1)[2], hidden)
    assert picture.guess(*pair, noise, mask_ratio=0.5)[2].sum() == T - round(T / 2)

def test_the_encoder_is_shown_the_visible_patches_only(pair, noise):
    shown = []
    pair[0].encoder.register_forward_pre_hook(lambda encoder, inputs: shown.append(inputs))
    _, _, hidden, _ = picture.guess(*pair, noise)
    ((_, _, keep),) = shown
    assert torch.equal(keep[0], (~hidden).nonzero()[:, 0])

def test_guesses_are_the_most_probable_codes(pair, noise):
    model, tokenizer = pair
    model.head.weight.data.zero_()
    model.head.bias.data = torch.eye(16)[11]
    _, _, _, guesses = picture.guess(model, tokenizer, noise)
    assert set(guesses.tolist()) == {-1, 11}

def test_the_predictor_is_rebuilt_as_it_was_trained(files, pair, noise):
    loaded = picture.load_both(*files)
    for ours, theirs in zip(picture.guess(*loaded, noise), picture.guess(*pair, noise)):
        assert torch.equal(ours, theirs)

def test_a_checkpoint_that_cannot_guess_is_told_so_in_a_line(files, pair, tmp_path, distilled):
    torch.save(distilled.state(), tmp_path / "other.pt")
    save_classifier(pair[0].encoder, tmp_path / "classifier.pt", ["a", "b"])
    export_official(pair[0].encoder, tmp_path / "released.pt")
    for name, what in (("released.pt", "an encoder"), ("classifier.pt", "a fine-tuned classifier")):
        with pytest.raises(UserError, match=f"{name}: this file is {what}; guesses need the label predictor"):
            picture.load_both(str(tmp_path / name), files[1])
    with pytest.raises(UserError, match="not trained to predict the codes of .*other.pt"):
        picture.load_both(files[0], str(tmp_path / "other.pt"))

def test_of_a_long_sound_the_loudest_window_is_taken_or_the_one_asked_for(write_wav):
    x = 0.001 * np.random.default_rng(0).standard_normal(16000 * 20)
    x[16000 * 13 : 16000 * 15] *= 100
    path = write_wav("long.wav", x)
    wav, start = picture.read_window(path, picture.Config(seconds=4))
    assert start <= 13 and start + 4 >= 15 and num_tokens(len(wav)) == 25 * 8
    assert wav.tolist() == pytest.approx(x[round(start * 16000) :][: len(wav)], abs=1e-4)
    wav, start = picture.read_window(path, picture.Config(seconds=4, start=9.5))
    assert start == 9.5 and wav.tolist() == pytest.approx(x[152000:][: len(wav)], abs=1e-4)
    wav, start = picture.read_window(write_wav("short.wav", x[:30]), picture.Config())
    assert start == 0 and num_tokens(len(wav)) == 8                     # padded to a row

def test_colours_are_near_where_code_vectors_are():
    angle = torch.arange(64) / 64 * math.pi / 2
    vectors = torch.stack([angle.cos(), angle.sin(), 0.01 * angle], 1)
    colours = picture.code_colours(vectors, torch.arange(64))
    assert colours.shape == (64, 3) and colours.min() >= 0 and colours.max() <= 1
    near = (colours[1:] - colours[:-1]).norm(dim=1)
    assert near.max() < (colours[0] - colours[-1]).norm() / 4
    assert picture.code_colours(vectors, torch.tensor([], dtype=int)).isfinite().all()   # of silence

def test_a_grid_is_bands_from_low_to_high_by_rows():
    grid = picture.grid_of(torch.arange(24))
    assert grid.shape == (8, 3) and grid[5, 2] == 2 * 8 + 5

def test_marks_and_numbers_are_those_of_the_guesses(pair, noise):
    pytest.importorskip("matplotlib")
    found = picture.guess(*pair, noise)
    _, codes, hidden, guesses = found
    figure = picture.draw({}, "a.wav", 0.0, found, pair[1].vectors())
    *_, panel = figure.axes
    for line, right in zip(panel.lines, (True, False)):                 # dots, then crosses
        x, y = line.get_data()
        token = np.round(x / 0.16 - 0.5) * 8 + np.round(y - 0.5)
        expected = (guesses >= 0) & ((guesses == codes) == right)
        assert sorted(token) == expected.nonzero()[:, 0].tolist()
    assert f"{int((guesses == codes)[guesses >= 0].sum())} of {int((guesses >= 0).sum())} right" \
        in panel.get_title("left")
    assert f"{int((~hidden).sum())} of {len(hidden)} patches" in figure.axes[1].get_title("left")

def test_the_command_writes_a_picture_with_the_curves_of_the_run(files, noise, write_wav, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sound = str(write_wav("in/a.wav", noise.numpy()))
    picture.main([*files, sound, "--out", str(tmp_path / "new/alone.png"), "--seconds", "1"])
    write_log(tmp_path / "mam_iter1.jsonl", PRETRAINING)
    picture.main([*files, sound, "--out", str(tmp_path / "new/both.png"), "--seconds", "1"])
    alone, both = [(tmp_path / f"new/{name}.png").read_bytes() for name in ("alone", "both")]
    assert alone[:4] == both[:4] == b"\x89PNG" and alone != both
    with pytest.raises(UserError, match="no such logs"):
        picture.main([*files, sound, "--curves", str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="which"):
        picture.main([*files, "--out", "a.png"])

# ---- curves.py

USE = dict(codes_used=90, dead_codes=10, perplexity=50.0, entropy_given_band=3.5)
PRETRAINING = [USE, dict(step=10, loss=4.0, accuracy=0.1, lr=0.1, x_realtime=9.0),
               dict(step=20, loss=3.0, accuracy=0.2, lr=0.0, x_realtime=8.0),
               dict(step=20, valid_loss=3.1, valid_accuracy=0.15, entropy_given_band=3.5),
               dict(step=20, probe_before=0.3, probe_after=0.6)]
TOKENIZER = [dict(step=5, loss=1.0, cosine=0.1, codes_used=7, perplexity=6.0, entropy_given_band=2.0),
             dict(step=5, valid_loss=0.9, valid_cosine=0.2, valid_perplexity=5.0, entropy_given_band=1.9)]
FINETUNING = [dict(step=4, loss=2.0, accuracy=0.5), dict(step=4, test_score=0.4, test_loss=2.5),
              dict(accuracy=0.4, mAP=0.5, recordings=9)]

def write_log(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

def lines_of(figure, title):
    """The lines of a panel as lists of points."""
    (panel,) = [axes for axes in figure.axes if axes.get_title("left") == title]
    return [list(zip(*map(list, line.get_data()))) for line in panel.lines if len(line.get_xdata())]

def test_a_log_is_read_whatever_became_of_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo\n\n3\n{"step": 3, "loss": null}\n'
                    '{"step": 1, "loss": 2}')
    steps, values = plots.series(plots.read_log(path), "other", "loss")
    assert steps == [1, 3] and values[0] == 2 and math.isnan(values[1])  # step 1 was taken again
    assert plots.read_log(tmp_path / "none.jsonl") == []

def test_logs_are_named_by_what_tells_them_apart(tmp_path):
    paths = [write_log(tmp_path / name, []) for name in ("a/mam_iter1.jsonl", "b/c/mam_iter1.jsonl")]
    assert list(plots.read_logs(paths)) == ["a/mam_iter1", "b/c/mam_iter1"]
    assert list(plots.read_logs(paths[:1])) == ["mam_iter1"]

def test_what_is_drawn_is_what_the_logs_say(tmp_path):
    pytest.importorskip("matplotlib")
    rows = dict(mam_iter1=PRETRAINING, tokenizer_iter2=TOKENIZER, finetune_x=FINETUNING)
    paths = [write_log(tmp_path / f"{name}.jsonl", log) for name, log in rows.items()]
    figure = curves.draw(plots.read_logs(paths))
    loss = lines_of(figure, "loss")
    assert loss == [[(20, 3.1)], [(0, 3.5), (20, 3.5)], [(10, 4), (20, 3)],
                    [(5, 0.9)], [(5, 1)], [(4, 2.5)], [(4, 2)]]         # a tokenizer's loss has no such floor
    assert lines_of(figure, "accuracy") == [[(20, 0.15)], [(10, 0.1), (20, 0.2)], [(4, 0.4)], [(4, 0.5)]]
    assert lines_of(figure, "perplexity of the codes") == [[(0, 50), (20, 50)], [(5, 5)], [(5, 6)]]
    assert lines_of(figure, "cosine with the teacher") == [[(5, 0.2)], [(5, 0.1)]]
    assert lines_of(figure, "learning rate") == [[(10, 0.1), (20, 0)]]
    assert lines_of(figure, "seconds of audio per second") == [[(10, 9), (20, 8)]]

def test_panels_without_data_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    figure = curves.draw(plots.read_logs([write_log(tmp_path / "a.jsonl", FINETUNING[:1])]))
    assert [axes.get_title("left") for axes in figure.axes] == ["loss", "accuracy"]

def test_scores_are_those_of_the_tests_and_probes_all_folds_together(tmp_path):
    logs = dict(linear_x_fold1=[dict(accuracy=0.2, mAP=0.9), dict(accuracy=0.4, mAP=0.9)],  # run again
                linear_x_fold2=[dict(accuracy=0.6)], linear_tags=[dict(mAP=0.7)], mam_iter1=PRETRAINING,
                bench=[dict(piece="encoder", seconds=0.1)])
    logs["linear_x_fold1.1"] = [dict(accuracy=0.3)]             # an earlier run, which was kept
    assert curves.scores(logs) == {"linear_x": [0.4, 0.6], "linear_x.1": [0.3], "linear_tags": [0.7],
                                   "mam_iter1, probe before": [0.3], "mam_iter1, probe after": [0.6]}

def test_the_command_draws_one_line_results_and_refuses_what_is_no_log(tmp_path):
    pytest.importorskip("matplotlib")
    result = write_log(tmp_path / "linear.jsonl", [dict(accuracy=0.5, mAP=0.6, minutes=1.0)])
    curves.main([result, "--out", str(tmp_path / "new/curves.png")])
    assert (tmp_path / "new/curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="nothing to draw"):
        curves.main([write_log(tmp_path / "bench.jsonl", [dict(piece="matrix")])])
    with pytest.raises(UserError, match="none.jsonl: no such log"):
        curves.main([str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="which"):
        curves.main([])

def test_live_waits_for_a_log_and_draws_it_again_as_it_grows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    log, out = tmp_path / "mam.jsonl", tmp_path / "live.png"
    pictures = []

    def train(seconds):
        assert seconds == 2
        pictures.append(out.read_bytes() if out.exists() else b"")
        if len(pictures) == 3:
            raise KeyboardInterrupt
        write_log(log, PRETRAINING[: len(pictures) + 1])
    monkeypatch.setattr(curves.time, "sleep", train)
    with pytest.raises(KeyboardInterrupt):
        curves.main([str(log), "--live", "--seconds", "2", "--out", str(out)])
    assert pictures[0] == b"" and len(set(pictures)) == 3

def test_a_run_of_pretraining_logs_what_is_drawn(tmp_path, ragged):
    train_mam.main(data=ragged, probe=ragged, model="micro", max_steps=2, log_every=1, batch_seconds=8,
                   out_dir=str(tmp_path), workers=0)
    logs = plots.read_logs([tmp_path / "mam_iter1.jsonl"])
    drawn = {title for title in plots.PANELS if plots.has(logs, title)}
    assert drawn == set(plots.PANELS) - {"cosine with the teacher"}
    assert len(curves.scores(logs)) == 2 and plots.floor(logs["mam_iter1"])[0] == [0, 2]

def test_without_matplotlib_the_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.new_figure(1, 1)
