"""From a sound file to patches: against the official filter bank, naive loops, files of soundfile."""
import io
import math
import os
import sys

import numpy as np
import pytest
import soundfile
import torch

import audio
from audio import (ROW, audio_files, decode, fbank, find_audio, load_audio, num_tokens, patchify,
                   prepare_clips, printable, read_audio, read_pieces, resample, rows_in, rows_of,
                   samples_of, windows)
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

@pytest.mark.parametrize("cpu", [True, False])
def test_the_slope_of_the_filter_bank_is_that_of_differences(cpu, monkeypatch):
    monkeypatch.setattr(audio, "on_cpu", lambda x: cpu)
    torch.manual_seed(0)
    wav, way, weight = 0.1 * torch.randn(1, 2000), torch.randn(1, 2000), torch.rand(11, 128)
    wav.requires_grad_()
    (weight * fbank(wav)).sum().backward()
    with torch.no_grad():
        rise = (weight * (fbank(wav + 3e-5 * way) - fbank(wav - 3e-5 * way)).double()).sum() / 6e-5
    assert (wav.grad * way).sum().item() == pytest.approx(rise.item(), rel=2e-3)

def test_what_a_device_keeps_is_fit_for_gradients():
    with torch.inference_mode():
        kept = audio.constants_on.__wrapped__(torch.device("meta"))
    assert not any(x.is_inference() for x in kept)

def test_a_gradient_reaches_the_waveform(random_encoder):
    wav = (0.1 * torch.randn(2, 8000)).requires_grad_()
    random_encoder.embed(wav, torch.tensor([8000, 4000])).sum().backward()
    heard = wav.grad != 0
    assert heard[0, 10 : samples_of(3) - 10].float().mean() > 0.99 and heard[1, 10 : samples_of(1) - 10].any()
    assert not heard[1, 4000:].any()                                 # padding has no say

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
    with pytest.raises(ValueError, match="a patch is 16 frames long .* there are 15"):
        patchify(torch.zeros(1, 15, 128))
    assert num_tokens(160000) == 496
    for rows in range(1, 100):
        assert (rows_in(samples_of(rows) - 1), rows_in(samples_of(rows))) == (rows - 1, rows)

def test_rows_of_tokens_and_their_times():
    x = torch.randn(2, num_tokens(16000), 32)
    rows, seconds = rows_of(x)
    assert torch.equal(rows[1, 3, 5], x[1, 3 * 8 + 5])
    assert seconds.tolist() == pytest.approx([0.0875 + 0.16 * i for i in range(6)])

@pytest.mark.parametrize("lengths", [
    torch.tensor([1.0, 0.5]), [16000.0, 8000.0], 0.5, torch.tensor([True, False]), [-1, 100], [16001, 1],
    [16000], [1, 2, 3], [[16000], [8000]], 16001, torch.tensor([16000, -1], dtype=torch.int32)])
def test_lengths_that_are_no_samples_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths are samples"):
        prepare_clips(torch.zeros(2, 16000), lengths)

def test_samples_that_are_not_finite_are_refused_and_those_of_another_range_warned_of():
    wav = torch.zeros(2, 16000)
    for peak in (math.nan, math.inf):
        wav[1, 12000] = peak
        with pytest.raises(ValueError, match="samples that are not finite"):
            prepare_clips(wav)
        prepare_clips(wav, [16000, 12000])              # what stands beyond a clip has no effect
    wav[1, 12000] = -32768
    with pytest.warns(UserWarning, match=r"samples are in \[-1, 1\], here up to 32768"):
        prepare_clips(wav)
    with pytest.raises(ValueError, match="no sound in a tensor of shape"):
        prepare_clips(wav[:0])

@pytest.mark.parametrize("files", [[], io.BytesIO(b"RIFF"), [io.BytesIO(b"RIFF")], [None]])
def test_files_that_are_no_paths_are_refused(files):
    with pytest.raises(ValueError, match="load_audio takes the path of a file"):
        load_audio(files)

def test_lengths_are_any_whole_numbers():
    wav = torch.zeros(2, 16000)
    for lengths in ([100, 200], (100, 200), np.array([100, 200]), torch.tensor([9, 200], dtype=torch.uint8)):
        assert prepare_clips(wav, lengths)[1].sum(1).tolist() == [8, 8]
    assert prepare_clips(wav, 8000)[1].sum(1).tolist() == [24, 24]
    assert prepare_clips(wav, [0, 16000])[1].sum(1).tolist() == [0, 48]

@pytest.mark.parametrize("wav", [torch.zeros(16000), torch.zeros(2, 1, 16000), torch.zeros(1, 16000).short(),
                                 np.zeros((1, 16000)), [0.0]])
def test_other_layouts_are_named(wav):
    with pytest.raises(ValueError, match=r"float tensor \(clips, samples\)"):
        prepare_clips(wav)

@pytest.mark.parametrize("rows, hop", [(62, None), (4, 4), (4, 2), (5, 2), (7, 1), (1, 1)])
def test_windows_hold_each_row_where_it_is(rows, hop):
    hop = hop or rows
    for n in [1, 2799, 2800, 2880, *range(5200, 30 * ROW, 4001), samples_of(100), samples_of(124)]:
        wav = torch.arange(1.0, n + 1)
        pieces = [piece.numpy() for piece in wav.split(1777)]
        parts = list(windows(wav, rows, hop))
        for (first, x), (other, y) in zip(parts, windows(pieces, rows, hop), strict=True):
            assert first == other and torch.equal(x, y)
            cut = wav[first * ROW : first * ROW + len(x)]
            assert torch.equal(x[: len(cut)], cut) and not x[len(cut) :].any()
            assert len(x) == samples_of(rows_in(len(x)))             # nothing less than a row
        covered = [range(first, first + rows_in(len(x))) for first, x in parts]
        assert [part[0] for part in covered] == list(range(0, hop * len(parts), hop))
        assert covered[-1][-1] + 1 == max(1, rows_in(n))
        assert all(len(part) == rows for part in covered[:-1])
        rest = len(covered[-1]) - rows
        assert rest < hop / 2 and (len(parts) == 1 or rest >= hop / 2 - hop)
        if hop == rows:
            assert sum(map(len, covered)) * 8 == max(8, num_tokens(n))

def test_windows_keep_little_of_a_stream():
    seen = []
    def pieces():
        for number in range(100):
            seen.append(number)
            yield np.full(160_000, number, np.float32)
    for first, x in windows(pieces()):
        assert seen[-1] <= first * ROW // 160_000 + 3
        assert x.untyped_storage().nbytes() < 4 * 4 * 160_000

# ---- files

@pytest.mark.parametrize("name, subtype, error", [
    ("a.wav", "PCM_16", 1e-4), ("a.wav", "PCM_24", 1e-4), ("a.wav", "FLOAT", 1e-4), ("a.wav", "PCM_U8", 1e-2),
    ("a.flac", None, 1e-4), ("a.ogg", None, 0.05)])
def test_formats(write_wav, name, subtype, error):
    wav, lengths = load_audio(write_wav(name, sine(1), subtype=subtype))
    assert wav.shape == (1, *lengths) == (1, 16000)
    assert np.abs(wav[0].numpy() - sine(1)).max() < error

ALL = [(name, subtype) for name in soundfile.available_formats()
       for subtype in soundfile.available_subtypes(name)]

@pytest.mark.parametrize("name, subtype", ALL)
def test_what_soundfile_reads_is_read(tmp_path, name, subtype):
    file = tmp_path / f"a.{name.lower()}"
    try:
        soundfile.write(file, sine(0.2, 8000), 8000, subtype=subtype, format=name)
        expect, rate = soundfile.read(file, dtype="float32")
    except (RuntimeError, TypeError):
        try:                                                         # nothing, a .raw, what cannot seek
            assert len(decode(file)[0]) == 3200
        except UserError as error:
            assert str(file) in str(error)
        return
    x, notes = decode(file)
    assert np.allclose(x, resample(expect, rate), atol=1e-6)
    assert [kind for kind, _ in notes] == ["resampled"]

@pytest.fixture(scope="module")
def mp3(tmp_path_factory):
    """12 s of noise that swells: where a variable bit rate varies."""
    path = tmp_path_factory.mktemp("mp3") / "a.mp3"
    noise = np.random.default_rng(0).standard_normal(12 * 16000) * np.linspace(0, 0.5, 12 * 16000) ** 2
    soundfile.write(path, noise, 16000, bitrate_mode="VARIABLE", compression_level=0.5)
    return path

def test_an_mp3_of_variable_bit_rate_is_read_by_stretches_and_from_the_middle(mp3, monkeypatch):
    whole = soundfile.read(mp3, dtype="float32")[0]
    monkeypatch.setattr(audio, "STRETCH", 1)
    assert np.abs(read_audio(mp3) - whole).max() < 1e-6
    assert "length in doubt" not in kinds(mp3, 1.0, 2.0)             # for all that is not read
    for start in (0.7, 1.0, 5.0, 8.3, 10.9):
        assert np.abs(read_audio(mp3, start, start + 1) - whole[round(start * 16000):][:16000]).max() < 1e-6

def test_stereo_is_averaged_and_a_batch_is_padded(write_wav):
    stereo = write_wav("stereo.wav", np.stack([sine(0.5), 0.5 * sine(0.5)], 1))
    wav, lengths = load_audio([stereo, write_wav("b.wav", sine(1))])
    assert (wav.shape, lengths.tolist()) == ((2, 16000), [8000, 16000])
    assert np.abs(wav[0, :8000].numpy() - 0.75 * sine(0.5)).max() < 1e-4

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
    pieces = list(read_pieces(path))
    assert [len(piece) for piece in pieces] == [32000, 32000, 32000, 16000]
    assert np.array_equal(np.concatenate(pieces), read_audio(path))

def test_a_rate_that_needs_soxr_is_named_with_its_file(write_wav, monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(UserError, match="odd.wav: .*44057 Hz needs soxr: pip install soxr"):
        read_audio(write_wav("odd.wav", sine(1), 44057))

def kinds(path, *times):
    return {kind for kind, _ in decode(path, *times)[1]}

def test_what_is_done_to_the_sound_is_noted(write_wav, monkeypatch):
    a, silence = sine(3), np.zeros(48000, np.float32)
    b = sine(3, hz=1000)
    def stereo(*channels):
        return write_wav("a.wav", np.stack(channels, 1), subtype="FLOAT")
    assert kinds(stereo(a, b)) == {"mixed down"}
    assert kinds(stereo(silence, silence)) == {"mixed down"}

    assert kinds(stereo(0.5 * a, -0.55 * a)) == {"mixed down", "cancelled"}
    assert np.abs(read_audio(stereo(0.5 * a, -0.55 * a)) + 0.55 * a).max() < 1e-6    
    assert kinds(stereo(0.5 * a, -0.75 * a)) == {"mixed down"}

    assert kinds(stereo(silence, a)) == {"mixed down", "dead channel"}
    assert np.array_equal(read_audio(stereo(silence, a)), a)
    assert kinds(stereo(silence, a, -a)) == {"mixed down", "dead channel", "cancelled"}

    loud, notes = decode(write_wav("loud.wav", 9830 * a, subtype="FLOAT"))
    assert np.array_equal(loud, 9830 * a)                                              # not clipped
    assert notes == [("over full scale", pytest.approx(4915, rel=1e-3))]
    assert kinds(write_wav("full.wav", 2 * a, subtype="PCM_16")) == set()

    plain = write_wav("plain.wav", a)
    assert kinds(plain, 1.0, 3.005) == set()
    assert kinds(plain, 1.0, 3.5) == {"end beyond the file"}
    assert kinds(write_wav("r.wav", a, 22050)) == {"resampled"}

    monkeypatch.setattr(audio, "STRETCH", 1)
    half = np.where(np.arange(48000) < 16000, a, 0)
    assert kinds(stereo(b, -half)) == {"mixed down", "dead channel"}                 

def tag(size):
    """An ID3v2 tag with a picture of so many bytes."""
    return b"ID3\3\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(size)

def without_first_frame(mp3):
    return mp3[mp3.find(mp3[:2], 4):]

def with_data_size(wav, size):
    at = wav.find(b"data") + 4
    return wav[:at] + size.to_bytes(4, "little") + wav[at + 4:]

@pytest.mark.parametrize("name, change, doubt", [
    ("a.mp3", lambda x: x, False),
    ("a.mp3", lambda x: tag(10 * len(x)) + x, False),                                    # cover art
    ("a.mp3", lambda x: x + bytes(len(x)) + b"APETAGEX" + bytes(24) + b"TAG" + bytes(125), False),
    ("a.mp3", lambda x: x + b"TAG" + bytes(125), False),
    ("a.mp3", lambda x: 3 * x, True),                                                  # joined
    ("a.mp3", without_first_frame, True),                                              # which told the length
    ("a.mp3", lambda x: x[: len(x) // 2], True),
    ("a.ogg", lambda x: x, False),
    ("a.ogg", lambda x: 2 * x, True),
    ("a.flac", lambda x: x, False),
    ("a.flac", lambda x: x + b"TAG" + bytes(125), False),
    ("a.flac", lambda x: x + x, True),
    ("a.flac", lambda x: x[:21] + bytes([x[21] & 0xF0]) + bytes(4) + x[26:], False),   # a stream's
    ("a.wav", lambda x: x + b"LIST" + len(x).to_bytes(4, "little") + bytes(len(x)), False),
    ("a.wav", lambda x: with_data_size(x, 2**32 - 1), False),                          # of a pipe: no length
    ("a.wav", lambda x: with_data_size(x, 100), True),
    ("a.wav", lambda x: x[: len(x) // 2], True),
    ("a.aiff", lambda x: x[: len(x) // 2], True),
    ("a.au", lambda x: x[: len(x) // 2], True)])
def test_a_length_that_cannot_be_right_is_noted(mp3, tmp_path, name, change, doubt):
    source, file = mp3, tmp_path / name
    if name != "a.mp3":
        source = tmp_path / f"source_{name}"
        soundfile.write(source, 0.2 * np.random.default_rng(0).uniform(-1, 1, 48000), 16000)
    file.write_bytes(change(source.read_bytes()))
    assert ("length in doubt" in kinds(file)) == doubt

@pytest.mark.parametrize("error", [TypeError("x"), MemoryError(), OverflowError("x"), UnicodeError("x"),
                                   ValueError("x"), RuntimeError("x"), OSError(5, "x"), AssertionError()])
def test_whatever_a_file_raises_names_it(write_wav, monkeypatch, error):
    path = write_wav("a.wav", sine(1))
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(audio.Reader, "read", fail)
    with pytest.raises(UserError, match="a.wav: cannot be read as audio .(x|Memory|Assertion|.Errno 5. x)"):
        read_audio(path)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        read_audio(path)

def test_names_that_are_not_utf_8_are_read_and_printed(tmp_path, write_wav):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    assert printable(path).encode("ascii") == os.fsencode(tmp_path) + b"/caf\\xe9.wav"
    assert printable("é.wav") == "é.wav"
    with pytest.raises(UserError, match=r"caf\\xe9.wav: .*no such file") as error:
        read_audio(path)
    str(error.value).encode("utf-8")
    for name, text in (("a\nb\x1b.wav", "a\\x0ab\\x1b.wav"), ("\ud83d", "\\xd83d"), (b"caf\xe9", "caf\\xe9")):
        assert printable(name) == text
    with pytest.raises(UserError, match="xd83d"):
        read_audio("\ud83d.wav")
    os.rename(write_wav("cafe.wav", sine(1)), path)
    assert len(read_audio(path)) == 16000
    assert [printable(file) for file in audio_files(tmp_path)] == [printable(path)]

@pytest.mark.parametrize("rate", [0, 1, 999, 10**6, 2**32 - 1])
def test_rates_that_no_recording_has_are_refused(write_wav, rate):
    path = write_wav("a.wav", sine(1))
    header = bytearray(path.read_bytes())
    header[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(header)
    with pytest.raises(UserError, match="a.wav: "):
        read_audio(path)

def test_what_is_no_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    for path in (tmp_path, tmp_path / "a.wav", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_audio(path)

def test_bad_files_are_named(tmp_path, write_wav):
    (tmp_path / "text.wav").write_text("this is not audio")
    for name, message in (("text.wav", "cannot be read as audio"), ("none.wav", "no such file")):
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*{message}"):
            read_audio(tmp_path / name)
    for times in ((-1.0, None), (0.5, 0.5), (0.5, 0.2), (math.nan, None), (0.0, math.nan), (math.inf, None)):
        with pytest.raises(UserError, match="short.wav"):
            read_audio(write_wav("short.wav", sine(1)), *times)
    with pytest.raises(UserError, match="no audio between 2.0 s"):
        read_audio(write_wav("short.wav", sine(1)), start=2.0)
    with pytest.raises(UserError, match="NaN"):
        read_audio(write_wav("nan.wav", np.full(16000, np.nan, np.float32), subtype="FLOAT"))

def test_audio_below_a_folder(tmp_path, capsys):
    root = tmp_path / "root"
    for name in ("b/2.FLAC", "b/1.Wave", "a.mp3", "b/._1.wav", ".hidden.wav", "b/notes.TXT", "c.m4a", "d.M4A",
                 "b/none"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).touch()
    (tmp_path / "else").mkdir()
    (tmp_path / "else/3.wav").touch()
    (root / "linked").symlink_to(tmp_path / "else")
    (root / "b/linked.wav").symlink_to(tmp_path / "else/3.wav")
    (root / "b/round").symlink_to(root)                              # a link back up
    names = ["a.mp3", "b/1.Wave", "b/2.FLAC", "b/linked.wav", "linked/3.wav"]
    assert audio_files(root) == [root / name for name in names]
    assert capsys.readouterr().err == f"{root}: left out: .m4a 2, no ending 1\n"

    for number in range(8):                                          # of several ways always the same
        (root / "b" / f"{7 - number}").symlink_to(tmp_path / "else")
    assert root / "b/0/3.wav" in audio_files(root) and root / "linked/3.wav" not in audio_files(root)

    (root / "broken.wav").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.wav")
    assert find_audio(root)[0] == audio_files(root)
    assert "broken link or device 2" in find_audio(root)[1]
    with pytest.raises(UserError, match="no audio files below it [(].*[.]m4a 2"):
        audio_files(root, {".w64"})
    with pytest.raises(UserError, match="nowhere: no such folder"):
        audio_files(root / "nowhere")
