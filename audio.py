"""
From a sound file to the patches that the model sees.

    read_audio, load_audio      any file that soundfile reads -> waveform, float32 in [-1, 1] at 16 kHz
    read_pieces                 the same, a minute at a time; decode says what was done to the sound
    fbank                       waveform -> log-mel filter bank, number for number Kaldi's
    patchify                    filter bank -> 16 x 16 patches, one token each
    valid_tokens                which tokens of a zero-padded batch are real
    windows, rows_of            long recordings; where tokens stand in time and frequency

A token is one of 8 bands of 160 ms. Tokens are numbered time-major: token = row * 8 + band.
Letters in shape comments: B clips, n samples, N frames, R patch rows, T tokens.
"""

import functools
import math
import os
import re
import stat
import sys
import warnings
from collections import Counter
from itertools import chain
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

# what libsndfile opens by itself
SUFFIXES = set(
    ".wav .wave .bwf .wavex .rf64 .w64 .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .aifc .au .snd .caf "
    ".8svx .svx .iff .avr .htk .ircam .sf .nist .sph .paf .pvf .sd2 .sds .voc .wve .xi".split()
)
# what stands beside sounds and is none: not worth a word
NOT_SOUND = set(
    ".bib .bz2 .cfg .csv .ds_store .gif .gz .htm .html .ini .jams .jpeg .jpg .json .jsonl .lab .list .log "
    ".lst .m3u .mat .md .md5 .npy .npz .pdf .pickle .pkl .png .pt .pth .py .rst .rttm .scp .sh .srt .svg "
    ".tar .textgrid .tgz .trn .tsv .txt .vtt .xls .xlsx .xml .xz .yaml .yml .zip".split()
)
STRETCH = 60            # seconds of a file that are in memory at a time
RATES = 1000, 768000    # sampling rates that are believed
CLAIMS = r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)"  # in libsndfile's log of a header
ORDINARY = {"resampled", "mixed down"}  # notes that nobody has to read

# -----------------------------------------------------------------------------
# files


def printable(path):
    """Return a path as one line of text that can be printed and written, also one that is not UTF-8."""

    def escape(match):
        return f"\\x{ord(match[0]) % 0xDC00:02x}"  # a byte that is not UTF-8 is 0xdc00 and itself

    return re.sub("[\0-\x1f\x7f\ud800-\udfff]", escape, os.fsdecode(path))


def find_audio(root, suffixes=SUFFIXES):
    """Return every audio file below a folder, sorted, and a line about what was left out, or "".

    Hidden files (and the ._ files that Macs leave) are none. Links are followed, each folder once.
    Raises UserError if there is no audio.
    """
    name = printable(root)
    check(os.path.isdir(root), f"{name}: no such folder")
    files, seen, others = [], set(), Counter()

    def unreadable(error):
        check(error.filename != os.fspath(root), f"{name}: {error.strerror}")
        others["unreadable folder"] += 1

    for folder, below, names in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below.sort()  # of two ways to a folder always the same is taken

        for path in [Path(folder, name) for name in names if not name.startswith(".")]:
            ending = path.suffix.lower()
            if ending in suffixes and os.path.isfile(path):
                files.append(path)
            elif ending in suffixes:
                others["broken link or device"] += 1
            elif ending not in NOT_SOUND:
                others[printable(ending) or "no ending"] += 1

    counts = ", ".join(f"{ending} {count}" for ending, count in sorted(others.items()))
    check(files, f"{name}: no audio files below it ({counts or ' '.join(sorted(suffixes))})")
    left = f"{name}: left out: {counts}"
    return sorted(files), left if others else ""


def audio_files(root, suffixes=SUFFIXES):
    """Return every audio file below a folder, sorted; say on stderr what was left out. See find_audio."""
    files, left = find_audio(root, suffixes)
    if left:
        print(left, file=sys.stderr)
    return files


class Reader(soundfile.SoundFile):
    """A file that is only read on: soundfile seeks after each read of one that can, and an mp3 then jumps."""

    def seekable(self):
        return False


def read_pieces(path, start=0.0, end=None, notes=None):
    """Yield a file, or its seconds start..end, as (n,) float32 at 16 kHz that follow each other.

    A minute of it at a time, so that memory stays flat. notes: a dict that is told what was done to the
    sound, as decode returns it. Raises UserError, whatever the file does.
    """
    notes = {} if notes is None else notes
    name = printable(path)
    try:
        check(stat.S_ISREG(os.stat(path).st_mode), f"{name}: not a regular file")
        # by number, not by name, where that can be: then raw.tell() says how far libsndfile got
        by_name = os.name != "posix" or name.lower().endswith(".sd2")
        with open(path, "rb", buffering=0) as raw:
            with Reader(path if by_name else raw.fileno(), closefd=False) as file:
                blocks = read_blocks(file, name, start, end, notes)
                yield from resample_blocks(blocks, file.samplerate)
                if not by_name:
                    note_length(file, raw, notes)
    except UserError:
        raise
    except Exception as error:  # of whatever kind: it is this file's
        reason = getattr(error, "error_string", str(error) or type(error).__name__).strip(". ")
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        raise UserError(f"{name}: cannot be read as audio ({reason})") from None


def read_blocks(file, name, start, end, notes):
    """Yield an open file's seconds start..end as (n,) float32, the channels mixed, STRETCH seconds each."""
    rate, frames = file.samplerate, file.frames
    check(
        RATES[0] <= rate <= RATES[1],
        f"{name}: its header says {rate} Hz, which no recording has"
    )
    if rate != SAMPLE_RATE:
        notes["resampled"] = f"from {rate} Hz"
    first = round(start * rate)
    last = math.inf if end is None else round(end * rate)
    until = "the end" if end is None else f"{end} s"
    nothing = f"{name}: no audio between {start} s and {until} (the file has {frames / rate:.2f} s)"
    check(0 <= first < min(last, frames), nothing)

    # an mp3 decodes rightly from a second after a seek on; what cannot seek is read from its beginning
    at = 0
    if first > rate and soundfile.SoundFile.seekable(file):  # a Reader itself says no
        at = file.seek(first - rate)
    stop, ended = min(last, frames), False
    while at < stop and not ended:
        goal = first if at < first else stop  # what comes before the start is read and dropped
        size = min(goal - at, STRETCH * rate)
        x = file.read(size, dtype="float32", always_2d=True)
        ended = len(x) < size
        if at >= first and len(x):
            check(np.isfinite(x).all(), f"{name}: holds NaN or infinite samples")
            yield mix_down(x, notes)
        at += len(x)

    check(at > first, nothing)
    if end is not None and at < last - 0.01 * rate:
        notes["end beyond the file"] = f"asked {end:.8g} s, there are {at / rate:.8g}"
    # an mp3's header estimates its length; a FLAC's that does not know it claims more than 1e15 frames
    if at < 0.99 * stop - 0.1 * rate and frames < 1e15:
        notes["length in doubt"] = f"the header says {frames / rate:.2f} s, there are {at / rate:.2f}"
    file.whole = at >= frames


def note_length(file, raw, notes):
    """Note that more was announced than is there, or that a file holds much that is not read.

    libsndfile reads the first of several mp3, ogg or flac files in one, and of an mp3 as many seconds as
    its first frame says.
    """
    claims = re.search(CLAIMS, file.extra_info)
    if claims:
        said, there = map(int, claims.groups())
        # those who write into a pipe do not know, and say the largest number
        if 1.01 * there < said < 2**31 - 2**16:
            notes["length in doubt"] = f"the header says {said} bytes of sound, there are {there}"

    read, size = raw.tell(), os.fstat(raw.fileno()).st_size
    packed = file.format in ("MP3", "OGG", "FLAC") or "Unknown chunk" in file.extra_info
    if file.whole and packed and read < 0.9 * size:
        raw.seek(max(0, size - 200))
        if b"APETAGEX" not in raw.read():  # a picture behind the sound
            notes["length in doubt"] = f"{size - read} of its {size} bytes are not read as sound"


def mix_down(x, notes):
    """(n, channels) -> (n,)"""
    mixed = x[:, 0]
    if x.shape[1] > 1:
        notes["mixed down"] = f"{x.shape[1]} channels"
        mixed = mean_of_channels(x, notes)
    peak = round(float(np.abs(mixed).max()), 4)
    if peak > max(1, notes.get("over full scale", 0)):
        notes["over full scale"] = peak
    return mixed


def mean_of_channels(x, notes):
    """(n, channels) -> (n,), the mean of the channels that sound; the loudest where they cancel."""
    sounding = x.any(0)
    dead = len(sounding) - sounding.sum()
    if 0 < dead < len(sounding):
        notes["dead channel"] = f"{dead} of {len(sounding)} left out"
        x = x[:, sounding]

    mean = x.mean(1)
    power = np.square(x, dtype=float).mean(0)
    loudest = power.argmax()
    if np.square(mean, dtype=float).mean() >= 0.01 * power[loudest]:
        return mean
    notes["cancelled"] = f"{x.shape[1]} channels, of which the loudest is taken"
    return np.ascontiguousarray(x[:, loudest])


def decode(path, start=0.0, end=None):
    """Read a file, or its seconds start..end: (n,) float32 at 16 kHz, and notes of what was done to it.

    Notes are (kind, detail), each kind once: "resampled", "mixed down"; "dead channel" (digital silence,
    left out of the mean), "cancelled" (the mean is 20 dB below the loudest channel, which is taken), "over
    full scale" (above 1.0, not clipped), "end beyond the file", "length in doubt". Raises UserError.
    """
    notes = {}
    pieces = list(read_pieces(path, start, end, notes))
    return np.concatenate(pieces), list(notes.items())


def read_audio(path, start=0.0, end=None):
    """Read a file, or its seconds start..end: (n,) float32 at 16 kHz. Raises UserError. See decode."""
    return decode(path, start, end)[0]


def resample_blocks(blocks, rate):
    """Bring blocks that follow each other to 16 kHz, each with a second of context on either side.

    All but the last are whole seconds.
    """
    before = block = np.empty(0, np.float32)
    for after in chain(blocks, [block]):
        if len(block):
            x = np.concatenate([before[-rate:], block, after[:rate]])
            skip = SAMPLE_RATE if len(before) else 0
            keep = math.ceil(len(block) * SAMPLE_RATE / rate)
            yield resample(x, rate)[skip : skip + keep]
        before, block = block, after


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
    if up * (2 * half + down) > 2e7:
        raise ValueError(f"a sampling rate of {rate} Hz needs soxr: pip install soxr")

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
    named = [isinstance(path, (str, Path)) for path in paths]
    if not named or not all(named):
        raise ValueError("load_audio takes the path of a file, or a list of paths")
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
@torch.inference_mode(False)  # kept for later, when a gradient may be wanted
def constants_on(device):
    return WINDOW.to(device), MEL_FILTERS.to(device)


def check_wav(wav):
    """Raise ValueError unless wav is a float tensor (B, n)."""
    if not torch.is_tensor(wav):
        raise ValueError(f"sound is a float tensor (clips, samples), not a {type(wav).__name__}")
    if wav.dim() != 2 or not wav.is_floating_point():
        raise ValueError(
            f"sound is a float tensor (clips, samples), not {wav.dtype} of shape "
            f"{tuple(wav.shape)}; a single clip is wav[None], a stereo clip wav.mean(0)[None]"
        )


def check_level(wav):
    """Raise ValueError unless there are clips of finite samples, and warn if these are far beyond [-1, 1].

    On the CPU only: see check_lengths.
    """
    if wav.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    if not wav.numel():
        raise ValueError(f"no sound in a tensor of shape {tuple(wav.shape)}")
    peak = float(wav.detach().abs().amax())
    if not math.isfinite(peak):
        raise ValueError("sound has samples that are not finite")
    if peak > 100:
        warnings.warn(f"samples are in [-1, 1], here up to {peak:g}: is int16 to be divided by 32768?")


def fbank(wav):
    """Compute Kaldi's log-mel filter bank: 128 bins, 25 ms Povey window, 10 ms hop, no dither, no padding.

    wav: (B, n) float in [-1, 1] at 16 kHz, n >= 400. Returns (B, 1 + (n - 400) // 160, 128) float32, through
    which gradients reach wav. Equal to torchaudio.compliance.kaldi.fbank(wav * 2**15, num_mel_bins=128, ...).
    Always float32, also under autocast: the power spectrum reaches 3e12 and float16 ends at 65504.
    """
    check_wav(wav)
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
    if x.shape[1] < PATCH_FRAMES:
        raise ValueError(
            f"a patch is {PATCH_FRAMES} frames long (2,800 samples), and there are {x.shape[1]}; "
            "zero-pad the clip"
        )
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


def check_lengths(lengths, B, n):
    """Raise ValueError unless lengths are numbers of samples: one for all, or one for each of B clips of n.

    Their values are looked at on the CPU only: a GPU would have to wait, and a graph cannot.
    """
    said = "lengths are samples, 0 to those of the batch, one for each clip (or one for all)"
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ValueError(f"{said}, whole numbers, not {lengths.dtype}; shares are times wav.shape[1]")
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    if lengths.shape not in ((), (B,)):
        raise ValueError(f"{said}: here {B} clips, and lengths of shape {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and (lengths.long().clamp(0, n) != lengths).any():
        raise ValueError(f"{said}: here {lengths.tolist()}, of a batch of {n}")


def prepare_clips(wav, lengths=None, padding="exact"):
    """(B, n) waveforms and their (B,) lengths in samples (None = n) -> (B, n') waveforms, (B, T) valid.

    A clip of 1 to 2,799 samples counts as one of 2,800, zero-padded: the shortest with a row of patches. What
    stands beyond a clip's length has no effect (with padding="official" it has, as in the released code).
    """
    check_wav(wav)
    B, n = wav.shape
    lengths = torch.as_tensor(n if lengths is None else lengths, device=wav.device)
    check_lengths(lengths, B, n)
    lengths = lengths.long().expand(B)
    if padding == "exact":
        wav = wav.masked_fill(torch.arange(n, device=wav.device) >= lengths[:, None], 0)
        lengths = torch.where(lengths > 0, lengths.clamp(min=MIN_SAMPLES), 0)
    check_level(wav)
    if n < MIN_SAMPLES:
        wav = F.pad(wav, (0, MIN_SAMPLES - n))
    return wav, valid_tokens(lengths, wav.shape[1], padding)


def rows_of(x):
    """Tokens (B, T, D) -> (B, R, 8, D), a row of 8 bands per 160 ms; the rows' centres in seconds (R,)."""
    rows = x.shape[1] // BANDS
    centre = (torch.arange(rows, device=x.device) * ROW + MIN_SAMPLES / 2) / SAMPLE_RATE
    return x.view(len(x), rows, BANDS, -1), centre


def windows(pieces, rows=62, hop=None):
    """Cut a recording into windows of so many patch rows, one every `hop` rows (None = rows).

    pieces: a tensor (..., n), or arrays (n_i,) that follow each other, of which little is held at a time.
    Yields (first row, samples (..., m)). A window has just the samples of its rows, so its tokens are those
    of rows first, first + 1, ... of the whole, and those of windows side by side are its num_tokens(n).
    A rest of less than half a hop joins the last window, so that no token has little context; less than a
    row counts only in a recording that is no longer, and is padded.
    """
    hop = rows if hop is None else hop
    check(1 <= hop <= rows, f"windows of {rows} rows cannot be {hop} rows apart")
    if hasattr(pieces, "shape"):
        pieces = [pieces]
    enough = samples_of(rows + (hop + 1) // 2)  # then another window follows
    first, held, count = 0, [], 0

    for piece in pieces:
        held.append(torch.as_tensor(piece))
        count += held[-1].shape[-1]
        if count < enough:
            continue
        x = torch.cat(held, -1)
        while count >= enough:
            yield first, x[..., : samples_of(rows)]
            x = x[..., hop * ROW :]
            first += hop
            count -= hop * ROW
        held = [x]

    x = F.pad(torch.cat(held, -1), (0, max(0, MIN_SAMPLES - count)))
    yield first, x[..., : samples_of(max(1, rows_in(count)))]


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
