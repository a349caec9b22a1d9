"""
Built-in sounds: ten classes made from numbers alone, so that everything here runs on a machine without any data.

Classes differ in what happens over time; pitch, loudness, colour and background overlap, so that the average spectrum of
a clip says little about its class.
"""
import numpy as np

from model import SAMPLE_RATE

CLASSES = ["chirp_up", "chirp_down", "siren", "clicks", "pluck", "vowel", "burst", "tremolo", "trill", "drum"]

def toy_clip(rng, kind, seconds=3.0):
    """One sound of a class at random pitch, time, level and timbre, over coloured noise. (n,) float32."""
    n = int(seconds * SAMPLE_RATE)
    length = int(rng.uniform(0.5, 1.0) * n) // 1600 * 1600     # a length that the FFT likes
    t = np.arange(length) / SAMPLE_RATE
    pitch = 150 * 2**rng.uniform(0, 4)                  # Hz
    tone = lambda hz: sum(np.sin(2 * np.pi * h * np.cumsum(hz) / SAMPLE_RATE + rng.uniform(0, 6)) / h**rng.uniform(0.7, 2)
                          for h in range(1, 5)) * np.ones(length)
    pulses = lambda rate, jitter: np.cumsum(rng.uniform(1 - jitter, 1 + jitter, 200) * SAMPLE_RATE / rate).astype(int)
    if kind in ("chirp_up", "chirp_down"):              # a glide of one to two octaves, repeated
        phase = (t * rng.uniform(1, 3) + rng.uniform()) % 1
        x = tone(pitch * 2**(rng.uniform(1, 2) * (phase if kind == "chirp_up" else 1 - phase)))
    elif kind == "siren":                               # pitch goes up and down
        x = tone(pitch * 2**(rng.uniform(0.5, 1) * (1 + np.sin(2 * np.pi * rng.uniform(0.7, 2) * t))))
    elif kind == "trill":                               # jumps between two pitches
        x = tone(pitch * 2**(rng.uniform(0.3, 1.5) * (np.sin(2 * np.pi * rng.uniform(3, 8) * t) > 0)))
    elif kind == "tremolo":                             # steady pitch, moving level
        x = tone(pitch * np.ones(length)) * (1 + np.sin(2 * np.pi * rng.uniform(3, 8) * t))
    elif kind in ("clicks", "pluck", "drum"):           # trains of short events
        x = np.zeros(length)
        for start in pulses(rng.uniform(2, 6), 0.3):
            if start >= length:
                break
            s = np.arange(min(length - start, SAMPLE_RATE)) / SAMPLE_RATE
            if kind == "clicks":
                event = np.exp(-s * 400) * rng.standard_normal(len(s))
            elif kind == "pluck":
                event = sum(np.exp(-s * h * rng.uniform(4, 8)) * np.sin(2 * np.pi * h * pitch * s) / h for h in range(1, 6))
            else:
                event = np.exp(-s * 12) * (np.sin(2 * np.pi * pitch / 3 * (s - 0.4 * s**2).clip(0)) + 0.5 * rng.standard_normal(len(s)))
            x[start:start + len(s)] += event * rng.uniform(0.5, 1)
    elif kind == "vowel":                               # a voice: harmonics under moving formants, in syllables
        f0 = rng.uniform(90, 250) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 3) * t))
        phase, x = np.cumsum(f0) / SAMPLE_RATE, np.zeros(length)
        formants = [rng.uniform(300, 900), rng.uniform(900, 2300), rng.uniform(2300, 3200)]
        for h in range(1, 25):
            x += np.sin(2 * np.pi * h * phase) * sum(np.exp(-((h * f0[::160] - f) / 150)**2) for f in formants).repeat(160)
        x = x * (np.sin(2 * np.pi * rng.uniform(1.5, 3) * t) > rng.uniform(-0.7, 0))
    else:                                               # bursts of band-passed noise
        x = coloured(rng, length, pitch * 2) * np.sin(np.pi * t * rng.uniform(1, 4))**2
    y = np.zeros(n)
    start = rng.integers(n - length + 1)
    y[start:start + length] = coloured(rng, length, 0, x)
    y /= np.sqrt((y**2).mean()) + 1e-9
    noise = coloured(rng, n, 300 * 2**rng.uniform(0, 4), width=rng.uniform(0.7, 3))
    y = y + noise * 10**(-rng.uniform(3, 20) / 20)      # 3 to 20 dB over the background
    return (y / np.abs(y).max() * 10**(-rng.uniform(0, 30) / 20) * 0.99).astype(np.float32)

def coloured(rng, n, centre, x=None, width=0.7):
    """x (white noise if None) through a random smooth equaliser, or a band around centre Hz; unit level."""
    spectrum = np.fft.rfft(rng.standard_normal(n) if x is None else x)
    octaves = np.log2(np.fft.rfftfreq(n, 1 / SAMPLE_RATE).clip(20) / (centre or 1))
    gain = np.exp(-0.5 * (octaves / width)**2) if centre else 10**(np.interp(octaves, np.linspace(4, 13, 8), rng.uniform(-10, 10, 8)) / 20)
    x = np.fft.irfft(spectrum * gain, n)
    return x / (np.sqrt((x**2).mean()) + 1e-9)
