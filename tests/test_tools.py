"""Inference, exported programs, the wrappers for benchmark suites, and what bench.py measures."""
import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import common
from audio import ROW, fbank, load_audio, num_tokens, patchify, read_audio, samples_of
from common import UserError
from conftest import MICRO, ROOT
from model import Classifier, Encoder, MaskedAudioModel, export_official, load_official, random_mask
from tokenizer import load_any
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
    assert err.splitlines()[-1] == "1 of 4 skipped"
    ask("finetuned", sounds / "below/long.wav", "--per-window", "--top", 1)
    out, _ = capsys.readouterr()
    assert "long.wav 0.00 s" in out and "long.wav 4.96 s" in out     # 31 rows of 160 ms

def test_an_encoder_gives_features(ask, sounds, tmp_path):
    ask("encoder", sounds, "--out", tmp_path)
    assert np.load(tmp_path / "stereo.npy").shape == (48, 64)
    assert np.load(tmp_path / "one_sample.npy").shape == (8, 64)
    assert np.load(tmp_path / "below/long.npy").shape == (num_tokens(13 * 16000), 64)
    ask("finetuned", sounds, "--out", tmp_path, "--pool", "--layer", 1)
    assert np.load(tmp_path / "below/long.npy").shape == (64,)

@pytest.mark.parametrize("kind", ["encoder", "tokenizer"])
@torch.no_grad()
def test_tokens_are_those_of_a_naive_loop(ask, official, sounds, tmp_path, kind):
    ask(kind, sounds / "below", "--out", tmp_path, "--window", 3.2)
    wav = torch.from_numpy(read_audio(sounds / "below/long.wav"))[None]
    model = load_any(official(kind))
    listen = model.encode if kind == "tokenizer" else lambda x: model.features(x)[0]
    rows = num_tokens(wav.shape[1]) // 8                             # 81: three windows of 20, then one of 21
    bounds = [0, 20, 40, 60, rows]
    tokens = [listen(wav[:, first * ROW : first * ROW + samples_of(last - first)])[0]
              for first, last in zip(bounds, bounds[1:])]
    assert np.allclose(np.load(tmp_path / "long.npy"), torch.cat(tokens), atol=1e-4)

@torch.no_grad()
def test_windows_weigh_by_their_tokens(ask, official, sounds, tmp_path, capsys):
    wav, _ = load_audio(sounds / "below/long.wav")
    model = load_any(official("encoder"))
    x = [model.features(wav[:, first * ROW : first * ROW + samples_of(rows)])[0][0]
         for first, rows in ((0, 30), (15, 30), (30, 30), (45, 36))]  # 81 rows; a rest of 6 joins the last
    expect = torch.cat(x).mean(0)
    flags = ["--out", tmp_path, "--window", 4.8, "--hop", 2.4]
    ask("encoder", sounds / "below", "--pool", *flags)
    assert np.allclose(np.load(tmp_path / "long.npy"), expect, atol=1e-4)

    ask("encoder", sounds / "below", "--per_window", "--pool", *flags)
    each = np.load(tmp_path / "long.npy")
    assert np.allclose(each, torch.stack([tokens.mean(0) for tokens in x]), atol=1e-4)

    classifier = load_any(official("finetuned"))                     # of 9.92 s, every 4.96 s: 62 rows and 50
    first = classifier.predict(wav[:, : samples_of(62)])
    last = classifier.predict(wav[:, 31 * ROW : samples_of(81)])
    best = ((62 * first + 50 * last) / 112).max().item()
    capsys.readouterr()
    ask("finetuned", sounds / "below/long.wav", "--top", 1)
    assert f"{best:6.1%}" in capsys.readouterr().out

    ask("tokenizer", sounds / "below", "--per_window", *flags)
    codes = np.load(tmp_path / "long.npy")
    assert codes.shape == (4, 36 * 8)
    assert (codes[:3, 240:] == -1).all() and (codes[:3, :240] >= 0).all() and (codes[3] >= 0).all()

def test_a_few_samples_more_change_nothing(ask, write_wav, tmp_path):
    """Neither a rest of less than a row, nor one of a few rows, weighs as a window does."""
    wav = 0.1 * np.random.default_rng(0).standard_normal(170_000)
    wav[158_960:] *= 3                                               # after the 62nd row
    for name, n in (("a", 158_960), ("b", 160_000), ("c", 161_519), ("d", 164_080)):
        write_wav(f"in/{name}.wav", wav[:n], subtype="FLOAT")
    ask("encoder", tmp_path / "in", "--pool")
    a, b, c, d = (torch.from_numpy(np.load(tmp_path / f"in/{name}.npy")) for name in "abcd")
    assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.cosine_similarity(a, d, 0) > 0.99

class Energy(torch.nn.Module):
    """An encoder by which a click moves only the tokens whose 175 ms hold it: attention would mix."""
    cfg = types.SimpleNamespace(layers=1)

    def features(self, wav, lengths=None, layer=None):
        x = patchify(fbank(wav)).mean(-1, keepdim=True)
        return x, torch.ones(x.shape[:2], dtype=torch.bool)

@pytest.mark.parametrize("flags", [[], ["--window", 5, "--hop", 2], ["--window", 0.16], ["--window", 60]])
def test_a_click_is_found_where_it_is(write_wav, tmp_path, monkeypatch, flags):
    wav = 0.01 * np.random.default_rng(0).standard_normal(40 * 16000)
    wav[35 * 16000] = 1
    write_wav("a.wav", wav)
    monkeypatch.setattr(infer, "load_any", lambda *_: Energy())
    infer.main(["x.pt", str(tmp_path / "a.wav"), *map(str, flags)])
    x = np.load(tmp_path / "a.npy")
    assert x.shape == (num_tokens(40 * 16000), 1)
    whole = patchify(fbank(torch.from_numpy(read_audio(tmp_path / "a.wav"))[None])).mean(-1)[0]
    assert np.allclose(x[:, 0], whole, atol=1e-3)                    # each token once, in its place
    loudest = x.reshape(-1, 8).mean(1).argmax()
    assert abs(loudest * 160 + 87.5 - 35_000) <= 87.5

@pytest.mark.parametrize("rows, hop", [(6, 3), (6, 6), (7, 1), (5, 2)])
def test_where_windows_overlap_a_token_is_heard_with_most_around_it(rows, hop):
    firsts = range(0, 4 * hop, hop)
    parts = [(first, rows, torch.full((rows * 8,), first)) for first in firsts]
    chosen = torch.cat(list(infer.strung(parts))).view(-1, 8)
    assert len(chosen) == firsts[-1] + rows
    for row, (first, *_) in enumerate(chosen.tolist()):
        around = {first: min(row - first, first + rows - 1 - row) for first in firsts}
        assert around[first] == max(around.values())

def test_a_long_recording_is_never_in_memory_as_a_whole(write_wav, tmp_path, monkeypatch):
    """What is asked of the file runs ahead of what the model has heard by a minute and a batch at most."""
    asked, heard = [], []
    def stream(path, notes):
        for minute in range(10):
            asked.append(minute)
            yield np.zeros(60 * 16000, np.float32)
    def features(self, wav, lengths=None, layer=None):
        heard.append(wav.numel() / 16000 / 60)
        assert len(asked) - sum(heard) < 1 + 2 * 8 * 10 / 60
        return Energy.features(self, wav)
    model = Energy()
    model.features = types.MethodType(features, model)
    monkeypatch.setattr(infer, "read_pieces", stream)
    monkeypatch.setattr(infer, "load_any", lambda *_: model)
    for flags in ([], ["--pool"]):
        infer.main(["x.pt", "a.wav", "--out", str(tmp_path), *flags])
        asked.clear(), heard.clear()

@pytest.mark.parametrize("kind, arguments, message", [
    ("tokenizer", ["--pool"], "is a tokenizer"),
    ("encoder", ["--layer", 3], "--layer 3: .* has 0 to 2"),
    ("encoder", ["--layer", -2], "--layer -2"),
    ("encoder", ["--class_csv", "x.csv"], "no classes"),
    ("encoder", ["--window", 5, "--hop", 6], "--hop 6.0"),
    *[("encoder", ["--window", value], "--window") for value in ("0", "-1", "nan", "inf", "1e9", "601")],
    *[("encoder", ["--hop", value], "--hop") for value in ("-1", "nan", "inf")],
    *[("finetuned", ["--top", value], "--top") for value in (0, -1)],
    *[("encoder", ["--fbank", value], "--fbank .*: give mean,std") for value in ("1", "1,0", "a,b", "1,nan")],
    ("encoder", ["--out", "text.wav"], "text.wav: cannot be written .* another folder with --out"),
    ("encoder", ["text.wav"], "no usable audio in nowhere.wav, text.wav")])
def test_what_cannot_be_is_said_in_one_line(ask, sounds, monkeypatch, kind, arguments, message):
    monkeypatch.chdir(sounds)
    with pytest.raises(UserError, match=message) as error:
        ask(kind, "nowhere.wav", *arguments)
    assert "\n" not in str(error.value)

def test_statistics_of_the_filter_bank_can_be_given(ask, sounds, tmp_path):
    ask("encoder", sounds / "stereo.flac", "--out", tmp_path / "a")
    ask("encoder", sounds / "stereo.flac", "--out", tmp_path / "b", "--fbank", "15.41663,6.55582")
    ask("encoder", sounds / "stereo.flac", "--out", tmp_path / "c", "--fbank", "10,5")
    a, b, c = (np.load(tmp_path / name / "stereo.npy") for name in "abc")
    assert np.array_equal(a, b) and not np.allclose(a, c, atol=1e-2)

def test_two_sounds_of_one_name(ask, write_wav, tmp_path, capsys):
    for name in ("rec.wav", "REC.flac", "b/rec.flac", "other.wav"):
        write_wav(f"in/{name}", 0.1 * np.ones(8000))
    ask("finetuned", tmp_path / "in", "--top", 1)                    # classes: nothing is written
    assert capsys.readouterr().out.count("/rec.") == 2
    ask("encoder", tmp_path / "in", "--out", tmp_path / "out")
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.npy"))
    assert names == ["REC.flac.npy", "b/rec.npy", "other.npy", "rec.wav.npy"]
    with pytest.raises(UserError, match="would hold .*in/rec.wav and .*b/rec.wav"):
        write_wav("b/rec.wav", np.ones(8000))
        ask("encoder", tmp_path / "in/rec.wav", tmp_path / "b/rec.wav", "--out", tmp_path / "out")

def test_a_folder_that_takes_no_files_is_said_before_anything_is_heard(ask, sounds, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(infer, "read_pieces", None)
    with pytest.raises(UserError, match="in: cannot be written .Permission denied.; name another .* --out"):
        ask("encoder", sounds)

def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_no_half_file(ask, sounds, tmp_path, monkeypatch):
    def fill(path, write):
        def full(file):
            write(file)
            raise OSError(28, "No space left on device")
        common.write_whole(path, full)
    monkeypatch.setattr(infer, "write_whole", fill)
    for flags in ([], ["--pool"]):
        with pytest.raises(UserError, match="npy: cannot be written .No space left"):
            ask("encoder", sounds / "stereo.flac", "--out", tmp_path / "out", *flags)
        assert not list((tmp_path / "out").iterdir())

def test_of_a_sound_that_breaks_off_nothing_is_left(ask, sounds, tmp_path, capsys):
    whole = (sounds / "stereo.flac").read_bytes()
    (sounds / "torn.flac").write_bytes(whole[: len(whole) // 2])
    for flags in ([], ["--pool"]):
        ask("encoder", sounds / "torn.flac", sounds / "stereo.flac", "--out", tmp_path / "out", *flags)
        assert "skipped: " in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["stereo.npy"]

@pytest.mark.filterwarnings("ignore:samples are in")
def test_numbers_that_are_not_finite_are_not_written(ask, sounds, write_wav, tmp_path, capsys):
    wav = np.zeros(16000, np.float32)
    wav[3000:4000] = 3e37 * np.random.default_rng(0).standard_normal(1000)
    huge = write_wav("huge.wav", wav, subtype="FLOAT")
    ask("encoder", huge, sounds / "stereo.flac", "--out", tmp_path / "out")
    _, err = capsys.readouterr()
    assert "skipped: " in err and "huge.wav: the model gives NaN or infinite numbers" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stereo.npy"]

def test_what_was_done_to_a_sound_is_said_unless_it_is_ordinary(ask, write_wav, tmp_path, capsys):
    x = 0.1 * np.random.default_rng(0).standard_normal(16000)
    write_wav("in/a.wav", np.stack([x, x], 1), 44100)
    write_wav("in/b.wav", np.stack([x, -x], 1), 44100)
    ask("encoder", tmp_path / "in", "--pool")
    err = capsys.readouterr().err
    assert "a.wav" not in err
    assert f"note: {tmp_path}/in/b.wav: cancelled (" in err

def test_names_that_are_not_utf_8_are_heard(ask, write_wav, tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    os.rename(write_wav("cafe.wav", np.ones(16000)), path)
    ask("encoder", path, "--pool")
    capsys.readouterr().out.encode("ascii")
    assert os.path.exists(path.removesuffix(".wav") + ".npy")

def test_linked_folders_are_walked_once_and_other_endings_counted(ask, sounds, tmp_path, capsys):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(sounds)
    (tmp_path / "root/a.m4a").touch()
    ask("encoder", tmp_path / "root", "--out", tmp_path / "out", "--pool")
    out, err = capsys.readouterr()
    assert out.count(" -> ") == 3 and (tmp_path / "out/link/below/long.npy").exists()
    assert "left out: .m4a 1" in err

def imports_of(path):
    """Names of what a file imports at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module

def test_inference_imports_nothing_that_windows_lacks():
    names, todo = set(), [ROOT / "tools/infer.py"]
    while todo:
        for name in set(imports_of(todo.pop())) - names:
            names.add(name)
            path = ROOT / f"{name.replace('.', '/')}.py"
            todo += [path] if path.exists() else []
    assert {"audio", "model", "tokenizer", "common"} <= names
    assert not names & {"fcntl", "resource", "pwd", "grp", "termios", "data", "recipes.packs"}

@pytest.mark.parametrize("error, message", [
    (KeyboardInterrupt(), "interrupted; .*whole"), (MemoryError(), "error: the memory is full; .*--window"),
    (UserError("this"), "error: this"), (OSError(5, "Input/output error"), "error: .*output error")])
def test_what_ends_inference_is_one_line(monkeypatch, error, message):
    def fail(argv):
        raise error
    monkeypatch.setattr(infer, "main", fail)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit, match=message) as stop:
        infer.run(["x.pt", "a.wav"])
    assert "\n" not in stop.value.code

@pytest.mark.parametrize("kind", ["encoder", "finetuned"])
def test_an_exported_program_takes_any_batch_and_length(official, kind):
    model = load_official(official(kind))
    answer = model.predict if kind == "finetuned" else model.features
    program = infer.export_program(model).module()
    every = [[5360 + 160 * frames] for frames in range(17) if kind == "encoder"]   # mod 16
    for lengths in (*every, [5360, 5360], [5999, 1], [16000], [50001, 20000, 7000, 33333]):
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
    window = random_encoder.features(long[:, 62 * 2560 : 124 * 2560 + 240])[0]
    assert torch.allclose(x[:, 496:992], window, atol=3e-3)          # rounding of quiet bins, amplified

@pytest.mark.parametrize("sounds, seconds", [(16, 2.0), (8, 3.74), (1, 25.0), (2, 0.1)])
def test_hear_s_contract(checkpoint, sounds, seconds):
    """What hear-validator asserts, on its sounds; on one longer than a window, one shorter than a patch."""
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

@pytest.fixture
def click():
    """A minute with a click after 35 s, in the fourth of six windows."""
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

def test_benchmark_suites_are_told_of_other_layouts(checkpoint, monkeypatch):
    monkeypatch.setenv("BEATS_CHECKPOINT", checkpoint)
    from tools import xares_encoder
    encoder, model = xares_encoder.BeatsEncoder(), hear_beats.load_model(checkpoint)
    assert torch.equal(encoder(torch.ones(16000)), encoder(torch.ones(1, 16000)))
    for audio in (torch.zeros(2, 1, 16000), torch.zeros(1, 16000).short()):
        for function in (encoder, lambda x: hear_beats.get_timestamp_embeddings(x, model)):
            with pytest.raises(ValueError, match=r"float tensor .clips, samples."):
                function(audio)
    for function in (hear_beats.get_timestamp_embeddings, hear_beats.get_scene_embeddings):
        with pytest.raises(ValueError, match=r"a single clip is wav\[None\]"):
            function(torch.zeros(16000), model)

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

def test_who_reads_only_the_first_of_the_results_gets_no_error(official, write_wav):
    sound = write_wav("a.wav", np.zeros(16000))
    command = f"{sys.executable} -m tools.infer {official('finetuned')} {sound} | true"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
