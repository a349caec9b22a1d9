"""
Built-in sounds: ten classes made from numbers alone, so that everything here runs on a machine without data.

Classes differ in what happens over time; pitch, loudness, colour and background overlap, so that the average
spectrum of a clip says little about its class. To add a class, write a function and name it in KINDS.
"""

from functools import partial

import numpy as np

from audio import SAMPLE_RATE

# -----------------------------------------------------------------------------
# what sounds are made of


def sine(cycles):
    return np.sin(2 * np.pi * cycles)


def wave(rng, t, low, high):
    """Return a slow sine at the times t, of low to high Hz."""
    return sine(rng.uniform(low, high) * t)


def phase_of(hz):
    """Return the phase of a tone of these frequencies, in cycles of [0, 1)."""
    cycles = np.cumsum(hz, dtype="float64") / SAMPLE_RATE
    return (cycles % 1).astype("float32")


def tone(rng, pitch, octaves):
    """Make a tone so many octaves above a pitch: four harmonics of random phase and strength."""
    phase = phase_of(pitch * 2**octaves)
    return sum(sine(h * phase + rng.uniform()) * h ** -rng.uniform(0.7, 2) for h in range(1, 5))


def unit_level(x):
    return x / (np.sqrt((x**2).mean()) + 1e-9)


def filtered(x, hz, gain):
    """Weigh each frequency of x with gain(its octaves above hz)."""
    frequency = np.linspace(0, SAMPLE_RATE / 2, len(x) // 2 + 1, dtype="float32")
    octaves = np.log2(frequency.clip(20) / hz)
    spectrum = np.fft.rfft(x) * gain(octaves).astype("float32")
    return unit_level(np.fft.irfft(spectrum, len(x)))


def noise_band(rng, n, hz, width=0.7):
    """Make n samples of noise in a band of so many octaves around hz."""
    noise = rng.standard_normal(n, "float32")
    return filtered(noise, hz, lambda octaves: np.exp(-0.5 * (octaves / width) ** 2))


def equalised(rng, x):
    """Put x through a smooth random filter of up to 10 dB, as a room or a microphone is one."""
    knots = np.linspace(4, 13, 8)
    decibels = rng.uniform(-10, 10, 8)
    return filtered(x, 1, lambda octaves: 10 ** (np.interp(octaves, knots, decibels) / 20))


# -----------------------------------------------------------------------------
# a function per kind of sound: times t in seconds, float32, and a pitch in Hz -> one sample per time


def chirp(rising, rng, t, pitch):
    """Make a glide of one to two octaves, repeated."""
    ramp = (rng.uniform(1, 3) * t + rng.uniform()) % 1
    if not rising:
        ramp = 1 - ramp
    return tone(rng, pitch, rng.uniform(1, 2) * ramp)


def siren(rng, t, pitch):
    """Make a pitch that goes up and down."""
    depth = rng.uniform(0.5, 1)
    return tone(rng, pitch, depth * (1 + wave(rng, t, 0.7, 2)))


def trill(rng, t, pitch):
    """Make a pitch that jumps between two."""
    step = rng.uniform(0.3, 1.5)
    return tone(rng, pitch, step * (wave(rng, t, 3, 8) > 0))


def tremolo(rng, t, pitch):
    """Make a steady pitch of moving level."""
    return tone(rng, pitch, 0 * t) * (1 + wave(rng, t, 3, 8))


def burst(rng, t, pitch):
    """Make bursts of noise in a band."""
    noise = noise_band(rng, len(t), 2 * pitch)
    return noise * wave(rng, t, 0.5, 2) ** 2


def vowel(rng, t, pitch):
    """Make a voice, which has a pitch of its own: harmonics under three formants, in syllables."""
    voice = rng.uniform(90, 250)
    hz = voice * (1 + 0.1 * wave(rng, t, 1, 3))
    phase = phase_of(hz)
    formants = [
        rng.uniform(300, 900),
        rng.uniform(900, 2300),
        rng.uniform(2300, 3200),
    ]

    x = 0
    for h in range(1, 25):
        harmonic = h * hz[::160]  # its gain changes slowly: every 10 ms will do
        gain = sum(np.exp(-(((harmonic - formant) / 150) ** 2)) for formant in formants)
        x += sine(h * phase) * gain.repeat(160)
    return x * (wave(rng, t, 1.5, 3) > rng.uniform(-0.7, 0))


def train(event, rng, t, pitch):
    """Make a train of short events, 2 to 6 a second."""
    rate = rng.uniform(2, 6)
    starts = np.cumsum(rng.uniform(0.7, 1.3, 200) * SAMPLE_RATE / rate).astype(int)
    x = 0 * t
    for start in starts[starts < len(t)]:
        since = t[: len(t) - start][:SAMPLE_RATE]
        x[start : start + len(since)] += event(rng, since, pitch) * rng.uniform(0.5, 1)
    return x


def click(rng, t, pitch):
    return np.exp(-400 * t) * rng.standard_normal(len(t), "float32")


def string(rng, t, pitch):
    return sum(
        np.exp(-t * (h * rng.uniform(4, 8))) * sine(h * pitch * t) / h for h in range(1, 6)
    )


def beat(rng, t, pitch):
    falling = sine(pitch / 3 * (t - 0.4 * t**2).clip(0))
    noise = rng.standard_normal(len(t), "float32")
    return np.exp(-12 * t) * (falling + 0.5 * noise)


KINDS = dict(
    chirp_up=partial(chirp, True),
    chirp_down=partial(chirp, False),
    siren=siren,
    clicks=partial(train, click),
    pluck=partial(train, string),
    vowel=vowel,
    burst=burst,
    tremolo=tremolo,
    trill=trill,
    drum=partial(train, beat),
)
CLASSES = list(KINDS)


def toy_clip(rng, kind, seconds=3.0):
    """Make a sound of a class at random pitch, time, level and timbre, over coloured noise: (n,) float32."""
    n = int(seconds * SAMPLE_RATE)
    length = int(rng.uniform(0.5, 1) * n) // 1600 * 1600  # one that the FFT likes
    t = np.arange(length, dtype="float32") / SAMPLE_RATE
    pitch = 150 * 2 ** rng.uniform(0, 4)
    sound = KINDS[kind](rng, t, pitch)

    before = rng.integers(n - length + 1)
    x = np.pad(equalised(rng, sound), (before, n - length - before))

    # 3 to 20 dB over noise of any colour
    centre = 300 * 2 ** rng.uniform(0, 4)
    noise = noise_band(rng, n, centre, width=rng.uniform(0.7, 3))
    x = unit_level(x) + noise * 10 ** (-rng.uniform(3, 20) / 20)

    level = 10 ** (-rng.uniform(0, 30) / 20)
    return x / np.abs(x).max() * level * 0.99
