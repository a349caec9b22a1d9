"""Inference, exported programs, the wrappers for benchmark suites, and what bench.py measures."""
import contextlib
import json
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import common
from audio import fbank, num_tokens, patchify, read_audio
from common import UserError
from conftest import MICRO
from model import Classifier, Encoder, MaskedAudioModel, export_official, load_official, random_mask
from tokenizer import load_tokenizer
from tools import bench, hear_beats, infer, peers

# ---- infer.py

@pytest.fixture
def sounds(write_wav, tmp_path):
    """A folder of three sounds, one of them long, and a file that is none."""
    rng = np.random.default_rng(0)
    write_wav("in/stereo.flac", 0.1 * rng.standard_normal((44100, 2)), 44100)
    write_wav("in/below/long.wav", 0.1 * rng.standard_normal(8000 * 13), 8000)
    write_wav("in/one_sample.wav", 0.1 * rng.standard_normal(1))
    (tmp_path / "in/text.wav").write_text("no sound")
    return tmp_path / "in"

@pytest.fixture
def ask(official):
    """ask("encoder" | "finetuned" | "tokenizer", sounds and flags): python -m tools.infer"""
    return lambda kind, *arguments: infer.main([str(official(kind)), *map(str, arguments)])

def test_a_classifier_names_classes(ask, sounds, capsys):
    ask("finetuned", sounds, "--top", 2)
    out, err = capsys.readouterr()
    assert out.count("/m/") == 6
    assert "text.wav: cannot be read" in err
    ask("finetuned", sounds / "below/long.wav", "--per-window", "--top", 1)
    out, _ = capsys.readouterr()
    assert "long.wav 5.0 s" in out

def test_an_encoder_gives_features(ask, sounds, tmp_path):
    ask("encoder", sounds, "--out", tmp_path)
    assert np.load(tmp_path / "stereo.npy").shape == (48, 64)
    assert np.load(tmp_path / "one_sample.npy").shape == (8, 64)
    assert np.load(tmp_path / "below/long.npy").shape == (496 + num_tokens(48000), 64)
    ask("finetuned", sounds, "--out", tmp_path, "--pool", "--layer", 1)
    assert np.load(tmp_path / "below/long.npy").shape == (64,)

def test_a_tokenizer_gives_codes(ask, official, sounds, tmp_path):
    ask("tokenizer", sounds / "below", "--out", tmp_path)
    wav = torch.from_numpy(read_audio(sounds / "below/long.wav"))
    tokenizer = load_tokenizer(official("tokenizer"))
    windows = [tokenizer.encode(part[None])[0] for part in wav.split(160_000)]
    assert np.array_equal(np.load(tmp_path / "long.npy"), torch.cat(windows))

@pytest.mark.parametrize("kind, arguments, message", [
    ("tokenizer", ["--pool"], "is a tokenizer"),
    ("encoder", ["--layer", 3], "--layer 3: .* has 0 to 2"),
    ("encoder", ["--class_csv", "x.csv"], "no classes"),
    ("encoder", ["--window", 5, "--hop", 6], "--hop 6.0"),
    ("encoder", ["text.wav"], "no usable audio in nowhere.wav, text.wav")])
def test_what_cannot_be_is_said_in_one_line(ask, sounds, monkeypatch, kind, arguments, message):
    monkeypatch.chdir(sounds)
    with pytest.raises(UserError, match=message) as error:
        ask(kind, "nowhere.wav", *arguments)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("kind", ["encoder", "finetuned"])
def test_an_exported_program_takes_any_batch_and_length(official, kind):
    model = load_official(official(kind))
    answer = model.predict if kind == "finetuned" else model.features
    program = infer.export_program(model).module()
    for lengths in ([16000], [50001, 20000, 7000, 33333]):
        wav, lengths = torch.randn(len(lengths), max(lengths)), torch.tensor(lengths)
        torch.testing.assert_close(program(wav, lengths), answer(wav, lengths), atol=1e-4, rtol=1e-4)

# ---- benchmark suites

@pytest.fixture
def checkpoint(random_encoder, tmp_path):
    export_official(random_encoder, tmp_path / "encoder.pt")
    return str(tmp_path / "encoder.pt")

def test_x_ares_finds_an_encoder(random_encoder, checkpoint, monkeypatch):
    """As its audio_encoder_checker and its loader want it; its tasks feed clips of up to ten minutes."""
    monkeypatch.setenv("BEATS_CHECKPOINT", checkpoint)
    from tools import xares_encoder
    assert [name for name in dir(xares_encoder) if name.endswith("Encoder")] == ["BeatsEncoder"]
    encoder = xares_encoder.BeatsEncoder()
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 32, 20)
    long = 0.1 * torch.randn(2, 60 * 16000)
    x = encoder(long)
    assert x.shape == (2, num_tokens(60 * 16000), 32)
    chunk = random_encoder.features(long[:, 62 * 2560 : 124 * 2560 + 240])[0]
    assert torch.allclose(x[:, 496:992], chunk, atol=3e-3)          # rounding of quiet bins, amplified

@pytest.mark.parametrize("sounds, seconds", [(16, 2.0), (8, 3.74), (1, 25.0), (2, 0.1)])
def test_hear_s_contract(checkpoint, sounds, seconds):
    """What hear-validator asserts, on its sounds; on one longer than a chunk, one shorter than a patch."""
    model = hear_beats.load_model(checkpoint)
    audio = torch.rand(sounds, int(seconds * 16000)) * 2 - 1
    x, times = hear_beats.get_timestamp_embeddings(audio, model)
    scene = hear_beats.get_scene_embeddings(audio, model)
    assert x.shape == (sounds, times.shape[1], model.timestamp_embedding_size)
    assert scene.shape == (sounds, model.scene_embedding_size)
    for values in (x, times, scene):
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
    assert (times.diff() == 40).all()                                   # milliseconds
    assert seconds * 1000 - 250 < times.max() <= max(seconds * 1000, 87.5)

class Energy(torch.nn.Module):
    """An encoder by which a click moves only the tokens whose 175 ms hold it: attention would mix."""
    def features(self, wav):
        return patchify(fbank(wav)).mean(-1, keepdim=True), None

@pytest.fixture
def click():
    """A minute with a click after 35 s, in the fourth of six chunks."""
    audio = torch.zeros(1, 60 * 16000)
    audio[0, 35 * 16000] = 1
    return audio

def test_hear_s_timestamps_are_where_the_sound_is(click):
    x, times = hear_beats.get_timestamp_embeddings(click, Energy())
    moved = times[0, (x[0, :, 0] > x[0].min() + 0.1)]
    assert (moved - 35_000).abs().max() <= 87.5 + 1
    assert len(moved) in (4, 5)

def test_x_ares_s_tokens_are_where_the_sound_is(click, checkpoint, monkeypatch):
    monkeypatch.setenv("BEATS_CHECKPOINT", checkpoint)
    from tools import xares_encoder
    encoder = xares_encoder.BeatsEncoder()
    encoder.model = Energy()
    x = encoder(click)[0, :, 0]
    moved = (x > x.min() + 0.1).nonzero()[:, 0] * encoder.hop_size_in_ms        # begin of each token's 20 ms
    assert len(moved) in (8, 16)
    assert (moved // 160 * 160 + 87.5 - 35_000).abs().max() <= 87.5 + 1

# ---- bench.py

def test_every_piece_is_timed_and_counted(toy, tmp_path):
    out = tmp_path / "bench.jsonl"
    bench.main(model="micro", clips=1, seconds=2.56, runs=1, data=toy, out=str(out), device="cpu")
    lines = {line.get("piece"): line for line in map(json.loads, out.read_text().splitlines())}
    assert set(lines) == {None, "matrix", *bench.PIECES}             # the first tells the flags
    assert lines["mam"]["gflop"] > lines["encoder"]["gflop"] > 0
    assert lines["matrix"]["limit"] == pytest.approx(1)

def test_no_step_waits_for_the_device(monkeypatch):
    """On the device "meta" there are shapes and no numbers: asking it for one (.item(), nonzero, x[mask]) is
    an error. It does not see copies to the device that wait, and knows neither autocast nor fused kernels."""
    monkeypatch.setattr(common, "make_optimizer", lambda model, *_: torch.optim.AdamW(model.parameters()))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    wanted = ["fbank", "encoder", *bench.STEPS]
    pieces = bench.pieces_of("micro", wanted, bench.Config(clips=2, seconds=2.56), torch.device("meta"))
    for piece in pieces.values():
        piece()

def test_peers_that_are_unknown_or_missing_are_explained(monkeypatch):
    with pytest.raises(UserError, match="--peer fairseq: choose one of openbeats, espnet"):
        peers.pieces_of("fairseq", *[None] * 3)
    monkeypatch.setitem(sys.modules, "openbeats", None)
    with pytest.raises(UserError, match="--peer openbeats: .*; tools/peers.py says how to install it"):
        peers.pieces_of("openbeats", *[None] * 3)

@pytest.mark.slow
def test_compiling_breaks_nowhere_and_ends_after_two_lengths():
    """One graph for the first shape, one for all others: whole models in one piece, whatever lengths come."""
    def inputs(B, T, padded):
        valid = torch.arange(T) < torch.randint(T // 2 if padded else T, T + 1, (B, 1))
        return torch.randn(B, T, 256), valid if padded else None, *random_mask(torch.rand(B, T), valid, 0.75)

    for model, padded, taken in ((MaskedAudioModel(Encoder(MICRO), 64, 2, 16), False, 4),
                                 (Classifier(Encoder(MICRO), ["a", "b"]), True, 2),
                                 (Classifier(Encoder(MICRO), ["a", "b"]), True, 3)):
        torch._dynamo.reset()
        counters.clear()
        model.compile(backend="aot_eager")
        for number, (B, T) in enumerate([(4, 128), (4, 128), (3, 256), (5, 64), (6, 496), (7, 40), (2, 320)]):
            model(*inputs(B, T, padded)[:taken]).float().sum().backward()
            assert counters["stats"]["unique_graphs"] == (1 if number < 2 else 2)
            assert not counters["graph_break"]
