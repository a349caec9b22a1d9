"""Inference, exported programs, the wrappers for benchmark suites, and what bench.py measures."""
import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import common
from audio import fbank, num_tokens, patchify, read_audio
from common import UserError
from conftest import MICRO, ROOT
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
    assert out.count("%") == 6
    assert "text.wav: cannot be read" in err
    ask("finetuned", sounds / "below/long.wav", "--per-window", "--top", 1)
    out, _ = capsys.readouterr()
    assert "long.wav 0.0 s" in out
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

def test_inference_needs_no_packs():
    code = "import sys; sys.modules['data'] = None; import tools.infer"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

@pytest.mark.parametrize("kind", ["encoder", "finetuned"])
def test_an_exported_program_takes_any_batch_and_length(official, kind):
    model = load_official(official(kind))
    program = infer.export_program(model).module()
    for lengths in ([16000], [50001, 20000, 7000, 33333]):
        wav, lengths = torch.randn(len(lengths), max(lengths)), torch.tensor(lengths)
        if kind == "finetuned":
            assert torch.allclose(program(wav, lengths), model.predict(wav, lengths), atol=1e-4)
        else:
            (x, valid), (theirs, theirs_valid) = model.features(wav, lengths), program(wav, lengths)
            assert torch.equal(valid, theirs_valid)
            assert torch.allclose(x[valid], theirs[valid], atol=1e-4)

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
    assert encoder(torch.randn(50000)).shape == (1, num_tokens(50000), 32)

    long = 0.1 * torch.randn(2, 60 * 16000 + 5000)
    x = encoder(long)
    assert x.shape == (2, 6 * 496 + num_tokens(16000), 32)          # the rest is padded to a second
    assert not x.requires_grad
    assert torch.allclose(x[:, 496:992], random_encoder.features(long[:, 160000:320000])[0], atol=1e-5)

@pytest.mark.parametrize("sounds, seconds", [(16, 2.0), (8, 3.74), (1, 25.0), (2, 0.1)])
def test_hear_s_contract(checkpoint, sounds, seconds):
    """What hear-validator asserts, on its sounds; on one longer than a chunk, one shorter than a patch."""
    model = hear_beats.load_model(checkpoint)
    audio = torch.rand(sounds, int(seconds * 16000)) * 2 - 1
    x, times = hear_beats.get_timestamp_embeddings(audio, model)
    scene = hear_beats.get_scene_embeddings(audio, model)
    assert x.shape == (sounds, times.shape[1], model.timestamp_embedding_size)
    assert scene.shape == (sounds, model.scene_embedding_size)
    assert x.dtype == times.dtype == scene.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert torch.isfinite(scene).all()
    assert (times.diff() == 40).all()                                   # milliseconds
    assert (times[:, -1] <= max(seconds * 1000, 87.5)).all()
    assert (times[:, -1] > seconds * 1000 - 250).all()                  # they reach the end

def test_hear_s_timestamps_are_where_the_sound_is():
    """A click moves the embeddings whose 175 ms hold it. Seen by the filter bank, for attention would mix."""
    class Energy(torch.nn.Module):
        def features(self, wav):
            return patchify(fbank(wav)).mean(-1, keepdim=True), None

    audio, click = torch.zeros(1, 16000 * 12), 10.5         # seconds, in the second chunk
    audio[0, int(click * 16000)] = 1
    x, times = hear_beats.get_timestamp_embeddings(audio, Energy())
    moved = times[0, (x[0, :, 0] > x[0].min() + 0.1)]
    assert (moved - click * 1000).abs().max() <= 87.5 + 1
    assert len(moved) in (4, 5)

# ---- bench.py

FLAGS = dict(model="micro", clips=1, seconds=2.56, runs=1, device="cpu")

def test_every_piece_is_timed_and_counted(toy, tmp_path):
    out = tmp_path / "bench.json"
    results = bench.main(data=toy, out=str(out), **FLAGS)
    lines = {line["piece"]: line for line in results}
    assert set(lines) == {*bench.PIECES, "matrix"}
    assert len(lines["encoder"]["seconds"]) == 1
    assert lines["mam2-live"]["gflop"] > lines["mam2"]["gflop"] > 0
    assert lines["matrix"]["share_of_limit"] == pytest.approx(1)
    assert json.loads(out.read_text())["results"] == results

def test_no_step_waits_for_the_device(monkeypatch):
    """On the device "meta" there are shapes and no numbers: asking it for one (.item(), nonzero, x[mask]) is
    an error. It does not see copies to the device that wait, and knows neither autocast nor fused kernels."""
    def plain(model, lr, weight_decay):
        return torch.optim.AdamW(model.parameters(), lr)
    monkeypatch.setattr(common, "make_optimizer", plain)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    pieces = bench.pieces_of("micro", bench.Config(clips=2, seconds=2.56), torch.device("meta"))
    assert set(pieces) == set(bench.PIECES) - {"data"}
    for piece in pieces.values():
        piece()

def test_memory_is_less_with_recompute_and_holds_at_least_the_weights(tmp_path):
    results = bench.main(memory=True, out=str(tmp_path / "bench.json"), **FLAGS | dict(model="tiny"))
    plain, recompute = [line for line in results if line["step"] == "finetune"]
    assert recompute["mb_per_second"] < 0.75 * plain["mb_per_second"]
    assert recompute["seconds_in_16_gb"] > plain["seconds_in_16_gb"]
    weights = 16e-3 * common.millions(Encoder(bench.PRESETS["tiny"]))       # with gradients and moments
    assert weights < plain["fixed_gb"] + 0.005 < 2 * weights

def test_peers_that_are_unknown_or_missing_are_explained(monkeypatch):
    with pytest.raises(UserError, match="--peer fairseq: choose one of openbeats, espnet"):
        bench.main(peer="fairseq", **FLAGS)
    monkeypatch.setitem(sys.modules, "openbeats", None)
    with pytest.raises(UserError, match="--peer openbeats: .*; tools/peers.py says how to install it"):
        peers.pieces_of("openbeats", *[None] * 4)

@pytest.mark.slow
def test_compiling_breaks_nowhere_and_ends_after_two_lengths():
    """One graph for the first shape, one for all others: whole models in one piece, whatever lengths come."""
    def pretrained(B, T):
        keep, masked = random_mask(torch.rand(B, T), torch.ones(B, T, dtype=torch.bool), 0.75)
        return torch.randn(B, T, 256), None, keep, masked

    def padded(B, T):
        lengths = torch.full((B, 1), T)
        lengths[-1] = T // 2
        return torch.randn(B, T, 256), torch.arange(T) < lengths

    def patchout(B, T):
        patches, valid = padded(B, T)
        return patches, valid, random_mask(torch.rand(B, T), valid, 0.6)[0]

    for model, inputs in ((MaskedAudioModel(Encoder(MICRO), 64, 2, 16), pretrained),
                          (Classifier(Encoder(MICRO), ["a", "b"]), padded),
                          (Classifier(Encoder(MICRO), ["a", "b"]), patchout)):
        torch._dynamo.reset()
        counters.clear()
        model.compile(backend="aot_eager")
        for number, (B, T) in enumerate([(4, 128), (4, 128), (3, 256), (5, 64), (6, 496), (7, 40), (2, 320)]):
            model(*inputs(B, T)).float().sum().backward()
            assert counters["stats"]["unique_graphs"] == (1 if number < 2 else 2)
            assert not counters["graph_break"]
