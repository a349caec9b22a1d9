"""
Built-in sounds: ten classes made from numbers alone, so that everything here runs on a machine without any data.

Classes differ in what happens over time; pitch, loudness, colour and background overlap, so that the average spectrum of
a clip says little about its class.
"""
import numpy as np

from model import SAMPLE_RATE

CLASSES = ["chirp_up", "chirp_down", "siren", "clicks", "pluck", "vowel", "burst", "tremolo", "trill", "drum"]

def sine(cycles):
    """Of a phase in cycles, in single precision: ten times faster than in double, and exact enough for a few thousand."""
    return np.sin(np.float32(2 * np.pi) * np.asarray(cycles, np.float32))

def wrapped(hz):
    """The phase of a tone of these frequencies, in cycles of [0, 1)."""
    cycles = np.cumsum(hz, dtype=np.float64) / SAMPLE_RATE
    return (cycles - np.floor(cycles)).astype(np.float32)

def toy_clip(rng, kind, seconds=3.0):
    """One sound of a class at random pitch, time, level and timbre, over coloured noise. (n,) float32."""
    n = int(seconds * SAMPLE_RATE)
    length = int(rng.uniform(0.5, 1.0) * n) // 1600 * 1600     # a length that the FFT likes
    t = (np.arange(length) / SAMPLE_RATE).astype(np.float32)
    pitch = 150 * 2**rng.uniform(0, 4)                  # Hz
    def tone(hz):                                       # four harmonics
        cycles = wrapped(hz * np.ones(length, np.float32))
        return sum(sine(np.float32(h) * cycles + np.float32(rng.uniform())) * np.float32(h**-rng.uniform(0.7, 2)) for h in range(1, 5))
    pulses = lambda rate, jitter: np.cumsum(rng.uniform(1 - jitter, 1 + jitter, 200) * SAMPLE_RATE / rate).astype(int)
    if kind in ("chirp_up", "chirp_down"):              # a glide of one to two octaves, repeated
        phase = (t * np.float32(rng.uniform(1, 3)) + np.float32(rng.uniform())) % 1
        x = tone(pitch * 2**(rng.uniform(1, 2) * (phase if kind == "chirp_up" else 1 - phase)))
    elif kind == "siren":                               # pitch goes up and down
        x = tone(pitch * 2**(rng.uniform(0.5, 1) * (1 + sine(rng.uniform(0.7, 2) * t))))
    elif kind == "trill":                               # jumps between two pitches
        x = tone(pitch * 2**(rng.uniform(0.3, 1.5) * (sine(rng.uniform(3, 8) * t) > 0)))
    elif kind == "tremolo":                             # steady pitch, moving level
        x = tone(pitch) * (1 + sine(rng.uniform(3, 8) * t))
    elif kind in ("clicks", "pluck", "drum"):           # trains of short events
        x = np.zeros(length, np.float32)
        for start in pulses(rng.uniform(2, 6), 0.3):
            if start >= length:
                break
            s = (np.arange(min(length - start, SAMPLE_RATE)) / SAMPLE_RATE).astype(np.float32)
            if kind == "clicks":
                event = np.exp(-s * 400) * rng.standard_normal(len(s), np.float32)
            elif kind == "pluck":
                event = sum(np.exp(-s * (h * rng.uniform(4, 8))) * sine(h * pitch * s) / h for h in range(1, 6))
            else:
                event = np.exp(-s * 12) * (sine(pitch / 3 * (s - 0.4 * s**2).clip(0)) + 0.5 * rng.standard_normal(len(s), np.float32))
            x[start:start + len(s)] += event * rng.uniform(0.5, 1)
    elif kind == "vowel":                               # a voice: harmonics under moving formants, in syllables
        f0 = rng.uniform(90, 250) * (1 + 0.1 * sine(rng.uniform(1, 3) * t))
        cycles, x = wrapped(f0), np.zeros(length, np.float32)
        formants = [rng.uniform(300, 900), rng.uniform(900, 2300), rng.uniform(2300, 3200)]
        for h in range(1, 25):
            x += sine(np.float32(h) * cycles) * sum(np.exp(-((h * f0[::160] - f) / 150)**2)
                                                    for f in formants).astype(np.float32).repeat(160)
        x = x * (sine(rng.uniform(1.5, 3) * t) > rng.uniform(-0.7, 0))
    else:                                               # bursts of band-passed noise
        x = coloured(rng, length, pitch * 2) * sine(t * rng.uniform(0.5, 2))**2
    y = np.zeros(n, np.float32)
    start = rng.integers(n - length + 1)
    y[start:start + length] = coloured(rng, length, 0, x)
    y /= np.sqrt((y**2).mean()) + 1e-9
    noise = coloured(rng, n, 300 * 2**rng.uniform(0, 4), width=rng.uniform(0.7, 3))
    y = y + noise * 10**(-rng.uniform(3, 20) / 20)      # 3 to 20 dB over the background
    return (y / np.abs(y).max() * 10**(-rng.uniform(0, 30) / 20) * 0.99).astype(np.float32)

def coloured(rng, n, centre, x=None, width=0.7):
    """x (white noise if None) through a random smooth equaliser, or a band around centre Hz; unit level. float32"""
    spectrum = np.fft.rfft(rng.standard_normal(n, np.float32) if x is None else x)
    octaves = np.log2(np.linspace(0, SAMPLE_RATE / 2, n // 2 + 1, dtype=np.float32).clip(20) / np.float32(centre or 1))
    gain = (np.exp(-0.5 * (octaves / np.float32(width))**2) if centre
            else 10**(np.interp(octaves, np.linspace(4, 13, 8), rng.uniform(-10, 10, 8)) / 20))
    x = np.fft.irfft(spectrum * gain.astype(np.float32), n)
    return x / (np.sqrt((x**2).mean()) + np.float32(1e-9))
