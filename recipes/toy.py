"""
Built-in sounds: ten classes made from numbers alone, so that everything here runs on a machine without data.

Classes differ in what happens over time; pitch, loudness, colour and background overlap, so that the average
spectrum of a clip says little about its class. To add a class, name it in CLASSES and make it in toy_sound.
"""

import numpy as np

from audio import SAMPLE_RATE

CLASSES = "chirp_up chirp_down siren clicks pluck vowel burst tremolo trill drum".split()

# -----------------------------------------------------------------------------
# what sounds are made of


def sine(cycles):
    return np.sin(2 * np.pi * cycles)


def phase_of(hz):
    """Return the phase of a tone of these frequencies, in cycles of [0, 1)."""
    cycles = np.cumsum(hz, dtype="float64") / SAMPLE_RATE
    return np.float32(cycles % 1)


def unit_level(x):
    return x / (np.sqrt((x**2).mean()) + 1e-9)


def octaves_of(n, hz):
    """Return how far above hz the frequencies of n samples are, in octaves."""
    frequency = np.linspace(0, SAMPLE_RATE / 2, n // 2 + 1, dtype="float32")
    return np.log2(frequency.clip(20) / hz)


def filtered(x, gain):
    """Multiply each frequency of x by its gain."""
    spectrum = np.fft.rfft(x) * gain.astype("float32")
    return unit_level(np.fft.irfft(spectrum, len(x)))


def noise_band(rng, n, hz, width=0.7):
    """Make n samples of noise in a band of so many octaves around hz."""
    noise = rng.standard_normal(n, "float32")
    distance = octaves_of(n, hz) / width
    return filtered(noise, np.exp(-0.5 * distance**2))


def equalised(rng, x):
    """Put x through a smooth random filter of up to 10 dB, as a room or a microphone is one."""
    octaves = octaves_of(len(x), 1)
    knots = np.linspace(4, 13, 8)
    decibels = np.interp(octaves, knots, rng.uniform(-10, 10, 8))
    return filtered(x, 10 ** (decibels / 20))


# -----------------------------------------------------------------------------
# classes


def toy_sound(rng, kind, t):
    """Make the sound of a class at the times t, in seconds: one sample each, float32."""
    uniform = rng.uniform
    pitch = 150 * 2 ** uniform(0, 4)

    def wave(low, high):
        """Make a slow sine of low to high Hz."""
        return sine(uniform(low, high) * t)

    def tone(octaves):
        """Make four harmonics, of random phase and strength, of a tone so far above the pitch."""
        phase = phase_of(pitch * 2**octaves)
        x = 0
        for h in range(1, 5):
            harmonic = sine(h * phase + uniform())
            x += harmonic * h ** -uniform(0.7, 2)
        return x

    if "chirp" in kind:
        # a glide of one to two octaves, repeated
        ramp = (uniform(1, 3) * t + uniform()) % 1
        if kind == "chirp_down":
            ramp = 1 - ramp
        return tone(uniform(1, 2) * ramp)

    if kind == "siren":
        # a pitch that goes up and down
        depth = uniform(0.5, 1)
        return tone(depth * (1 + wave(0.7, 2)))

    if kind == "trill":
        # a pitch that jumps between two
        step = uniform(0.3, 1.5)
        return tone(step * (wave(3, 8) > 0))

    if kind == "tremolo":
        # a steady pitch of moving level
        steady = tone(0 * t)
        return steady * (1 + wave(3, 8))

    if kind == "burst":
        # bursts of noise in a band
        noise = noise_band(rng, len(t), 2 * pitch)
        return noise * wave(0.5, 2) ** 2

    if kind == "vowel":
        return vowel(uniform, wave)
    return train(rng, kind, t, pitch)


def vowel(uniform, wave):
    """Make a voice, which has a pitch of its own: harmonics under three formants, in syllables."""
    voice = uniform(90, 250)
    hz = voice * (1 + 0.1 * wave(1, 3))
    phase = phase_of(hz)
    formants = [uniform(300, 900), uniform(900, 2300), uniform(2300, 3200)]

    x = 0
    for h in range(1, 25):
        gain = 0  # it changes slowly: every 10 ms will do
        for formant in formants:
            distance = (h * hz[::160] - formant) / 150
            gain += np.exp(-distance * distance)
        x += sine(h * phase) * gain.repeat(160)
    return x * (wave(1.5, 3) > uniform(-0.7, 0))


def train(rng, kind, t, pitch):
    """Make a train of short events, 2 to 6 a second."""
    rate = rng.uniform(2, 6)
    gaps = rng.uniform(0.7, 1.3, 200) * SAMPLE_RATE / rate
    starts = gaps.cumsum().astype(int)
    x = 0 * t
    for start in starts[starts < len(t)]:
        second = x[start:][:SAMPLE_RATE]
        sound = event(rng, kind, t[: len(second)], pitch)
        second += sound * rng.uniform(0.5, 1)
    return x


def event(rng, kind, t, pitch):
    """Make a pluck of a string, a click or the beat of a drum, from time 0 on."""
    if kind == "pluck":
        x = 0
        for h in range(1, 6):
            decay = np.exp(-t * (h * rng.uniform(4, 8)))
            x += decay * sine(h * pitch * t) / h
        return x

    noise = rng.standard_normal(len(t), "float32")
    if kind == "clicks":
        return np.exp(-400 * t) * noise
    falling = sine(pitch / 3 * (t - 0.4 * t**2))
    return np.exp(-12 * t) * (falling + 0.5 * noise)


def toy_clip(rng, kind):
    """Make 3 s of a class at random pitch, time, level and timbre, over coloured noise: (48000,) float32."""
    uniform = rng.uniform
    n = 3 * SAMPLE_RATE
    length = int(uniform(0.5, 1) * n) // 1600 * 1600  # one that the FFT likes
    t = np.arange(length, dtype="float32") / SAMPLE_RATE
    sound = toy_sound(rng, kind, t)

    start = rng.integers(n - length + 1)
    x = np.zeros(n, "float32")
    x[start : start + length] = equalised(rng, sound)

    # 3 to 20 dB over noise of any colour
    centre = 300 * 2 ** uniform(0, 4)
    noise = noise_band(rng, n, centre, uniform(0.7, 3))
    x = unit_level(x) + noise * 10 ** (-uniform(3, 20) / 20)

    x /= abs(x).max()
    return x * 10 ** (-uniform(0, 30) / 20) * 0.99
