"""
What are a tokenizer's codes worth? Their use, what survives a disturbance, what they know of the class.

    python -m tools.report random kmeans out/tokenizer_iter2.pt --data packs/esc50 --split 5
    python -m tools.report random out/tokenizer_iter2.pt --data packs/esc50 --split 5 --json out/report.json
    python -m tools.report random out/tokenizer_iter2.pt --data packs/esc50 --split 5 --figure out/report.png

The tokenizers come before the flags. Each is a checkpoint, ours or released, or a baseline, which is fitted
here to the clips outside --split:
    random          smooth random projection, the codes of iteration 1
    random-plain    equation 1 as printed, 256 dimensions
    kmeans          nearest centroid of normalised log-mel patches

Glossary. Patches of digital silence are left out of everything; intervals are 95 %, by bootstrap over clips.
    agreement       share of the patches that keep their code when the clip is disturbed
    kappa           (agreement - chance) / (1 - chance), chance by how often each code is used;
                    0 = nothing survives
    cosine          between the code vectors of a patch before and after
    retrieval       disturbed clips whose own clean clip is the nearest, by code vectors averaged over time
                    band by band
    purity          share of the patches whose class is the commonest one of their code
                    (cluster purity: the reverse)
    PNMI, AMI       mutual information of code and class over the class's entropy; adjusted for chance (with
                    scikit-learn only)
    shuffled        the same with the classes dealt out anew, to patches (what small samples fake), or to
                    whole clips (what knowing the clip, but nothing of its class, is worth); only what lies
                    above is about the class
    unrelated       agreement and kappa of two clips of different classes: the floor
"""

import functools
import itertools
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from numpy.fft import irfft, rfft
from numpy.linalg import norm
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

try:
    from sklearn.metrics.cluster import expected_mutual_information
except ImportError:  # the rows of AMI are left out
    expected_mutual_information = None

from audio import (
    BANDS,
    SAMPLE_RATE,
    audio_files,
    fbank,
    is_silent,
    pad_batch,
    patchify,
    resample
)
from common import UserError, check, check_flags, parse, setup
from data import Pack
from tokenizer import (
    RandomProjectionTokenizer,
    Tokenizer,
    code_use,
    count_codes,
    load_tokenizer
)

BASELINES = ("random", "random-plain", "kmeans")

@dataclass
class Config:
    data: str = ""                  # the pack whose clips are encoded
    split: str = ""                 # only clips of this fold or split, none = all
    clips: int = 400                # at most this many of them, 0 = all
    conditions: str = "reverb,noise20,noise10,noise0,gain"  # reverb, gain, noise<dB>, several joined by +
    draws: int = 1                  # of each condition and clip
    rirs: str = ""                  # folder of impulse responses, none = made ones
    noises: str = ""                # folder of noises, none = white, pink, clips of other classes
    bootstraps: int = 200           # of the clips, for the intervals
    json: str = ""                  # write the report to this file, too
    figure: str = ""                # write the t-SNE of ten disturbed clips to this .png
    figure_condition: str = "reverb+noise10"    # how they are disturbed
    figure_copies: int = 20         # disturbed copies of each of them
    seed: int = 0                   # of the choice of clips, the disturbances and the bootstraps
    device: str = "auto"            # auto | cpu | cuda

# -----------------------------------------------------------------------------
# disturbances: (n,) -> (n,), in place in time, so that patch t is still patch t


def impulse_response(chance):
    """Make a room: the direct sound, and noise -5 to 10 dB below it that decays by 60 dB in 0.2 to 0.8 s."""
    decay = chance.uniform(0.2, 0.8)
    below = chance.uniform(-5, 10)
    time = np.arange(1, int(decay * SAMPLE_RATE)) / SAMPLE_RATE
    rest = chance.standard_normal(len(time))
    rest *= np.exp(-6.908 * time / decay)
    rest *= 10 ** (-below / 20) / norm(rest)
    return np.append(1.0, rest)


def reverberate(x, room):
    """Put x in a room, as loud as before, from the direct path on: a mere delay would halve the agreement."""
    n = 1 << (len(x) + len(room)).bit_length()
    y = irfft(rfft(x, n) * rfft(room, n))
    direct = np.abs(room).argmax()
    y = y[direct : direct + len(x)]
    return y * norm(x) / norm(y)


def add_noise(x, noise, snr):
    """Add noise, repeated as needed, at snr dB under x. Zeros in x, its padding, say nothing of its level."""
    noise = np.resize(noise, len(x))
    power = np.mean(x[x != 0] ** 2)
    noise_power = np.mean(noise**2) + 1e-20
    return x + noise * np.sqrt(power / noise_power) * 10 ** (-snr / 20)


@functools.lru_cache(256)
def read_sound(path):
    """Read the first channel of a file, without zeros around it. The mean of channels would be an echo."""
    x, rate = soundfile.read(path, dtype="float32", always_2d=True)
    first = x[:, 0].copy()
    x = np.trim_zeros(resample(first, rate))
    check(len(x), f"{path}: is digital silence; take it out of the folder")
    return x.astype(np.float64)


class Sounds:
    """The clips that are compared, numbered from 0, and the rooms and noises that disturb them.

    clips: (C,) their numbers in the pack; targets: (C, classes) bool.
    """

    def __init__(self, cfg, pack, clips):
        self.cfg = cfg
        self.pack = pack
        self.clips = clips
        self.targets = pack.table[0][pack.index["row"][clips]]
        self.rooms = audio_files(cfg.rirs) if cfg.rirs else []
        self.noises = audio_files(cfg.noises) if cfg.noises else []

    def clean(self, i):
        """Read clip i: (n,) float64."""
        return self.pack.wav(self.clips[i]).double().numpy()

    def another(self, i, chance):
        """Return a clip that shares no class with clip i; i itself if a hundred tries find none."""
        for other in chance.permutation(len(self.clips))[:100]:
            shared = self.targets[i] & self.targets[other]
            if other != i and not shared.any():
                return other
        return i

    def room(self, chance):
        """Return an impulse response, of a file or made."""
        if self.rooms:
            return read_sound(chance.choice(self.rooms))
        return impulse_response(chance)

    def noise(self, i, n, chance):
        """Return a stretch of a file; without files white noise, pink noise or a clip of another class."""
        kind = chance.choice(["white", "pink", "clip"])
        if self.noises:
            x = read_sound(chance.choice(self.noises))
            start = chance.integers(max(1, len(x) - n + 1))
            return x[start:]
        if kind == "clip":
            other = self.another(i, chance)
            return np.trim_zeros(self.clean(other))

        x = chance.standard_normal(n)
        if kind == "pink":  # power falls with 1 / frequency
            frequency = np.arange(n // 2 + 1) + 1
            x = irfft(rfft(x) / np.sqrt(frequency), n)
        return x

    def disturbed(self, i, condition, draw):
        """Return clip i under a condition, (n,) float32. Chance is a function of these three and the seed.

        condition: clean, reverb, gain (half as loud), noise<dB>, or several joined by +
        """
        key = [self.cfg.seed, self.clips[i], draw, *condition.encode()]
        chance = np.random.default_rng(key)
        x = self.clean(i)
        for part in condition.split("+"):
            if part == "reverb":
                x = reverberate(x, self.room(chance))
            elif part == "gain":
                x = 0.5 * x
            elif part != "clean":
                snr = int(part.removeprefix("noise"))
                noise = self.noise(i, len(x), chance)
                x = add_noise(x, noise, snr)
        return torch.from_numpy(x).float()


# -----------------------------------------------------------------------------
# tokenizers and their codes


class KMeansTokenizer(Tokenizer):
    """The nearest of K centroids of log-mel patches (one mean and deviation for all bins)."""

    def codes(self, features, valid=None):
        x = patchify(features)
        return self.nearest((x - self.mean) / self.std)

    def vectors(self):
        return self.centroids

    def nearest(self, x):
        return torch.cdist(x, self.centroids).argmin(-1)

    def fit_(self, batches, n_codes, iterations=15):
        """Run Lloyd's algorithm on 60,000 patches of (wav, lengths) without padding, from random ones."""
        patches = []
        for wav, _ in batches:
            features = fbank(wav)
            sounding = ~is_silent(features)
            patches.append(patchify(features)[sounding])
        x = torch.cat(patches)
        self.mean = x.mean()
        self.std = x.std()

        random = torch.Generator().manual_seed(0)
        order = torch.randperm(len(x), generator=random)
        x = (x[order[:60_000]] - self.mean) / self.std
        start = torch.randint(len(x), (n_codes,), generator=random)
        self.register_buffer("centroids", x[start])
        for _ in range(iterations):
            codes = self.nearest(x)
            for code in codes.unique():
                self.centroids[code] = x[codes == code].mean(0)
        return self


def fit_baseline(name, n_codes, pack, clips):
    """Fit a baseline to clips, each a batch of its own, which has no padding."""
    batches = [pad_batch([pack.wav(clip).numpy()]) for clip in clips]
    if name == "kmeans":
        return KMeansTokenizer().fit_(batches, n_codes)
    projection = "smooth" if name == "random" else "plain"
    return RandomProjectionTokenizer(n_codes, projection=projection).fit_(batches)


def open_tokenizers(names, pack, outside, device):
    """Return {name to print: tokenizer}. Baselines have as many codes as the first of the files.

    They are fitted to up to 400 of the clips `outside`.
    """
    files = {name: load_tokenizer(name) for name in names if name not in BASELINES}
    n_codes = [*(file.n_codes for file in files.values()), 1024][0]
    clips = np.sort(np.random.default_rng(0).permutation(outside)[:400])
    tokenizers = {}
    for name in names:
        title = Path(name).stem
        if title in tokenizers:  # of another folder
            title = name
        tokenizer = files.get(name) or fit_baseline(name, n_codes, pack, clips)
        tokenizers[title] = tokenizer.to(device)
    return tokenizers


@torch.inference_mode()
def encode(sounds, tokenizers, clips, conditions, draws, device):
    """Encode C clips in V versions: clean, and `draws` of each condition.

    Returns codes {name: (C, V, T)}, -1 at padding and where this version or the clean clip is silent;
    and means {name: (C, V, 8 d)}, code vectors averaged over time band by band; of "log-mel", patches.
    """
    versions = [("clean", 0), *itertools.product(conditions, range(draws))]
    info = sounds.pack.info
    codes, means = defaultdict(list), defaultdict(list)
    for i in tqdm(clips, "encoding", disable=None):
        # all versions of a clip are as long as it: a batch without padding
        wav = [sounds.disturbed(i, *version) for version in versions]
        features = fbank(torch.stack(wav).to(device))
        sounding = ~is_silent(features)
        sounding = sounding & sounding[0]  # (V, T)
        patches = patchify((features - info["fbank_mean"]) / info["fbank_std"])
        means["log-mel"].append(band_means(patches, sounding))

        for name, tokenizer in tokenizers.items():
            z = tokenizer.codes(features)
            vectors = tokenizer.vectors()[z]
            means[name].append(band_means(vectors, sounding))
            codes[name].append(z.where(sounding, -1).T.cpu())

    for name in tokenizers:
        codes[name] = pad_sequence(codes[name], True, -1).mT
    for name in means:
        means[name] = torch.stack(means[name])
    return codes, means


def band_means(x, sounding):
    """Average x (V, T, d) over the time that sounds (V, T), band by band: (V, 8 d)."""
    x = x.masked_fill(~sounding[..., None], torch.nan)
    means = x.unflatten(1, (-1, BANDS)).nanmean(1)
    return means.nan_to_num().flatten(1).cpu()


# -----------------------------------------------------------------------------
# what survives: codes z of clean clips, w of disturbed ones, (C, n), -1 = none


def histograms(codes, K, weight):
    """Count the codes of each clip: (C, n) codes and the weight of each -> (C, K)."""
    counts = torch.zeros(len(codes), K, dtype=torch.double)
    codes = codes.clamp(min=0)
    return counts.scatter_add_(1, codes, weight.double())


def agreement_kappa(z, w, K, weights):
    """Return agreement and kappa for each row of weights of the clips (R, C): two (R,)."""
    shared = (z >= 0) & (w >= 0)
    same = shared & (z == w)
    n = weights @ shared.double().sum(1)
    agreement = weights @ same.double().sum(1) / n

    use_z = weights @ histograms(z, K, shared)
    use_w = weights @ histograms(w, K, shared)
    chance = (use_z * use_w).sum(1) / n**2
    kappa = (agreement - chance) / (1 - chance).clamp(min=1e-12)
    return agreement, kappa


def cosine(z, w, vectors):
    """Return the mean cosine between the code vectors (K, d) of z and w."""
    shared = (z >= 0) & (w >= 0)
    z, w = z[shared], w[shared]
    return float(F.cosine_similarity(vectors[z], vectors[w]).mean())


def retrieval(x, clean, own):
    """Return the share of x (n, draws, d) whose nearest row of `clean` by cosine is row own[n]."""
    nearest = (x @ F.normalize(clean).T).argmax(-1)
    return float((nearest == own[:, None]).double().mean())


def retrievals(cfg, means):
    """Return the retrieval of each condition, of means (C, V, d) as from encode."""
    found = {}
    own = torch.arange(len(means))
    versions = means[:, 1:].split(cfg.draws, 1)
    for condition, x in zip(cfg.conditions.split(","), versions):
        found["retrieval, " + condition] = retrieval(x, means[:, 0], own)
    return found


def agreements(cfg, codes, vectors, weights, partner):
    """Return agreement, kappa and cosine of each condition, of codes (C, V, T) as from encode.

    vectors: (K, d); weights: (R, C), ones, then bootstraps; partner: (C,) for each clip one of another class.
    """
    found = {}
    clean = codes[:, 0]
    unrelated = clean[partner][:, None]
    conditions = [*cfg.conditions.split(","), "unrelated"]
    versions = [*codes[:, 1:].split(cfg.draws, 1), unrelated]
    for condition, w in zip(conditions, versions):
        z = clean.repeat(1, w.shape[1])
        w = w.flatten(1)
        agreement, kappa = agreement_kappa(z, w, len(vectors), weights)
        found["agreement, " + condition] = agreement
        found["kappa, " + condition] = kappa
        found["cosine, " + condition] = cosine(z, w, vectors)
    return found


# -----------------------------------------------------------------------------
# what codes know of the class: a table holds counts, (classes, K)


def entropy(counts):
    return torch.special.entr(counts / counts.sum()).sum()


def mutual_information(table):
    return entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table)


def purity(table):
    return float(table.amax(0).sum() / table.sum())


def pnmi(table):
    return float(mutual_information(table) / entropy(table.sum(1)))


def ami(table):
    """Return the adjusted mutual information, over the mean of both entropies (Vinh et al. 2010)."""
    table = table[table.any(1)][:, table.any(0)]
    counts = table.long().numpy()
    expected = expected_mutual_information(counts, counts.sum())
    most = (entropy(table.sum(1)) + entropy(table.sum(0))) / 2
    return float((mutual_information(table) - expected) / (most - expected))


def class_measures(codes, targets, K, weights, seed):
    """Return what codes (C, T) know of targets (C, classes), on clips of one class; {} if that is one."""
    single = targets.sum(1) == 1
    codes, targets = codes[single], targets[single].double()
    if targets.any(0).sum() < 2:
        return {}
    there = codes >= 0
    counts = histograms(codes, K, there)
    table = targets.T @ counts

    # the codes of all patches in another order: that is to deal out the classes
    chance = np.random.default_rng(seed)
    order = chance.permutation(int(there.sum()))
    dealt = codes.masked_scatter(there, codes[there][order])
    shuffled = targets.T @ histograms(dealt, K, there)
    found = {
        "purity": purity(table),
        "PNMI": pnmi(table),
        "purity, shuffled": purity(shuffled),
        "PNMI, shuffled": pnmi(shuffled),
        "cluster purity": purity(table.T)
    }
    if expected_mutual_information is None:
        return found

    # of the bootstraps the first is the estimate, for its weights are ones
    bootstraps = [ami(targets.T * row @ counts) for row in weights[:, single]]
    orders = [chance.permutation(len(targets)) for _ in range(5)]
    dealt = [ami(targets[order].T @ counts) for order in orders]
    ours = {"AMI": torch.tensor(bootstraps), "AMI, clips shuffled": float(np.mean(dealt))}
    return found | ours


# -----------------------------------------------------------------------------
# figure 4 of the paper


def plotting():
    """Return matplotlib's pyplot, and scikit-learn's TSNE and silhouette_score."""
    try:
        from matplotlib import pyplot
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score
    except ImportError:
        raise UserError(
            "--figure needs two packages: pip install matplotlib scikit-learn"
        ) from None
    pyplot.switch_backend("Agg")
    return pyplot, TSNE, silhouette_score


def ten_apart(sounds):
    """Return up to ten clips that share no class."""
    ten = []
    chance = np.random.default_rng(sounds.cfg.seed)
    for i in chance.permutation(len(sounds.clips)):
        shared = sounds.targets[ten] & sounds.targets[i]
        if not shared.any():
            ten.append(i)
    return torch.tensor(ten[:10])


def figure(sounds, tokenizers, everything, device):
    """Write the t-SNE of ten clips of different classes, disturbed; a class stands where its clip is clean.

    everything: {name: (C, V, D)} means of all clips, among which retrieval looks. Returns {name: scores}.
    """
    pyplot, TSNE, silhouette_score = plotting()
    cfg, ten = sounds.cfg, ten_apart(sounds)
    own = torch.arange(len(ten)).repeat_interleave(cfg.figure_copies)
    classes = np.array(sounds.pack.classes)
    _, means = encode(
        sounds, tokenizers, ten, [cfg.figure_condition], cfg.figure_copies, device
    )
    rows = -(-len(means) // 3)
    pyplot.figure(figsize=(9, 3.3 * rows), layout="constrained")
    result = {}
    for number, (name, x) in enumerate(means.items(), 1):
        clean, copies = x[:, 0], x[:, 1:]
        found = retrieval(copies, everything[name][:, 0], ten)
        copies = copies.flatten(0, 1)
        silhouette = float(silhouette_score(copies, own, metric="cosine"))
        result[name] = dict(retrieval=found, silhouette=silhouette)

        x = torch.cat([clean, copies]).numpy()
        perplexity = min(20, len(x) / 4)
        tsne = TSNE(
            metric="cosine", init="random", perplexity=perplexity, random_state=cfg.seed
        )
        xy = tsne.fit_transform(x)
        pyplot.subplot(rows, 3, number, xticks=[], yticks=[])
        pyplot.title(f"{name}\nretrieval {found:.0%}   silhouette {silhouette:.2f}", fontsize=9)
        points = xy[len(ten) :]
        pyplot.scatter(*points.T, s=12, c=own, cmap="tab10")
        for i, point in zip(ten, xy):
            title = " ".join(classes[sounds.targets[i]])
            pyplot.text(*point, title, fontsize=7, ha="center")

    pyplot.savefig(cfg.figure, dpi=200)
    pyplot.close()
    return result


# -----------------------------------------------------------------------------
# the report


def interval(values):
    """Return the 95 % interval (low, high) around an estimate, from it and its bootstraps, (1 + R,).

    Centred: resampled clips repeat, which makes AMI look better.
    """
    estimate, *bootstraps = values.tolist()
    return estimate + np.quantile(bootstraps, (0.025, 0.975)) - np.mean(bootstraps)


def cell(value, first):
    """Return a value as text, with + or - behind it where it is above or below the first tokenizer's."""
    if isinstance(value, float):
        return f"{value:.3f} "
    if not torch.is_tensor(value):
        return f"{value} "
    low, high = interval(value - first)         # by the same bootstraps
    mark = " +-"[int(low > 0) - int(high < 0)]  # -1 is the last
    return f"{value[0]:.3f} ±{np.ptp(interval(value)) / 2:.3f}{mark}"


def show(found, result):
    """Print the report as a table, a column for each tokenizer."""
    first, *_ = found
    print(f"\n{'':24}" + "".join(f"{name:>18} " for name in found))
    for key, value in found[first].items():
        cells = [cell(column.get(key, "-"), value) for column in found.values()]
        print(f"{key:24}" + "".join(f"{text:>19}" for text in cells))
    print(
        "\n{data} {split}: {clips} clips, {patches} patches that are not silence, {draws} draws. "
        "±: 95 %, {bootstraps} bootstraps of clips; + and -: above and below the first, by the same "
        "bootstraps".format(**result)
    )


def choose_clips(cfg, pack):
    """Return the clips to encode, sorted, and those outside the split, to fit baselines to."""
    split = pack.table[1][pack.index["row"]]
    inside = np.isin(split, cfg.split or split)
    check(
        inside.any(),
        f"{cfg.data} has the splits {', '.join(np.unique(split))}, not {cfg.split}"
    )
    chance = np.random.default_rng(cfg.seed)
    chosen = np.sort(chance.permutation(np.flatnonzero(inside))[: cfg.clips or None])
    sounding = np.array([clip for clip in chosen if pack.audio(clip).any()])
    check(
        len(sounding) > 1,
        f"{cfg.data}: fewer than two clips that are not digital silence; there is nothing to compare"
    )
    return sounding, np.flatnonzero(~inside | inside.all())


def read_flags(argv):
    """Return the names of the tokenizers, which come first, and the Config."""
    names = list(itertools.takewhile(lambda word: word[:1] != "-", argv))
    cfg = Config(**parse(Config, __doc__, argv[len(names) :], "TOKENIZERS "))
    check(names, "name tokenizers before the flags: checkpoints, random, random-plain, kmeans")
    check_flags(cfg)
    for condition in f"{cfg.conditions},{cfg.figure_condition}".split(","):
        known = re.fullmatch(r"((reverb|gain|noise-?\d+)(\+(?!$)|$))+", condition)
        check(
            known,
            f"{condition!r} is no condition; there are reverb, gain, noise<dB> as noise10, "
            "and several joined as reverb+noise10"
        )
    return names, cfg


def main(argv):
    names, cfg = read_flags(argv)
    if cfg.figure:
        plotting()  # complains of a missing package now and not at the end
    for path in (cfg.json, cfg.figure):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    _, _, device = setup(cfg.device, cfg.seed)
    pack = Pack(cfg.data)
    clips, outside = choose_clips(cfg, pack)
    sounds, C = Sounds(cfg, pack, clips), len(clips)
    tokenizers = open_tokenizers(names, pack, outside, device)
    conditions = cfg.conditions.split(",")
    codes, means = encode(sounds, tokenizers, range(C), conditions, cfg.draws, device)

    # the same bootstraps for all tokenizers, so that chance in the clips does not tell them apart
    chance = np.random.default_rng(cfg.seed)
    times = chance.multinomial(C, [1 / C] * C, cfg.bootstraps)
    weights = torch.from_numpy(np.insert(times, 0, 1, axis=0)).double()
    partner = [sounds.another(i, chance) for i in range(C)]
    found = {}
    for name, tokenizer in tokenizers.items():
        vectors = tokenizer.vectors().cpu()
        clean, K = codes[name][:, 0], len(vectors)
        found[name] = code_use(count_codes(clean, K))
        found[name] |= agreements(cfg, codes[name], vectors, weights, partner)
        found[name] |= retrievals(cfg, means[name])
        found[name] |= class_measures(clean, sounds.targets, K, weights, cfg.seed)
    found["log-mel"] = retrievals(cfg, means["log-mel"])

    columns = {name: dict(values) for name, values in found.items()}
    for values in columns.values():
        for key, x in values.items():
            if torch.is_tensor(x):
                values[key] = [x[0].item(), *interval(x)]
    patches = int((next(iter(codes.values()))[:, 0] >= 0).sum())
    result = vars(cfg) | dict(clips=C, patches=patches, tokenizers=columns)
    if cfg.figure:
        result["figure"] = figure(sounds, tokenizers, means, device)
    show(found, result)
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, soundfile.SoundFileError) as error:
        sys.exit(f"error: {error}")
