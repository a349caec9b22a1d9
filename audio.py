"""
From a sound file to the patches that the model sees.

    read_audio, load_audio      any file that soundfile reads -> waveform, float32 in [-1, 1] at 16 kHz
    fbank                       waveform -> log-mel filter bank, number for number Kaldi's
    patchify                    filter bank -> 16 x 16 patches, one token each
    valid_tokens                which tokens of a zero-padded batch are real
    windows, chunks, rows_of    long recordings; where tokens stand in time and frequency

A token is one of 8 bands of 160 ms. Tokens are numbered time-major: token = row * 8 + band.
Letters in shape comments: B clips, n samples, N frames, R patch rows, T tokens.
"""

import functools
import math
import os
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from common import UserError, check

# the front end; to change it, change it here
SAMPLE_RATE = 16000
FRAME, HOP = 400, 160   # 25 ms windows every 10 ms
MELS = 128              # mel bins from 20 Hz to 8 kHz
FFT = 512
PATCH_FRAMES, PATCH_BINS = 16, 16  # a patch is 160 ms x 16 mel bins

# a pack's statistics are those of one front end: who changes fbank in another way adds to this
FRONT_END = [SAMPLE_RATE, FRAME, HOP, MELS]

BANDS = MELS // PATCH_BINS                      # patches side by side in one row
PATCH_DIM = PATCH_FRAMES * PATCH_BINS           # values in a patch
ROW = PATCH_FRAMES * HOP                        # samples from one patch row to the next
MIN_SAMPLES = FRAME + (PATCH_FRAMES - 1) * HOP  # 2,800: the shortest clip with one row
# filter bank of digital silence, -15.94
LOG_FLOOR = math.log(torch.finfo(torch.float32).eps)

SUFFIXES = {
    ".wav",
    ".flac",
    ".ogg",
    ".mp3",
    ".opus",
    ".aif",
    ".aiff",
    ".au",
    ".w64",
    ".caf"
}
STRETCH = 600  # seconds of a long file that are read at a time

# -----------------------------------------------------------------------------
# files


def audio_files(root, suffixes=SUFFIXES):
    """Return every audio file below a folder, sorted.

    Hidden ones (and the ._ files that Macs leave) are none. Links are followed, each folder once.
    Raises UserError if there is no audio.
    """

    def unreadable(error):
        reason = (
            "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
        )
        raise UserError(f"{error.filename}: {reason}")

    files, seen = [], set()
    for folder, below, names in os.walk(root, onerror=unreadable, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        files += [Path(folder, name) for name in names if not name.startswith(".")]

    files = sorted(file for file in files if file.suffix.lower() in suffixes)
    check(files, f"{root}: no audio files below it ({' '.join(sorted(suffixes))})")
    return files


def read_audio(path, start=0.0, end=None):
    """Read a file, or its seconds start..end: (n,) float32 at 16 kHz, mean of its channels.

    Raises UserError.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            first = round(start * rate)
            last = file.frames if end is None else min(file.frames, round(end * rate))
            until = "the end" if end is None else f"{end} s"
            check(
                0 <= first < last,
                f"{path}: no audio between {start} s and {until} "
                f"(the file has {file.frames / rate:.2f} s)"
            )

            # a long file by stretches, each resampled with a second of context on either side
            pieces = []
            for begin in range(first, last, STRETCH * rate):
                stop = min(last, begin + STRETCH * rate)
                low, high = max(first, begin - rate), min(last, stop + rate)
                file.seek(low)
                x = file.read(high - low, dtype="float32", always_2d=True).mean(1)
                check(np.isfinite(x).all(), f"{path}: holds NaN or infinite samples")
                skip = (begin - low) // rate * SAMPLE_RATE
                keep = math.ceil((stop - begin) * SAMPLE_RATE / rate)
                pieces.append(resample(x, rate)[skip : skip + keep])
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        reason = getattr(error, "error_string", str(error)).strip(". ")
        if not os.path.exists(path):
            reason = "no such file"
        raise UserError(f"{path}: cannot be read as audio ({reason})") from None
    return np.concatenate(pieces)


def resample(x, rate):
    """Bring (n,) float32 at `rate` to 16 kHz: with soxr if it is installed, else by a Hann-windowed sinc."""
    if rate == SAMPLE_RATE:
        return x
    try:
        import soxr

        return soxr.resample(x, rate, SAMPLE_RATE)
    except ImportError:
        pass

    # of every `down` input samples we make `up` outputs, and each of those has a filter of its own, its phase
    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    cutoff = 0.95 * min(1.0, up / down)     # as a share of the input's Nyquist frequency
    half = math.ceil(32 / cutoff)           # 32 zero crossings on either side
    check(
        up * (2 * half + down) <= 2e7,
        f"a sampling rate of {rate} Hz needs soxr: pip install soxr"
    )

    tap, phase = np.arange(-half, half + down + 1), np.arange(up)[:, None]
    time = tap - phase * down / up  # (phase, tap), in input samples
    window = np.where(np.abs(time) < half, np.cos(np.pi * time / 2 / half) ** 2, 0)
    kernel = torch.from_numpy(cutoff * np.sinc(cutoff * time) * window).float()
    padded = F.pad(torch.from_numpy(x)[None, None], (half, half + down))
    y = F.conv1d(padded, kernel[:, None], stride=down)  # (1, phase, n / down)
    return y[0].T.flatten()[: math.ceil(len(x) * up / down)].numpy()


def pad_batch(clips):
    """Put a list of (n_i,) into one zero-padded batch: (B, max n), lengths (B,)."""
    tensors = [torch.from_numpy(clip) for clip in clips]
    return pad_sequence(tensors, batch_first=True), torch.tensor(
        [len(clip) for clip in clips]
    )


def load_audio(paths):
    """Read a path or a list of them.

    Returns wav (B, n) float32 in [-1, 1] at 16 kHz, zero-padded, and lengths (B,) in samples.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    return pad_batch([read_audio(path) for path in paths])


# -----------------------------------------------------------------------------
# filter bank


def mel_filters():
    """Return Kaldi's triangles, (256, 128): the weight of each frequency below 8 kHz in each mel bin."""
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (20.0, SAMPLE_RATE / 2))
    step = (high - low) / (MELS + 1)
    left, centre, right = (
        low + (torch.arange(MELS)[:, None] + i) * step for i in (0.0, 1.0, 2.0)
    )
    frequency = SAMPLE_RATE / FFT * torch.arange(FFT // 2)
    mel = 1127.0 * (1.0 + frequency / 700.0).log()
    # in torchaudio's float32 arithmetic: low triangles are so narrow that rounding decides their height
    return (
        torch.min((mel - left) / (centre - left), (right - mel) / (right - centre))
        .clamp(min=0)
        .T.contiguous()
    )


WINDOW = torch.hann_window(FRAME, periodic=False).pow(0.85)  # Kaldi's "povey" window
MEL_FILTERS = mel_filters()


@functools.lru_cache
def constants_on(device):
    return WINDOW.to(device), MEL_FILTERS.to(device)


@torch.no_grad()
def fbank(wav):
    """Compute Kaldi's log-mel filter bank: 128 bins, 25 ms Povey window, 10 ms hop, no dither, no padding.

    wav: (B, n) float in [-1, 1] at 16 kHz, n >= 400. Returns (B, 1 + (n - 400) // 160, 128) float32.
    Equal to torchaudio.compliance.kaldi.fbank(wav * 2**15, num_mel_bins=128, ...). Always float32, also under
    autocast: the power spectrum reaches 3e12 and float16 ends at 65504.
    """
    if wav.dim() != 2 or not wav.is_floating_point():
        raise ValueError(
            f"fbank takes a float tensor (clips, samples), not {wav.dtype} of shape "
            f"{tuple(wav.shape)}; a single clip is wav[None], a stereo clip wav.mean(0)[None]"
        )
    if wav.shape[1] < FRAME:
        raise ValueError(
            f"fbank needs at least {FRAME} samples (25 ms at 16 kHz), got {wav.shape[1]}; "
            "zero-pad the clip"
        )
    with torch.autocast(wav.device.type, enabled=False):
        mel = mel_on_cpu(wav.float()) if on_cpu(wav) else mel_power(wav.float())
        return mel.clamp_(min=torch.finfo(torch.float32).eps).log_()


def mel_power(wav):
    """(B, n) -> (B, N, 128)"""
    window, filters = constants_on(wav.device)
    return power_spectrum(wav, window)[..., : FFT // 2] @ filters


def power_spectrum(wav, window):
    """(B, n) -> (B, N, 257)"""
    x = (wav * 2**15).unfold(1, FRAME, HOP)  # (B, N, 400)
    x = x - x.mean(-1, keepdim=True)
    # pre-emphasis within the frame; its first sample is left out, for there the window is 0
    x = torch.sub(x[..., 1:], x[..., :-1], alpha=0.97).mul_(window[1:])
    x = torch.view_as_real(torch.fft.rfft(x, n=FFT)).square_()  # (B, N, 257, 2)
    return x[..., 0] + x[..., 1]


# -----------------------------------------------------------------------------
# patches and lengths


def rows_in(samples):
    """Count the patch rows that lie wholly within the first `samples` samples (int, tensor or array)."""
    frames = 1 + (samples - FRAME) // HOP
    rows = frames // PATCH_FRAMES
    return rows.clip(min=0) if hasattr(rows, "clip") else max(rows, 0)


def samples_of(rows):
    """Return the length of the shortest clip with so many patch rows."""
    return (rows * PATCH_FRAMES - 1) * HOP + FRAME


def num_tokens(samples):
    """Count the tokens whose frames lie wholly within the first `samples` samples. int, tensor or array."""
    return rows_in(samples) * BANDS


def patchify(x):
    """(B, N, 128) frames -> (B, T, 256) patches, time-major; frames after the last whole row are dropped."""
    x = x.unfold(1, PATCH_FRAMES, PATCH_FRAMES)     # (B, R, 128, 16 frames)
    x = x.unflatten(2, (BANDS, PATCH_BINS)).mT      # (B, R, 8 bands, 16 frames, 16 bins)
    return x.flatten(3).flatten(1, 2)


def is_silent(features):
    """(B, N, 128) filter bank -> (B, T) bool: patches of digital silence, every bin at the floor."""
    return patchify(features).amax(-1) < LOG_FLOOR + 1e-3


def valid_tokens(lengths, n, padding="exact"):
    """Tell which tokens of a zero-padded batch are real: (B, T) bool.

    lengths: (B,) samples of each clip; n: samples of the batch. padding="exact": the tokens the clip would
    have alone. padding="official": the released code's mask, which ties frames to samples with a stride of
    n // N and walks along frequency at the end; it keeps 0 to 9 tokens too many and is here for parity only
    (unilm #1427, #1621).
    """
    T = num_tokens(n)
    if padding == "exact":
        return torch.arange(T, device=lengths.device) < num_tokens(lengths)[:, None]
    if padding != "official":
        raise ValueError(f'padding is "exact" or "official", not {padding!r}')
    mask = torch.arange(n, device=lengths.device) >= lengths[:, None]   # True = padding
    for size in (1 + (n - FRAME) // HOP, T):                            # samples -> frames -> tokens
        mask = mask[:, : mask.shape[1] // size * size].reshape(len(mask), size, -1).all(-1)
    return ~mask


def prepare_clips(wav, lengths=None, padding="exact"):
    """(B, n) waveforms and their (B,) lengths in samples (None = n) -> (B, n') waveforms, (B, T) valid.

    A clip of 1 to 2,799 samples counts as one of 2,800, zero-padded: the shortest with a row of patches. What
    stands beyond a clip's length has no effect (with padding="official" it has, as in the released code).
    """
    B, n = wav.shape
    lengths = torch.as_tensor(n if lengths is None else lengths, device=wav.device).expand(
        B
    )
    if padding == "exact":
        wav = wav.masked_fill(torch.arange(n, device=wav.device) >= lengths[:, None], 0)
        lengths = torch.where(lengths > 0, lengths.clamp(min=MIN_SAMPLES), 0)
    if n < MIN_SAMPLES:
        wav = F.pad(wav, (0, MIN_SAMPLES - n))
    return wav, valid_tokens(lengths, wav.shape[1], padding)


def rows_of(x):
    """Tokens (B, T, D) -> (B, R, 8, D), a row of 8 bands per 160 ms; the rows' centres in seconds (R,)."""
    rows = x.shape[1] // BANDS
    centre = (torch.arange(rows, device=x.device) * ROW + MIN_SAMPLES / 2) / SAMPLE_RATE
    return x.view(len(x), rows, BANDS, -1), centre


def windows(wav, seconds=10.0, hop=5.0):
    """Cut a recording (n,) into windows (W, samples), zero-padded; returns their lengths and starts, too."""
    size, step = round(seconds * SAMPLE_RATE), round(hop * SAMPLE_RATE)
    starts = torch.arange(0, max(1, len(wav) - size + step), step)
    lengths = (len(wav) - starts).clamp(max=size)
    padded = F.pad(wav, (0, max(0, int(starts[-1]) + size - len(wav))))
    cut = padded.unfold(0, size, step)[:, : int(lengths.max())]  # a view, also of a day
    return cut, lengths, starts


def chunks(wav, rows=62):
    """Cut (B, n) into parts of some so many patch rows (62: 9.9 s) that overlap by 15 ms.

    So their tokens, end to end, stand where those of the whole do.
    """
    total = max(1, rows_in(wav.shape[1]))
    parts = max(1, round(total / rows))
    bounds = [total * part // parts for part in range(parts + 1)]
    return [wav[:, first * ROW : samples_of(last)] for first, last in zip(bounds, bounds[1:])]


# -----------------------------------------------------------------------------
# faster on a CPU: the same numbers, in pieces that stay in the cache


def on_cpu(x):
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


def mel_bands():
    """Cut MEL_FILTERS, mostly zeros, into (low, high, filters[low:high]): 16 bins see few frequencies."""
    bands = []
    for filters in MEL_FILTERS.split(16, dim=1):
        seen = filters.any(1).nonzero()
        low, high = int(seen[0]), int(seen[-1]) + 1
        bands.append((low, high, filters[low:high].contiguous()))
    return bands


MEL_BANDS = mel_bands()


def mel_on_cpu(wav):
    """Go clip by clip, three times as fast as all at once, and band by band."""
    clips = []
    for clip in wav.split(1):
        x = power_spectrum(clip, WINDOW)
        bands = [x[..., low:high] @ filters for low, high, filters in MEL_BANDS]
        clips.append(torch.cat(bands, -1))
    return torch.cat(clips)
