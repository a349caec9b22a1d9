"""
Acoustic tokenizers: which of 1,024 codes does each 16x16 patch have?

    RandomProjectionTokenizer   iteration 1 (paper section 3.2.1): a fixed random projection,
                                a fixed random codebook
    SelfDistilledTokenizer      iteration 2 on (section 3.2.2): encoder -> codebook -> estimator,
                                which has to predict the teacher's features from the codes;
                                its encoder and codebook are the tokenizer
    load_tokenizer              any checkpoint of one: ours, Microsoft's, ESPnet's (export_official_tokenizer)

Codes of sounds: python -m tools.infer CKPT FILES; what they are worth: python -m tools.report.
"""

import dataclasses

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from audio import (
    BANDS,
    MELS,
    PATCH_BINS,
    PATCH_DIM,
    PATCH_FRAMES,
    fbank,
    is_silent,
    patchify,
    prepare_clips,
    valid_tokens
)
from common import (
    CheckpointError,
    all_sum,
    check,
    fingerprint,
    load_state,
    rank,
    read_checkpoint,
    reading,
    world
)
from model import (
    ESPNET_PADS,
    PLAIN,
    Encoder,
    Transformer,
    agreed,
    build,
    count_blocks,
    encoder_to_official,
    on_encoder,
    save_official,
    unpack
)


class Tokenizer(nn.Module):
    """What both kinds share. A subclass has codes(filter bank, valid) -> (B, T), vectors(), state()."""

    @torch.no_grad()
    def encode(self, wav, lengths=None, padding="exact"):
        """Return the codes of waveforms, (B, T) int64, -1 at padding. Nothing else changes.

        wav: (B, n) float in [-1, 1] at 16 kHz; lengths: (B,) samples.
        """
        wav, valid = prepare_clips(wav, lengths, padding)
        return self.codes(fbank(wav), valid).masked_fill(~valid, -1)

    def id(self):
        """Return a hash of the weights and the configuration."""
        state = self.state()
        weights = state.pop("model")
        return fingerprint(weights, state)


# -----------------------------------------------------------------------------
# iteration 1


class RandomProjectionTokenizer(Tokenizer):
    """code = argmin_k || W x - c_k ||, with W and c random (equation 1).

    plain: as printed, with 1024 codes of 256 dimensions, W and c of N(0, 1), and nothing normalised.
    smooth: 8 dimensions; x is standardised per mel bin, the columns of W are smooth (4x4 random values,
    bilinear to 16x16), the projections are whitened, and they and c are unit vectors. Codes of white-noise
    filters are mostly detail that no neighbouring patch predicts. fit_() takes the statistics, which are
    part of the tokenizer's file.
    """

    def __init__(self, n_codes=1024, dim=0, projection="smooth", seed=0):
        super().__init__()
        smooth = projection == "smooth"
        dim = dim or (8 if smooth else 256)
        self.config = dict(n_codes=n_codes, dim=dim, projection=projection, seed=seed)
        self.n_codes, self.smooth = n_codes, smooth

        random = torch.Generator().manual_seed(seed)  # its own: never the global seed
        if smooth:
            filters = torch.randn(dim, 1, 4, 4, generator=random)
            filters = F.interpolate(filters, (PATCH_FRAMES, PATCH_BINS), mode="bilinear")
            codebook = F.normalize(torch.randn(n_codes, dim, generator=random), dim=-1)
        else:
            filters = torch.randn(dim, PATCH_DIM, generator=random)
            codebook = torch.randn(n_codes, dim, generator=random)

        self.register_buffer("filters", filters.flatten(1).T.contiguous())  # (256, dim)
        self.register_buffer("codebook", codebook)                          # (K, dim)
        self.register_buffer("bin_mean", torch.zeros(MELS))
        self.register_buffer("bin_std", torch.ones(MELS))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whiten", torch.eye(dim))

    def project(self, features):
        """(B, N, 128) -> (B, T, dim)"""
        x = (features - self.bin_mean) / self.bin_std
        return patchify(x.float()) @ self.filters.float()

    def codes(self, features, valid=None):
        with torch.autocast(features.device.type, enabled=False):
            z = self.project(features)
            if self.smooth:
                z = (z - self.mean).float() @ self.whiten.float()
                z = F.normalize(z, dim=-1)
            # nearest: of |z - c|^2, what differs from code to code
            codebook = self.codebook.float()
            return (z @ codebook.T - codebook.square().sum(1) / 2).argmax(-1)

    def vectors(self):
        """Return what each code stands for, (K, dim)."""
        return self.codebook

    def state(self):
        """Return what a checkpoint needs to rebuild the tokenizer."""
        return dict(
            kind="random_projection", tokenizer=self.config, model=self.state_dict()
        )

    @torch.no_grad()
    def fit_(self, batches):
        """Take statistics per mel bin and of projections from a list of (wav, lengths), silence left out."""
        features, sounding, frames = [], [], []
        for wav, lengths in batches:
            x = fbank(wav)                                                  # (B, N, 128)
            tokens = valid_tokens(lengths, wav.shape[1]) & ~is_silent(x)    # (B, T)
            features.append(x)
            sounding.append(tokens)
            # the frames of the rows in which every band sounds
            rows = tokens.unflatten(1, (-1, BANDS)).all(-1)  # (B, R)
            frames.append(x.unfold(1, PATCH_FRAMES, PATCH_FRAMES)[rows].mT.flatten(0, 1))
        frames = torch.cat(frames).double()  # (frames, 128)
        check(
            len(frames),
            "the data is digital silence throughout; there is nothing to tokenize"
        )

        if not self.smooth:
            self.bin_mean.fill_(frames.mean())
            self.bin_std.fill_(2 * frames.std())  # as Encoder.normalise divides by 2 std
            return self
        self.bin_mean.copy_(frames.mean(0))
        # one mel bin is empty, hence constant
        self.bin_std.copy_(frames.std(0).clamp(min=0.1))
        z = torch.cat(
            [self.project(x)[tokens] for x, tokens in zip(features, sounding)]
        ).double()
        self.mean.copy_(z.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(z.T))
        self.whiten.copy_(vectors / values.clamp(min=1e-6 * values.max()).sqrt())
        return self


# -----------------------------------------------------------------------------
# the quantizer


class Codebook(nn.Module):
    """Unit vectors that follow what is assigned to them by moving average (van den Oord et al. 2017).

    Buffers, float32: weight (K, dim); cluster_size (K,), moving average of the vectors per step that
    chose each code. Looking up changes nothing; methods ending in _ change them, equally on all ranks.

    Another quantizer is another class with these five methods, and its name in SelfDistilledTokenizer.
    """

    def __init__(self, n_codes, dim, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("weight", torch.zeros(n_codes, dim))
        self.register_buffer("cluster_size", torch.zeros(n_codes))

    def forward(self, z):
        """z (..., dim) -> vectors (..., dim), codes (...), commitment (...).

        The vectors are those of the nearest codes, and gradients pass through them straight to z;
        commitment is the squared distance of z, on the unit sphere, to its vector (equation 3).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)
            weight = self.weight.float()
            codes = (z.detach() @ weight.T).argmax(-1)
            vectors = F.embedding(codes, weight)
            commitment = (z - vectors).square().sum(-1)
            return z + (vectors - z).detach(), codes, commitment

    def vectors(self):
        """Return what each code stands for, (K, dim)."""
        return self.weight

    @torch.no_grad()
    def start_(self, z, per_step=0.0, iterations=10, centres=None):
        """Start from spherical k-means on z (n, dim) of all ranks together, computed on rank 0.

        per_step: vectors of a step, of which every code is taken to have had its share so far.
        centres: indices of the first centres, None = random.
        """
        z = F.normalize(gather_rows(z.float()), dim=-1)
        check(
            len(z),
            "the data is digital silence throughout; there is nothing to make codes of"
        )
        K = len(self.weight)
        if rank() == 0:
            if centres is None:
                order = torch.randperm(len(z), device=z.device)
                centres = order.repeat(-(-K // len(z)))[:K]
            means = z[centres]
            for _ in range(iterations):
                codes = (z @ means.T).argmax(-1)
                sums = torch.zeros_like(means).index_add_(0, codes, z)
                means = torch.where(
                    sums.any(1, keepdim=True), F.normalize(sums, dim=-1), means
                )
            self.weight.copy_(means)
        if world() > 1:
            dist.broadcast(self.weight, 0)
        self.cluster_size.fill_(per_step / K)

    @torch.no_grad()
    def update_(self, z, codes, use):
        """Move each code towards the mean of this step's vectors of all ranks that chose it.

        z: (n, dim); codes: (n,); use: (n,) True where a vector counts. Nothing here waits for the device.
        """
        z = F.normalize(z.float(), dim=-1).masked_fill(~use[:, None], 0)  # times 0, NaN would stay
        counts = z.new_zeros(len(self.weight)).index_add_(0, codes, use.float())
        sums = torch.zeros_like(self.weight).index_add_(0, codes, z)
        counts, sums = all_sum(counts), all_sum(sums)

        means = F.normalize(sums, dim=-1)
        moved = F.normalize(self.decay * self.weight + (1 - self.decay) * means, dim=-1)
        self.weight.copy_(torch.where(counts[:, None] > 0, moved, self.weight))
        # a step without any vector, as one that is left out, changes nothing
        average = self.cluster_size.lerp(counts, 1 - self.decay)
        self.cluster_size.copy_(torch.where(counts.any(), average, self.cluster_size))

    @torch.no_grad()
    def revive_(self, z, use, threshold):
        """Put little used codes on random vectors of this step, where they start as average ones.

        Little used: less than `threshold` times as often as the average. Returns how many, a tensor.
        """
        z = F.normalize(z.float(), dim=-1).masked_fill(~use[:, None], 0)  # times 0, NaN would stay
        chance = use.float() + 1e-9  # a rank may have heard nothing but silence
        fresh = z[torch.multinomial(chance, len(self.weight), replacement=True)]
        if world() > 1:
            dist.broadcast(fresh, 0)

        average = self.cluster_size.mean()
        dead = (self.cluster_size < threshold * average) & fresh.any(1)
        self.weight.copy_(torch.where(dead[:, None], fresh, self.weight))
        self.cluster_size.copy_(torch.where(dead, average, self.cluster_size))
        return dead.sum()


def gather_rows(x):
    """(n_r, d) on each rank r -> (sum n_r, d) on all."""
    if world() == 1:
        return x
    parts = [None] * world()
    dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)


# -----------------------------------------------------------------------------
# iteration 2 on


class SelfDistilledTokenizer(Tokenizer):
    """Encoder -> Linear-Tanh-Linear -> nearest code -> estimator -> teacher's features (equations 2, 3).

    The estimator exists for training only; 0 blocks = none. It predicts target(teacher's features).
    """

    def __init__(
        self, encoder, n_codes=1024, code_dim=256, estimator_blocks=3, target_width=0
    ):
        super().__init__()
        dim = encoder.cfg.dim
        self.config = dict(
            n_codes=n_codes,
            code_dim=code_dim,
            estimator_blocks=estimator_blocks,
            target_width=target_width
        )
        self.n_codes = n_codes
        self.encoder = encoder
        self.quantize_layer = nn.Sequential(
            nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim)
        )
        self.codebook = Codebook(n_codes, code_dim)
        if estimator_blocks:
            self.embed = nn.Linear(code_dim, dim)
            cfg = dataclasses.replace(encoder.cfg, **PLAIN)
            self.estimator = Transformer(cfg, estimator_blocks)
            self.head = nn.Linear(dim, target_width)
            self.register_buffer("target_mean", torch.zeros(target_width))
            self.register_buffer("target_map", torch.eye(target_width))

    def before_codebook(self, patches, valid=None):
        """(B, T, 256) -> z (B, T, code_dim)"""
        return self.quantize_layer(self.encoder(patches, valid))

    def forward(self, patches, valid=None):
        """Return the predicted target (B, T, width), commitment (B, T), codes (B, T), z (B, T, code_dim)."""
        z = self.before_codebook(patches, valid)
        vectors, codes, commitment = self.codebook(z)
        x = self.estimator(self.embed(vectors), valid)
        return self.head(x), commitment, codes, z.detach()

    def target(self, features):
        """Make of the teacher's features (B, T, width) what the estimator predicts: see --targets."""
        return (features.float() - self.target_mean) @ self.target_map

    def codes(self, features, valid=None):
        patches = patchify(self.encoder.normalise(features))
        return self.codebook(self.before_codebook(patches, valid))[1]

    def vectors(self):
        """Return what each code stands for, (K, code_dim)."""
        return self.codebook.vectors()

    def state(self):
        """Return what a checkpoint needs to rebuild the tokenizer."""
        return dict(
            kind="tokenizer",
            tokenizer=self.config,
            encoder=dataclasses.asdict(self.encoder.cfg),
            model=self.state_dict()
        )

    @torch.no_grad()
    def whiten_(self, x):
        """Make the quantize layer whiten what x (n, dim) of all ranks is of, instead of a random map."""
        mean, matrix = whitening(x)
        first, _, last = self.quantize_layer
        first.weight.copy_(0.3 * matrix.T)  # small: where the tanh is nearly straight
        first.bias.copy_(-0.3 * mean @ matrix)
        last.weight.copy_(torch.eye(*last.weight.shape) / 0.3)
        last.bias.zero_()


def whitening(x, share=0.95, least=32):
    """Return mean (D,) and matrix (D, D) float32 of rows x (n, D) of all ranks.

    (x - mean) @ matrix are principal components of unit variance, largest first: those that hold this share
    of the variance, but at least so many, and zeros beyond. What little the others say is mostly noise.
    """
    x = x.double()
    count = all_sum(x.new_full((), len(x))).clamp(min=1)
    mean = all_sum(x.sum(0)) / count
    covariance = all_sum(x.T @ x) / count - mean[:, None] * mean
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)

    before = values.cumsum(0) - values  # what the larger ones hold
    held = before < share * values.sum()
    held[:least] = True
    held &= values > 1e-6 * values[0]
    matrix = torch.where(held, vectors / values.clamp(min=1e-12).sqrt(), 0)
    return mean.float(), matrix.float()


# -----------------------------------------------------------------------------
# what codes are used


def count_codes(codes, n_codes):
    """Count (B, T) codes per band, without -1 = none: (BANDS, n_codes). Does not wait for the device."""
    band = torch.arange(codes.shape[1], device=codes.device) % BANDS
    cell = torch.where(codes < 0, BANDS * n_codes, band * n_codes + codes).flatten()
    counts = torch.zeros(BANDS * n_codes + 1, device=codes.device)
    counts.index_add_(0, cell, torch.ones_like(cell, dtype=counts.dtype))
    return counts[:-1].view(BANDS, n_codes)


def code_use(counts):
    """counts (bands, K) -> dict: codes used and not, perplexity, entropy given the band in nats."""
    counts = counts.double().cpu()
    total, share = counts.sum(0), counts.sum(1) / counts.sum().clamp(min=1)
    return dict(
        codes_used=int((total > 0).sum()),
        dead_codes=int((total == 0).sum()),
        perplexity=entropy(total).exp().item(),
        entropy_given_band=(entropy(counts) * share).sum().item()
    )


def entropy(counts):
    """(..., K) -> (...), in nats"""
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(p).sum(-1)


# -----------------------------------------------------------------------------
# checkpoints


def load_tokenizer(path, cfg=None, fbank=None):
    """Load a tokenizer in eval mode: ours, Microsoft's, ESPnet's. cfg, fbank: see model.load.

    Raises CheckpointError.
    """
    tokenizer = load_any(path, cfg, fbank)
    if not isinstance(tokenizer, Tokenizer):
        kind = "an encoder" if isinstance(tokenizer, Encoder) else "a fine-tuned classifier"
        raise CheckpointError(f"{path}: this file is {kind}, not a tokenizer; use model.load")
    return tokenizer


def load_any(path, cfg=None, fbank=None):
    """Return the Encoder, Classifier or Tokenizer of any checkpoint, in eval mode. Raises CheckpointError."""
    kind, encoder, rest, beside = unpack(read_checkpoint(path), path, cfg, fbank)
    if kind not in ("tokenizer", "random_projection"):
        return build(path, kind, encoder, rest, beside)

    with reading(path):
        said = dict(beside.get("tokenizer", {}))
        if kind == "tokenizer":
            config = agreed(said, shape_on_encoder(rest))
            tokenizer = SelfDistilledTokenizer(encoder, **config)
            rest = on_encoder(encoder, rest)
        else:
            n_codes, dim = rest["codebook"].shape
            config = agreed(said, dict(n_codes=n_codes, dim=dim))
            # where nothing is said: only a smooth one has unit vectors
            unit = rest["codebook"].norm(dim=-1).mean().isclose(torch.ones(()), atol=1e-3)
            config.setdefault("projection", "smooth" if unit else "plain")
            check(config["projection"] in ("smooth", "plain"), "its projection is of no known kind")
            tokenizer = RandomProjectionTokenizer(**config)
    load_state(tokenizer, rest, path)
    return tokenizer.eval().requires_grad_(False)


def shape_on_encoder(rest):
    """Return what the weights that stand on a tokenizer's encoder show of its configuration."""
    shape = dict(estimator_blocks=count_blocks(rest, "estimator.blocks."))
    if "codebook.weight" in rest:  # other quantizers may have none
        shape["n_codes"], shape["code_dim"] = rest["codebook.weight"].shape
    if "head.weight" in rest:
        shape["target_width"] = len(rest["head.weight"])
    return shape


def export_official_tokenizer(tokenizer, path, espnet=False):
    """Write a SelfDistilledTokenizer in the released layout, which has no estimator.

    espnet: see model.export_official.
    """
    cfg, state = encoder_to_official(tokenizer.encoder)
    if espnet:
        state |= ESPNET_PADS
    cfg |= dict(quant_n=tokenizer.n_codes, quant_dim=tokenizer.config["code_dim"])
    codebook = tokenizer.codebook
    state |= {
        f"quantize_layer.{key}": value
        for key, value in tokenizer.quantize_layer.state_dict().items()
    }
    state |= {
        "quantize.embedding.weight": codebook.weight,
        "quantize.embedding.cluster_size": codebook.cluster_size,
        "quantize.embedding.embed_avg": torch.zeros_like(codebook.weight),
        "quantize.embedding.initted": torch.ones(1),
        "quantize.cluster_size": codebook.cluster_size
    }
    save_official(path, cfg, state)
