"""
What are a tokenizer's codes worth? Their use, what survives a disturbance, what they know of the class; side by side.

    python report.py random kmeans out/tokenizer_iter2.pt out/tokenizer_iter3.pt --data packs/esc50 --split 5
    python report.py random out/tokenizer_iter2.pt --data packs/esc50 --split 5 --json out/report.json --figure out/report.png

A tokenizer is a checkpoint, ours or released, or a baseline fitted here on the clips outside --split:
    random          smooth random projection, the labels of iteration 1
    random-plain    white-noise filters, the paper's plain form
    kmeans          nearest centroid of normalised log-mel patches

Glossary. Patches of digital silence are left out of everything; intervals are 95 %, by bootstrap over clips.
    agreement       share of the patches that keep their code when the clip is disturbed
    kappa           (agreement - chance) / (1 - chance), chance by how often each code is used; 0 = nothing survives
    cosine          between the code vectors of a patch before and after
    retrieval       disturbed clips whose own clean clip is the nearest, by code vectors averaged over time band by band
    purity          share of the patches whose class is the commonest one of their code (cluster purity: the reverse)
    PNMI, AMI       mutual information of code and class over the class's entropy; adjusted for chance (Vinh et al. 2010)
    shuffled        the same with the classes dealt out anew, to patches (what small samples fake), or to whole clips (what
                    knowing the clip, but nothing of its class, is worth); only what lies above is about the class
    unrelated       agreement and kappa of two clips of different classes: the floor
"""
import argparse
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import data
from common import UserError, setup
from model import BANDS, PATCH, SAMPLE_RATE, CheckpointError, fbank, num_tokens, patchify, valid_tokens
from recipes import SUFFIXES
from tokenizer import RandomProjectionTokenizer, Tokenizer, code_use, is_silent, load_tokenizer

BASELINES = ("random", "random-plain", "kmeans")
CONDITIONS = "reverb,noise20,noise10,noise0,gain"

# -----------------------------------------------------------------------------
# disturbances: (n,) -> (n,), in place in time, so that patch t is still patch t

def impulse_response(rng):
    """A made room: the direct sound, then noise that decays by 60 dB in 0.2 to 0.8 s, -5 to 10 dB below or above it."""
    decay, direct_to_rest = rng.uniform(0.2, 0.8), rng.uniform(-5, 10)
    t = np.arange(1, int(decay * SAMPLE_RATE)) / SAMPLE_RATE
    rest = rng.standard_normal(len(t)) * np.exp(-6.908 * t / decay)
    return np.concatenate([[1.0], rest * 10**(-direct_to_rest / 20) / np.linalg.norm(rest)])

def reverberate(x, h):
    """x in the room h, from the direct path on (an undetected delay would halve the agreement), as loud as before."""
    n = 1 << (len(x) + len(h) - 2).bit_length()
    y = np.fft.irfft(np.fft.rfft(x, n) * np.fft.rfft(h, n), n)
    direct = np.abs(h).argmax()
    y = y[direct:direct + len(x)]
    return y * np.sqrt((x**2).sum() / max((y**2).sum(), 1e-20))

def add_noise(x, noise, snr):
    """noise, repeated as needed, at snr dB under x; the power of x is that of its samples which are not zero."""
    noise = np.resize(noise, len(x))
    power = (x[x != 0]**2).mean()
    return x + noise * np.sqrt(power / max((noise**2).mean(), 1e-20) / 10**(snr / 10))

def disturb(x, condition, rng, room, noise):
    """condition: reverb, gain (half as loud), noise<dB>, or several joined by +. room(rng), noise(rng) -> (m,)."""
    for part in condition.split("+"):
        if part == "reverb":
            x = reverberate(x, room(rng))
        elif part == "gain":
            x = 0.5 * x
        elif part != "clean":
            x = add_noise(x, noise(rng), float(part[len("noise"):]))
    return x

@functools.lru_cache(256)
def sound(path):
    """First channel of a file at 16 kHz, float64, without the zeros around it: channels of a room must not be averaged."""
    try:
        x, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as audio ({getattr(error, 'error_string', error)})") from None
    x = np.trim_zeros(data.resample(x[:, 0].copy(), rate).astype(np.float64))
    if not len(x):
        raise UserError(f"{path}: is digital silence; take it out of the folder")
    return x

def sounds_below(folder, flag):
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES) if folder else []
    if folder and not files:
        raise UserError(f"{flag} {folder}: {'no audio files below it' if Path(folder).is_dir() else 'no such folder'}")
    return files

class Sources:
    """Where clips, rooms and noises come from. disturbed(i, condition, draw): chance is a function of these three and the seed."""

    def __init__(self, pack, labels, clips, rirs="", noises="", seed=0):
        self.pack, self.labels, self.clips, self.seed = pack, labels, clips, seed
        self.rirs, self.noises = sounds_below(rirs, "--rirs"), sounds_below(noises, "--noises")

    def clip(self, i):
        return self.pack.audio(i) / np.float64(32768)

    def another(self, i, rng):
        """A clip with none of clip i's classes, if there is one."""
        others = [j for j in rng.permutation(self.clips)[:100] if j != i and not set(self.labels[i]) & set(self.labels[j])]
        return others[0] if others else i

    def room(self, rng):
        return sound(self.rirs[rng.integers(len(self.rirs))]) if self.rirs else impulse_response(rng)

    def noise(self, i, rng):
        """A stretch of a given file; without files white noise, pink noise or a clip of another class."""
        n, kind = int(self.pack.samples[i]), rng.integers(3)
        if self.noises:
            x = sound(self.noises[rng.integers(len(self.noises))])
            return x[rng.integers(max(1, len(x) - n + 1)):]
        if kind == 2:
            x = np.trim_zeros(self.clip(self.another(i, rng)))
            if len(x):
                return x
        x = rng.standard_normal(n)
        if kind == 1:                       # power falls with 1 / frequency
            x = np.fft.irfft(np.fft.rfft(x) / np.sqrt(np.arange(1, n // 2 + 2)), n)
        return x

    def disturbed(self, i, condition, draw):
        rng = np.random.default_rng([self.seed, i, draw, *condition.encode()])
        return disturb(self.clip(i), condition, rng, self.room, lambda rng: self.noise(i, rng)).astype(np.float32)

# -----------------------------------------------------------------------------
# tokenizers and their codes

class KMeansTokenizer(Tokenizer):
    """The nearest of K centroids of log-mel patches (one mean and deviation for all bins)."""

    def __init__(self, n_codes=1024):
        super().__init__()
        self.n_codes = n_codes
        self.register_buffer("centroids", torch.zeros(n_codes, PATCH * PATCH))

    def codes(self, features, valid=None):
        x = patchify((features - self.mean) / self.std)
        return torch.stack([self.nearest(part) for part in x])

    def nearest(self, x):
        return (x @ self.centroids.T - self.centroids.square().sum(-1) / 2).argmax(-1)

    def fit_(self, batches, iterations=15, most=60_000):
        """Lloyd's algorithm on patches of (wav, lengths) batches, from random ones of them."""
        random = torch.Generator().manual_seed(0)
        features = [(f, valid_tokens(lengths, wav.shape[1]) & ~is_silent(f)) for wav, lengths in batches for f in [fbank(wav)]]
        x = torch.cat([patchify(f)[keep] for f, keep in features])
        self.mean, self.std = x.mean(), x.std()
        x = (x[torch.randperm(len(x), generator=random)[:most]] - self.mean) / self.std
        self.centroids = x[torch.randint(len(x), (self.n_codes,), generator=random)]
        for _ in tqdm(range(iterations), desc="k-means", leave=False, disable=None):
            codes = torch.cat([self.nearest(part) for part in x.split(8192)])
            counts = torch.bincount(codes, minlength=self.n_codes)[:, None]
            sums = torch.zeros_like(self.centroids).index_add_(0, codes, x)
            self.centroids = torch.where(counts > 0, sums / counts.clamp(min=1), self.centroids)
        return self

def code_vectors(tok):
    """(K, d): what a code stands for."""
    vectors = tok.centroids if isinstance(tok, KMeansTokenizer) else tok.codebook
    return vectors if torch.is_tensor(vectors) else vectors.weight

def with_baselines(names, loaded, pack, outside, device):
    """{name to print: tokenizer} of loaded files and of baselines, fitted on up to 400 of the clips outside the split."""
    K = next((tok.n_codes for tok in loaded.values()), 1024)
    if len(loaded) < len(names):
        chosen = np.sort(np.random.default_rng(0).permutation(outside)[:400])
        batches = [data.pad_batch([pack.audio(i) / np.float32(32768) for i in part])
                   for part in np.array_split(chosen, -(-len(chosen) // 16))]
        make = dict(zip(BASELINES, (RandomProjectionTokenizer, functools.partial(RandomProjectionTokenizer, smooth=False),
                                    KMeansTokenizer)))
        loaded |= {name: make[name](K).fit_(batches) for name in names if name in BASELINES}
    paths, stems = {name: Path(name) for name in names}, [Path(name).stem for name in names]
    short = lambda p: p.stem if stems.count(p.stem) == 1 else f"{p.parent.name}/{p.stem}"
    return {short(paths[name]): loaded[name].eval().to(device) for name in names}

@torch.inference_mode()
def encode(toks, sources, chosen, versions, device):
    """Codes and clip vectors of the chosen clips in versions [("clean", 0), (condition, draw), ...].

    codes {name: (versions, clips, T) int32}, -1 at padding and silence, here or in the clean clip; vectors {name: (versions,
    clips, 8 d)}: code vectors averaged over time, band by band. vectors["log-mel"] is the same of the patches themselves.
    """
    order = chosen[np.argsort(sources.pack.samples[chosen], kind="stable")]
    place = {i: n for n, i in enumerate(chosen)}
    T = int(num_tokens(torch.from_numpy(sources.pack.samples[chosen].astype(np.int64))).max())
    codes = {name: np.full((len(versions), len(chosen), T), -1, np.int32) for name in toks}
    vectors = {name: [[None] * len(chosen) for _ in versions] for name in ["log-mel", *toks]}
    mean, std = sources.pack.info["fbank_mean"], sources.pack.info["fbank_std"]
    for part in tqdm(np.array_split(order, -(-len(order) // 16)), desc="encoding", unit="batch", disable=None):
        rows, keep = [place[i] for i in part], None
        for v, (condition, draw) in enumerate(versions):
            wav, lengths = data.pad_batch([sources.disturbed(i, condition, draw) for i in part])
            features = fbank(wav.to(device))
            valid = valid_tokens(lengths.to(device), wav.shape[1])
            sounding = valid & ~is_silent(features)
            keep = sounding if v == 0 else keep         # where the clean clip sounds
            sounding = sounding & keep
            for name in vectors:
                if name == "log-mel":
                    x = patchify((features - mean) / std)
                else:
                    z = toks[name].codes(features, valid)
                    codes[name][v, rows, :z.shape[1]] = z.masked_fill(~sounding, -1).cpu()
                    x = code_vectors(toks[name])[z]
                weight = sounding.view(len(part), -1, BANDS, 1).float()
                means = (x.view(*weight.shape[:3], -1) * weight).sum(1) / weight.sum(1).clamp(min=1)
                for row, one in zip(rows, means.flatten(1).cpu().numpy()):
                    vectors[name][v][row] = one
    return codes, {name: np.array(x) for name, x in vectors.items()}

# -----------------------------------------------------------------------------
# measures

def histograms(z, K):
    """(clips, n) codes, -1 = none -> (clips, K) counts."""
    place = np.arange(len(z))[:, None] * K + z
    return np.bincount(place[z >= 0], minlength=len(z) * K).reshape(len(z), K).astype(np.float64)

def agreement_kappa(z, w, K, weights):
    """Of codes z and w (clips, n), for each row of clip weights (R, clips) -> two (R,)."""
    both = (z >= 0) & (w >= 0)
    z, w = np.where(both, z, -1), np.where(both, w, -1)
    n = weights @ both.sum(1)
    agreement = weights @ ((z == w) & both).sum(1) / n
    chance = (weights @ histograms(z, K) * (weights @ histograms(w, K))).sum(1) / n**2
    return agreement, (agreement - chance) / np.maximum(1 - chance, 1e-12)

def entropy(counts):
    p = counts[counts > 0] / counts.sum()
    return -(p * np.log(p)).sum()

def mutual_information(table):
    return entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table.ravel())

def expected_mutual_information(a, b):
    """Of two labellings with these cluster sizes, one dealt out at random: the hypergeometric sum, in nats (Vinh et al. 2010)."""
    N = int(a.sum())
    (a, a_times), (b, b_times) = (np.unique(np.asarray(x)[np.asarray(x) > 0].astype(np.int64), return_counts=True) for x in (a, b))
    a, b, times = (x.ravel() for x in np.broadcast_arrays(a[:, None], b, a_times[:, None] * b_times))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, N + 1)))])
    mean = a * b / N
    reach = 12 * np.sqrt(mean) + 30                     # what lies beyond has no weight in float64
    low = np.maximum(1, np.maximum(a + b - N, np.floor(mean - reach))).astype(np.int64)
    size = np.minimum(np.minimum(a, b), np.ceil(mean + reach)).astype(np.int64) - low + 1
    pair = np.repeat(np.arange(len(a)), size)
    n = np.arange(len(pair)) - np.repeat(np.cumsum(size) - size, size) + low[pair]
    f, a, b = log_factorial, a[pair], b[pair]
    log_p = f[a] + f[b] + f[N - a] + f[N - b] - f[N] - f[n] - f[a - n] - f[b - n] - f[N - a - b + n]
    return float((times[pair] * n / N * np.log(N * n / (a * b)) * np.exp(log_p)).sum())

def ami(table):
    """Adjusted mutual information of a table of counts (classes, codes), over the mean entropy."""
    expected = expected_mutual_information(table.sum(1), table.sum(0))
    return (mutual_information(table) - expected) / ((entropy(table.sum(0)) + entropy(table.sum(1))) / 2 - expected)

def purity_pnmi(table):
    return table.max(0).sum() / table.sum(), mutual_information(table) / entropy(table.sum(1))

def interval(values):
    """Estimate and bootstraps of it -> [estimate, low, high]. Centred: resampled clips repeat, which makes AMI look better."""
    low, high = np.quantile(values[1:] - values[1:].mean(), (0.025, 0.975)) if len(values) > 1 else (np.nan, np.nan)
    return [float(values[0]), float(values[0] + low), float(values[0] + high)]

def retrieval(x, clean, own):
    """x (n, d) -> share whose nearest row of `clean` by cosine is row own[n]."""
    unit = lambda v: v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
    return float(((unit(x) @ unit(clean).T).argmax(1) == own).mean())

def measure(codes, vectors, table, versions, partner, labels, weights, rng):
    """All measures of one tokenizer: {measure: number, or values (estimate, bootstraps...)}. codes[0] are the clean ones."""
    clean, K = codes[0], len(table)
    use = code_use(np.stack([np.bincount(z[z >= 0], minlength=K) for z in (clean[:, band::BANDS] for band in range(BANDS))]))
    found = dict(codes_used=use["codes_used"], dead_codes=K - use["codes_used"], perplexity=use["perplexity"],
                 entropy_given_band=use["entropy_given_band"])
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    conditions = list(dict.fromkeys(condition for condition, _ in versions[1:]))
    for condition in conditions:
        mine = [v for v, (name, _) in enumerate(versions) if name == condition]
        z, w = np.concatenate([clean] * len(mine), 1), np.concatenate(list(codes[mine]), 1)
        found[f"agreement, {condition}"], found[f"kappa, {condition}"] = agreement_kappa(z, w, K, weights)
        both = (z >= 0) & (w >= 0)
        found[f"cosine, {condition}"] = float((unit[z[both]] * unit[w[both]]).sum(1).mean())
        found[f"retrieval, {condition}"] = np.mean([retrieval(vectors[v], vectors[0], np.arange(len(clean))) for v in mine])
    found["agreement, unrelated"], found["kappa, unrelated"] = agreement_kappa(clean, clean[partner], K, weights)

    known = np.array([len(row) == 1 for row in labels])     # clips of one class
    classes = np.array([row[0] if len(row) == 1 else 0 for row in labels])[known]
    if len(set(classes)) > 1:
        H, one_hot = histograms(clean[known], K), np.eye(classes.max() + 1)
        joint = one_hot[classes].T @ H
        y = np.repeat(classes, H.sum(1).astype(int))
        z = clean[known][clean[known] >= 0]
        by_patch = np.bincount(rng.permutation(y) * K + z, minlength=joint.size).reshape(joint.shape)
        found["purity"], found["PNMI"] = purity_pnmi(joint)
        found["purity, shuffled"], found["PNMI, shuffled"] = purity_pnmi(by_patch)
        found["cluster purity"] = joint.max(1).sum() / joint.sum()
        found["AMI"] = np.array([ami((one_hot[classes].T * w) @ H) for w in weights[:, known]])
        found["AMI, clips shuffled"] = np.mean([ami(one_hot[rng.permutation(classes)].T @ H) for _ in range(5)])
    return {key: x if isinstance(x, np.ndarray) and x.ndim else float(x) if not isinstance(x, int) else x for key, x in found.items()}

# -----------------------------------------------------------------------------
# figure 4 of the paper

def need(package):
    try:
        return __import__(package)
    except ImportError:
        raise UserError("--figure needs matplotlib and scikit-learn: pip install matplotlib scikit-learn") from None

def figure(path, toks, sources, chosen, clean, device, called, condition, copies, seed):
    """t-SNE of ten clips of different classes, clean and disturbed; clean: vectors of all chosen clips; called(i): name."""
    need("matplotlib").use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    rng, ten, seen = np.random.default_rng(seed), [], set()
    for i in rng.permutation(chosen):
        if len(ten) < 10 and not seen & set(sources.labels[i]):
            ten.append(i)
            seen |= set(sources.labels[i])
    ten = np.array(ten)
    versions = [("clean", 0)] + [(condition, draw) for draw in range(copies)]
    _, vectors = encode(toks, sources, ten, versions, device)
    own, row_of = np.tile(np.arange(len(ten)), copies), {i: n for n, i in enumerate(chosen)}
    colours, result = plt.get_cmap("tab10").colors, {}
    columns = min(3, len(vectors))
    rows = -(-len(vectors) // columns)
    plt.rcParams["font.size"] = 9
    fig, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.35 * rows + 0.6), squeeze=False, layout="constrained")
    for number, (ax, name) in enumerate(zip(axes.flat, vectors)):
        x = vectors[name]
        flat = x.reshape(-1, x.shape[-1])
        disturbed = x[1:].reshape(-1, x.shape[-1])
        score = dict(retrieval=retrieval(disturbed, clean[name], np.array([row_of[i] for i in ten])[own]),
                     silhouette=float(silhouette_score(disturbed, own, metric="cosine")))
        result[name] = score
        xy = TSNE(metric="cosine", init="random", perplexity=min(20, len(flat) / 4), random_state=seed).fit_transform(flat)
        xy = xy.reshape(*x.shape[:2], 2)
        for k in range(len(ten)):
            ax.scatter(*xy[1:, k].T, s=12, color=colours[k], alpha=0.75, linewidths=0)
            ax.scatter(*xy[0, k], s=60, color=colours[k], marker="*", edgecolors="black", linewidths=0.6, zorder=3,
                       label=called(ten[k]))
        ax.set(xticks=[], yticks=[], title=f"({'abcdefghijkl'[number]}) {name}",
               xlabel=f"retrieval {100 * score['retrieval']:.0f} %   silhouette {score['silhouette']:.2f}")
        ax.spines[:].set(color="0.75", linewidth=0.8)
    for ax in list(axes.flat)[len(vectors):]:
        ax.axis("off")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8,
               handletextpad=0.2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=200)
    plt.close(fig)
    return result

# -----------------------------------------------------------------------------

def show(result):
    """The report as text."""
    names = list(result["tokenizers"])
    width = [max(16, len(name)) for name in names]
    def cell(name, key):
        x = result["tokenizers"][name].get(key)
        text = ("-" if x is None else f"{x}" if isinstance(x, int) else f"{x:.3f}" if isinstance(x, float)
                else f"{x[0]:.3f} ±{(x[2] - x[1]) / 2:.3f}")
        low, high = result["against_first"].get(name, {}).get(key, (-1, 1))
        return text + (" " if low <= 0 <= high else "+" if low > 0 else "-")
    print(f"\n{'':24}" + "".join(f"  {name:>{n}} " for name, n in zip(names, width)))
    for key in dict.fromkeys(key for name in names for key in result["tokenizers"][name]):
        print(f"{key:24}" + "".join(f"  {cell(name, key):>{n + 1}}" for name, n in zip(names, width)))

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", help="checkpoints, ours or released; random, random-plain, kmeans")
    parser.add_argument("--data", required=True, help="the pack whose clips are encoded")
    parser.add_argument("--split", default="", help="only clips of this fold or split [all]")
    parser.add_argument("--clips", type=int, default=400, help="at most this many of them, 0 = all [400]")
    parser.add_argument("--conditions", default=CONDITIONS, help="reverb, gain, noise<dB>, several joined by + [%(default)s]")
    parser.add_argument("--draws", type=int, default=1, help="of each condition and clip [1]")
    parser.add_argument("--rirs", default="", help="folder of impulse responses [made ones]")
    parser.add_argument("--noises", default="", help="folder of noises [white, pink, clips of other classes]")
    parser.add_argument("--bootstraps", type=int, default=200, help="[200]")
    parser.add_argument("--json", help="write the report to this file, too")
    parser.add_argument("--figure", help="write the t-SNE of ten disturbed clips to this .png")
    parser.add_argument("--figure_condition", "--figure-condition", default="reverb+noise10", help="[reverb+noise10]")
    parser.add_argument("--figure_copies", "--figure-copies", type=int, default=20, help="disturbed copies of each clip [20]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--device", default="auto", help="[auto]")
    args = parser.parse_args(argv)
    conditions = [c for c in args.conditions.split(",") if c]
    for condition in [*conditions, args.figure_condition]:
        if not re.fullmatch(r"(reverb|gain|noise-?\d+)(\+(reverb|gain|noise-?\d+))*", condition):
            raise UserError(f"{condition!r} is no condition; there are reverb, gain, noise<dB> as noise10, "
                            "and several joined as reverb+noise10")
    if args.figure:
        for package in ("matplotlib", "sklearn"):       # before the work, not after it
            need(package)
    _, _, device = setup(args.device, args.seed)
    loaded = {name: load_tokenizer(name) for name in args.tokenizers if name not in BASELINES}
    pack = data.Pack(args.data)
    labels, split, _ = pack.table()
    inside = np.arange(len(pack)) if not args.split else np.flatnonzero(split == args.split)
    if not len(inside):
        raise UserError(f"{args.data} has the splits {', '.join(sorted(set(split) - {''})) or '(none)'}, not {args.split}")
    outside = np.setdiff1d(np.arange(len(pack)), inside) if len(inside) < len(pack) else inside
    chosen = np.sort(np.random.default_rng(args.seed).permutation(inside)[:args.clips or None])
    chosen = np.array([i for i in chosen if pack.audio(i).any()])
    if len(chosen) < 2:
        raise UserError(f"{args.data}: fewer than two clips that are not digital silence; there is nothing to compare")
    sources = Sources(pack, labels, chosen, args.rirs, args.noises, args.seed)
    toks = with_baselines(args.tokenizers, loaded, pack, outside, device)

    versions = [("clean", 0)] + [(condition, draw) for condition in conditions for draw in range(args.draws)]
    codes, vectors = encode(toks, sources, chosen, versions, device)
    C, rng = len(chosen), np.random.default_rng(args.seed)
    weights = np.concatenate([np.ones((1, C)), rng.multinomial(C, [1 / C] * C, args.bootstraps)])      # the same for all tokenizers
    row_of = {i: n for n, i in enumerate(chosen)}
    partner = np.array([row_of[sources.another(i, rng)] for i in chosen])
    found = {"log-mel": {f"retrieval, {condition}": float(np.mean([retrieval(vectors["log-mel"][v], vectors["log-mel"][0], np.arange(C))
             for v, version in enumerate(versions) if version[0] == condition])) for condition in conditions}}
    for name, tok in tqdm(toks.items(), desc="measuring", unit="tokenizer", disable=None):
        found[name] = measure(codes[name], vectors[name], code_vectors(tok).cpu().numpy(), versions, partner,
                              [labels[i] for i in chosen], weights, np.random.default_rng(args.seed))
    first = next(iter(toks))
    result = dict(data=args.data, split=args.split, clips=C, patches=int((codes[first][0] >= 0).sum()),
        draws=args.draws, bootstraps=args.bootstraps,
        tokenizers={name: {key: interval(x) if isinstance(x, np.ndarray) else x for key, x in found[name].items()}
                    for name in [*toks, "log-mel"]},
        against_first={name: {key: interval(x - found[first][key])[1:] for key, x in found[name].items() if isinstance(x, np.ndarray)}
                       for name in toks if name != first})
    if args.figure:
        called = lambda i: pack.classes[labels[i][0]].replace("_", " ") if labels[i] else f"clip {i}"
        result["figure"] = figure(args.figure, toks, sources, chosen, {name: x[0] for name, x in vectors.items()}, device, called,
                                  args.figure_condition, args.figure_copies, args.seed)
    show(result)
    print(f"\n{C} clips{' of split ' + args.split if args.split else ''} of {args.data}, {result['patches']} patches "
          f"that are not silence, {args.draws} draws. ±: 95 %, {args.bootstraps} bootstraps of clips; "
          f"+ and -: above and below {first}, by the same bootstraps")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1))
    return result

if __name__ == "__main__":
    try:
        main()
    except (UserError, CheckpointError) as error:
        sys.exit(f"error: {error}")
