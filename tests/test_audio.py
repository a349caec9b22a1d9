"""From a sound file to patches: against the official filter bank, naive loops, files of soundfile."""
import math
import sys

import numpy as np
import pytest
import torch

import audio
from audio import (audio_files, fbank, load_audio, num_tokens, patchify, read_audio, resample,
                   rows_in, rows_of, samples_of, windows)
from common import UserError

def sine(seconds, rate=16000, hz=440.0):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)

# ---- filter bank

def error_in_power(ours, theirs):
    """Relative to the loudest bin of the frame: float32 FFTs of two machines differ 70 dB below it."""
    ours, theirs = ours.double().exp(), theirs.double().exp()
    return ((ours - theirs).abs() / theirs.amax(-1, keepdim=True)).max()

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_fbank_equals_the_official_one(golden, case):
    theirs = golden["encoder"]["expected"][case]["fbank"] * (2 * 6.55582) + 15.41663
    assert error_in_power(fbank(golden["inputs"][case]["wav"]), theirs) < 3e-5

def test_fbank_equals_a_naive_loop():
    wav = 0.1 * torch.randn(1, 1200, generator=torch.Generator().manual_seed(0))
    def mel(hz):
        return 1127 * math.log(1 + hz / 700)
    step = (mel(8000) - mel(20)) / 129

    for i, ours in enumerate(fbank(wav)[0]):
        x = wav[0, i * 160:i * 160 + 400].double().numpy() * 32768
        x = x - x.mean()
        x = np.array([x[n] - 0.97 * x[max(n - 1, 0)] for n in range(400)])
        x = x * np.array([(0.5 - 0.5 * math.cos(2 * math.pi * n / 399))**0.85 for n in range(400)])
        spectrum = np.abs(np.fft.fft(x, 512))**2
        for m in range(128):
            energy, centre = 0.0, mel(20) + (m + 1) * step
            for k in range(256):
                energy += max(0, 1 - abs(mel(k * 31.25) - centre) / step) * spectrum[k]
            if m != 3:      # the empty triangle
                assert ours[m] == pytest.approx(math.log(max(energy, 1.1920929e-07)), abs=2e-3), (i, m)

def test_fbank_of_silence_and_its_shape():
    assert torch.allclose(fbank(torch.zeros(2, 16000)), torch.full((2, 98, 128), -15.942385))

def test_fbank_is_the_same_in_any_batch_and_under_autocast():
    wav = 0.1 * torch.randn(11, 4000)
    alone = torch.cat([fbank(clip[None]) for clip in wav])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fbank(wav), alone)
        assert fbank(wav.bfloat16()).dtype == torch.float32

def test_fbank_is_the_same_on_all_devices(monkeypatch):
    wav = 0.1 * torch.randn(3, 8000)
    expect = fbank(wav)
    monkeypatch.setattr(audio, "on_cpu", lambda x: False)               # what others compute, here
    for device in ["cpu"] + torch.cuda.is_available() * ["cuda"]:
        assert error_in_power(fbank(wav.to(device)).cpu(), expect) < 3e-5

@pytest.mark.parametrize("wav, message", [
    (torch.zeros(16000), r"wav\[None\]"), (torch.zeros(1, 399), "at least 400"),
    (torch.zeros(1, 16000, dtype=torch.int16), "float")])
def test_fbank_explains_bad_input(wav, message):
    with pytest.raises(ValueError, match=message):
        fbank(wav)

# ---- patches and lengths

def test_patches_are_time_major():
    x = torch.arange(2 * 35 * 128.0).view(2, 35, 128)
    patches = patchify(x)
    assert patches.shape == (2, 16, 256)
    for row in range(2):
        for band in range(8):
            expect = x[1, row * 16:row * 16 + 16, band * 16:band * 16 + 16]
            assert torch.equal(patches[1, row * 8 + band].view(16, 16), expect)

def test_tokens_are_those_that_the_clip_has_alone():
    for n in (0, 100, 400, 2799, 2800, 5359, 5360, 16000, 160000):
        expect = patchify(fbank(torch.zeros(1, n))).shape[1] if n >= 2800 else 0
        for samples in (n, torch.tensor(n), np.array(n)):
            assert num_tokens(samples) == expect
    assert num_tokens(160000) == 496
    for rows in range(1, 100):
        assert (rows_in(samples_of(rows) - 1), rows_in(samples_of(rows))) == (rows - 1, rows)

def test_rows_of_tokens_and_their_times():
    x = torch.randn(2, num_tokens(16000), 32)
    rows, seconds = rows_of(x)
    assert torch.equal(rows[1, 3, 5], x[1, 3 * 8 + 5])
    assert seconds.tolist() == pytest.approx([0.0875 + 0.16 * i for i in range(6)])

def test_windows_cover_a_recording():
    wav = torch.arange(1, 401.0)
    for size, hop in ((100, 50), (100, 100), (500, 250), (400, 100), (90, 70)):
        parts, lengths, starts = windows(wav, size / 16000, hop / 16000)
        heard = set()
        for part, n, start in zip(parts, lengths, starts):
            assert torch.equal(part[:n], wav[start:start + n])
            assert not part[n:].any()
            heard |= set(part[:n].tolist())
        assert heard == set(wav.tolist())
    assert windows(wav[:30], 1.0, 0.5)[0].shape == (1, 30)

# ---- files

@pytest.mark.parametrize("name, subtype, error", [
    ("a.wav", "PCM_16", 1e-4), ("a.wav", "PCM_24", 1e-4), ("a.wav", "FLOAT", 1e-4), ("a.wav", "PCM_U8", 1e-2),
    ("a.flac", None, 1e-4), ("a.ogg", None, 0.05)])
def test_formats(write_wav, name, subtype, error):
    wav, lengths = load_audio(write_wav(name, sine(1), subtype=subtype))
    assert wav.shape == (1, *lengths) == (1, 16000)
    assert np.abs(wav[0].numpy() - sine(1)).max() < error

def test_stereo_is_averaged_and_a_batch_is_padded(write_wav):
    stereo = write_wav("stereo.wav", np.stack([sine(0.5), -sine(0.5)], 1))
    wav, lengths = load_audio([stereo, write_wav("b.wav", sine(1))])
    assert (wav.shape, lengths.tolist()) == ((2, 16000), [8000, 16000])
    assert wav[0].abs().max() < 1e-4

@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_a_sine_and_removes_what_would_alias(rate, monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)      # our own, also where soxr is installed
    assert np.abs(resample(sine(1, rate), rate) - sine(1))[200:-200].max() < 1e-3
    if rate > 24000:
        assert np.abs(resample(sine(1, rate, hz=12000), rate))[200:-200].max() < 1e-3

def test_long_files_are_read_by_stretches(write_wav, monkeypatch):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 7, 2)).astype(np.float32)
    path = write_wav("long.wav", x, 44100, subtype="FLOAT")
    whole, part = read_audio(path), read_audio(path, 1.25, 6.5)
    assert np.abs(part - whole[20000:104000])[200:-200].max() < 1e-3
    monkeypatch.setattr(audio, "STRETCH", 2)
    assert np.abs(read_audio(path) - whole).max() < 1e-6
    assert np.abs(read_audio(path, 1.25, 6.5) - part).max() < 1e-6

def test_bad_files_are_named(tmp_path, write_wav):
    (tmp_path / "text.wav").write_text("this is not audio")
    for name, message in (("text.wav", "cannot be read as audio"), ("none.wav", "no such file")):
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*{message}"):
            read_audio(tmp_path / name)
    with pytest.raises(UserError, match="no audio between 2.0 s"):
        read_audio(write_wav("short.wav", sine(1)), start=2.0)
    with pytest.raises(UserError, match="NaN"):
        read_audio(write_wav("nan.wav", np.full(16000, np.nan, np.float32), subtype="FLOAT"))

def test_audio_below_a_folder(tmp_path):
    for name in ("b/2.FLAC", "b/1.wav", "a.mp3", "b/._1.wav", ".hidden.wav", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/round").symlink_to(tmp_path)         # a link back up
    assert audio_files(tmp_path) == [tmp_path / name for name in ("a.mp3", "b/1.wav", "b/2.FLAC")]
    with pytest.raises(UserError, match="no audio files below"):
        audio_files(tmp_path, {".w64"})
    with pytest.raises(UserError, match="nowhere: no such folder"):
        audio_files(tmp_path / "nowhere")
