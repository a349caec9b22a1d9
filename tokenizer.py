"""
Acoustic tokenizers: which of 1,024 labels does each 16x16 patch have?

    RandomProjectionTokenizer   iteration 1 (paper section 3.2.1): a fixed random projection, a fixed random codebook
    SelfDistilledTokenizer      iteration 2 on (section 3.2.2): encoder -> codebook -> estimator, which has to predict
                                the teacher's features from the codes; its encoder and codebook are the tokenizer
    load_tokenizer              our checkpoints and the released Tokenizer_iter*.pt

    python tokenizer.py out/tokenizer_iter2.pt folder/ --out tokens     # codes of sounds as .npy
    python tokenizer.py out/tokenizer_iter2.pt --data packs/esc50       # what the codes are worth, see report.py
"""
import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from common import UserError, all_sum, autocast, barrier, rank, setup, world
from infer import for_each_sound
from model import (BANDS, LOG_FLOOR, PATCH, Block, CheckpointError, Encoder, EncoderConfig, RelativeBias,
                   fbank, key_padding_bias, num_tokens, patchify, prepare_clips, read_checkpoint, run_block, valid_tokens)
from official import encoder_from_official, encoder_to_official

def is_silent(features):
    """(B, N, 128) fbank -> (B, T) bool: patches of digital silence, every bin at the floor."""
    return patchify(features).amax(-1) < LOG_FLOOR + 1e-3

class Tokenizer(nn.Module):
    """What both kinds share: encode() from waveforms. A subclass gives codes(fbank, valid) -> (B, T)."""

    @torch.no_grad()
    def encode(self, wav, lengths=None, padding="exact"):
        """wav (B, n) float in [-1, 1] at 16 kHz; lengths (B,) samples -> (B, T) int64, -1 at padding. No side effects."""
        wav, valid = prepare_clips(wav, lengths, padding)
        return self.codes(fbank(wav), valid).masked_fill(~valid, -1)

class RandomProjectionTokenizer(Tokenizer):
    """label = argmin_k || normalise(W x) - c_k ||, with W and the unit codes c fixed and random (equation 1).

    smooth=True (default): x is standardised per mel bin, the columns of W are smooth (4x4 random values, bilinear to
    16x16) and the projections are whitened. Labels of white-noise filters (smooth=False, the paper's plain form) are mostly
    detail that no neighbouring patch predicts. fit_() takes the statistics, which are part of the tokenizer's file.
    """

    def __init__(self, n_codes=1024, dim=8, smooth=True, seed=0):
        super().__init__()
        self.config = dict(n_codes=n_codes, dim=dim, smooth=smooth, seed=seed)
        self.n_codes, self.smooth = n_codes, smooth
        random = torch.Generator().manual_seed(seed)        # its own: never the global seed
        filters = torch.randn(dim, 1, *((4, 4) if smooth else (PATCH, PATCH)), generator=random)
        if smooth:
            filters = F.interpolate(filters, size=(PATCH, PATCH), mode="bilinear", align_corners=False)
        self.register_buffer("filters", filters.flatten(1).T.contiguous())                  # (256, dim)
        self.register_buffer("codebook", F.normalize(torch.randn(n_codes, dim, generator=random), dim=-1))
        self.register_buffer("bin_mean", torch.zeros(128))
        self.register_buffer("bin_std", torch.ones(128))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whiten", torch.eye(dim))

    def project(self, features):
        return patchify((features - self.bin_mean) / self.bin_std) @ self.filters           # (B, T, dim)

    def codes(self, features, valid=None):
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize((self.project(features) - self.mean) @ self.whiten, dim=-1)
            return (z @ self.codebook.T).argmax(-1)     # unit vectors: nearest = largest product

    @torch.no_grad()
    def fit_(self, batches):
        """Statistics from a list of (wav, lengths): per mel bin, then of the projections; padding and silence left out."""
        features = [(f, valid_tokens(lengths, wav.shape[1]) & ~is_silent(f)) for wav, lengths in batches for f in [fbank(wav)]]
        if not any(valid.any() for _, valid in features):
            raise UserError("the data is digital silence throughout; there is nothing to tokenize")
        frames = torch.cat([patchify(f)[v.view(len(f), -1, BANDS).all(-1).repeat_interleave(BANDS, 1)].view(-1, BANDS, PATCH, PATCH)
                            for f, v in features]).transpose(1, 2).reshape(-1, BANDS * PATCH).double()
        if self.smooth:
            self.bin_mean.copy_(frames.mean(0))
            self.bin_std.copy_(frames.std(0).clamp(min=0.1))        # one mel bin is empty, hence constant
        else:
            self.bin_mean.fill_(frames.mean())
            self.bin_std.fill_(2 * frames.std())
        if self.smooth:
            z = torch.cat([self.project(f)[v] for f, v in features]).double()
            self.mean.copy_(z.mean(0))
            values, vectors = torch.linalg.eigh(torch.cov(z.T))
            self.whiten.copy_(vectors / values.clamp(min=1e-6 * values.max()).sqrt())
        return self

class Codebook(nn.Module):
    """Unit codes that follow the vectors assigned to them by exponential moving average (van den Oord et al. 2017).

    Buffers, float32: weight (K, dim); cluster_size (K,), moving average of the vectors per step that chose each code.
    Every method ending in _ changes them, equally on all ranks; looking up changes nothing.
    """

    def __init__(self, n_codes, dim, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("weight", torch.zeros(n_codes, dim))
        self.register_buffer("cluster_size", torch.zeros(n_codes))

    def nearest(self, z):
        """z (..., dim) unit -> (...) int64"""
        with torch.autocast(z.device.type, enabled=False):
            return (z.float() @ self.weight.T).argmax(-1)

    @torch.no_grad()
    def kmeans_start_(self, z, iterations=10, start=None):
        """Spherical k-means on z (n, dim) of all ranks together, computed on rank 0. start: indices of the first centres."""
        z = gather_rows(z.float())
        K = len(self.weight)
        if rank() == 0:
            if start is None:
                start = torch.randperm(len(z), device=z.device)[:K] if len(z) >= K else torch.randint(len(z), (K,), device=z.device)
            means = z[start]
            for _ in range(iterations):
                codes = (z @ means.T).argmax(-1)
                counts = torch.bincount(codes, minlength=K)
                sums = torch.zeros_like(means).index_add_(0, codes, z)
                means = torch.where(counts[:, None] > 0, F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1), means)
            self.weight.copy_(means)
        if world() > 1:
            dist.broadcast(self.weight, 0)
        self.cluster_size.zero_()

    @torch.no_grad()
    def update_(self, z, codes, use, revive=0.0):
        """One step on this rank's z (n, dim) and their codes (n,), where use (n,): w <- normalise(0.99 w + 0.01 mean of its vectors).

        A code chosen less than `revive` times as often as the average one is put on a random vector, of any rank's batch, and
        its average starts anew; 0 = never (the released code). Returns how many were, a tensor: nothing here waits for the device.
        """
        K, z = len(self.weight), F.pad(z.float(), (0, 1), value=1.0).masked_fill(~use[:, None], 0)
        both = all_sum(z.new_zeros(K, z.shape[1]).index_add_(0, codes, z))
        sums, counts = both[:, :-1], both[:, -1]
        average = counts.sum() / K
        # first step: every code starts with the benefit of the doubt
        size = torch.where(self.cluster_size.any(), self.cluster_size, average if revive else 0.0)
        size = self.decay * size + (1 - self.decay) * counts
        means = torch.where(counts[:, None] > 0, F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1), self.weight)
        weight = F.normalize(self.decay * self.weight + (1 - self.decay) * means, dim=-1)
        dead = size < revive * average
        if revive:
            # every vector draws a number: the K highest of all ranks, the same on each, are the candidates
            draw, best = torch.rand(len(z), device=z.device).masked_fill(~use, -1).topk(min(K, len(z)))
            rows = F.pad(torch.cat([z[best, :-1], draw[:, None]], 1), (0, 0, 0, K - len(best)), value=-1)
            if world() > 1:
                parts = [torch.empty_like(rows) for _ in range(world())]
                dist.all_gather(parts, rows)
                rows = torch.cat(parts)
            rows = rows[rows[:, -1].topk(K).indices][(dead.cumsum(0) - 1).clamp(min=0)]     # the first dead code takes the first, ...
            dead &= rows[:, -1] >= 0
            weight = torch.where(dead[:, None], rows[:, :-1], weight)
            size = torch.where(dead, average, size)
        self.weight.copy_(weight)
        self.cluster_size.copy_(size)
        return dead.sum()

def gather_rows(x):
    """(n_r, d) on each rank r -> (sum n_r, d) on all."""
    if world() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    most = int(max(sizes))
    parts = [x.new_zeros(most, x.shape[1]) for _ in sizes]
    dist.all_gather(parts, F.pad(x, (0, 0, 0, most - len(x))).contiguous())
    return torch.cat([part[:int(size)] for part, size in zip(parts, sizes)])

def moments(x):
    """Number, sum (D,) and sum of products (D, D) of the rows of x (n, D), over all ranks; float64."""
    x = x.double()
    return all_sum(torch.tensor(float(len(x)), dtype=x.dtype, device=x.device)), all_sum(x.sum(0)), all_sum(x.T @ x)

def whitening(n, total, products, share=0.95, least=32):
    """From moments: mean (D,), matrix (D, D) float32. (x - mean) @ matrix are principal components of unit variance,
    largest first; those that hold this share of the variance, at least so many, and zeros beyond: what little the others say
    is mostly noise."""
    n = n.clamp(min=1)
    mean = total / n
    values, vectors = torch.linalg.eigh(products / n - mean[:, None] * mean)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    held = (values.cumsum(0) - values < share * values.sum()) | (torch.arange(len(values), device=values.device) < least)
    held &= values > 1e-6 * values[0]
    return mean.float(), torch.where(held, vectors / values.clamp(min=1e-12).sqrt(), 0).float()

class SelfDistilledTokenizer(Tokenizer):
    """Encoder -> Linear-Tanh-Linear -> unit vector -> nearest code -> estimator -> teacher's features (equations 2, 3).

    The estimator (blocks of its own, on the straight-through codes) exists for training only; 0 blocks = none.
    target_mean, target_map: the estimator predicts (features - target_mean) @ target_map, see train_tokenizer.py.
    """

    def __init__(self, encoder: Encoder, n_codes=1024, code_dim=256, estimator_blocks=3, target_width=0):
        super().__init__()
        cfg = encoder.cfg
        self.config = dict(n_codes=n_codes, code_dim=code_dim, estimator_blocks=estimator_blocks, target_width=target_width)
        self.n_codes, self.released = n_codes, {}
        self.encoder = encoder
        self.quantize_layer = nn.Sequential(nn.Linear(cfg.dim, cfg.dim), nn.Tanh(), nn.Linear(cfg.dim, code_dim))
        self.codebook = Codebook(n_codes, code_dim)
        if estimator_blocks:
            self.embed = nn.Linear(code_dim, cfg.dim)
            self.position_bias = RelativeBias(cfg.buckets, cfg.max_distance, cfg.heads)
            self.blocks = nn.ModuleList(Block(cfg, estimator_blocks) for _ in range(estimator_blocks))
            self.head = nn.Linear(cfg.dim, target_width)
            self.register_buffer("target_mean", torch.zeros(target_width))
            self.register_buffer("target_map", torch.eye(target_width))

    @torch.no_grad()
    def start_(self, x, whiten):
        """Codebook: k-means of encoder outputs x (n, dim) of all ranks, through a random quantize layer or one that whitens them."""
        if whiten:
            mean, matrix = whitening(*moments(x))
            first, _, last = self.quantize_layer
            first.weight.copy_(0.3 * matrix.T)                          # small: where the tanh is nearly straight
            first.bias.copy_(-0.3 * mean @ matrix)
            last.weight.copy_(torch.eye(*last.weight.shape) / 0.3)
            last.bias.zero_()
        self.codebook.kmeans_start_(F.normalize(self.quantize_layer(x), dim=-1))

    def quantize_input(self, patches, valid=None):
        """(B, T, 256) -> (B, T, code_dim) float32 unit vectors"""
        return F.normalize(self.quantize_layer(self.encoder(patches, valid)).float(), dim=-1)

    def forward(self, patches, valid):
        """Returns z (B, T, code_dim), codes (B, T), prediction of the teacher's features (B, T, target_width)."""
        z = self.quantize_input(patches, valid)
        codes = self.codebook.nearest(z.detach())
        x = z + (self.codebook.weight[codes] - z).detach()          # straight-through
        x = self.embed(x)
        bias, key_bias = self.position_bias(x.shape[1]), key_padding_bias(valid)
        for block in self.blocks:
            x = run_block(block, x, bias, key_bias, self.encoder.recompute and self.training)
        return z, codes, self.head(x)

    def codes(self, features, valid=None):
        return self.codebook.nearest(self.quantize_input(patchify(self.encoder.normalise(features)), valid))

# -----------------------------------------------------------------------------
# checkpoints

def tokenizer_state(tok):
    """What a checkpoint needs to rebuild the tokenizer."""
    if isinstance(tok, RandomProjectionTokenizer):
        return dict(kind="random_projection", tokenizer=tok.config, model=tok.state_dict())
    return dict(kind="tokenizer", tokenizer=tok.config, encoder=dataclasses.asdict(tok.encoder.cfg), model=tok.state_dict())

def load_tokenizer(path):
    """A tokenizer in eval mode, from our checkpoints or a released Tokenizer_iter*.pt (strict). Raises CheckpointError."""
    ckpt = read_checkpoint(path)
    if "cfg" in ckpt:
        rest = dict(ckpt["model"])
        if "quantize.embedding.weight" not in rest:
            kind = "a fine-tuned classifier" if "predictor.weight" in rest else "an encoder"
            raise CheckpointError(f"{path}: this file is {kind}, not a tokenizer; use model.load_official")
        if not rest.pop("quantize.embedding.initted").item():
            raise CheckpointError(f"{path}: its codebook was never initialised")
        tok = SelfDistilledTokenizer(encoder_from_official(ckpt["cfg"], rest, path), *rest["quantize.embedding.weight"].shape, 0)
        tok.codebook.weight.copy_(rest.pop("quantize.embedding.weight"))
        tok.codebook.cluster_size.copy_(rest.pop("quantize.cluster_size"))
        # written once or never, read never; kept for export
        tok.released = {k: rest.pop(k) for k in ("quantize.embedding.embed_avg", "quantize.embedding.cluster_size") if k in rest}
        try:
            tok.quantize_layer.load_state_dict({k[len("quantize_layer."):]: rest.pop(k) for k in list(rest)
                                                if k.startswith("quantize_layer.")})
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if rest:
            raise CheckpointError(f"{path}: {len(rest)} unknown keys, {sorted(rest)[0]} the first")
    elif ckpt["kind"] in ("random_projection", "tokenizer"):
        tok = RandomProjectionTokenizer(**ckpt["tokenizer"]) if ckpt["kind"] == "random_projection" else SelfDistilledTokenizer(
            Encoder(EncoderConfig(**ckpt["encoder"])), **ckpt["tokenizer"])
        try:
            tok.load_state_dict(ckpt["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{path}: not as this version writes tokenizers: {str(error).splitlines()[-1].strip()}") from None
    else:
        raise CheckpointError(f"{path}: this file is {ckpt['kind']}, not a tokenizer")
    return tok.eval().requires_grad_(False)

def export_official_tokenizer(tok, path):
    """Write a SelfDistilledTokenizer in the released layout: encoder, projection and codebook, without the estimator."""
    cfg, state = encoder_to_official(tok.encoder)
    cfg |= dict(quant_n=tok.n_codes, quant_dim=tok.config["code_dim"])
    state |= {"quantize_layer." + k: v for k, v in tok.quantize_layer.state_dict().items()}
    state |= {"quantize.embedding.weight": tok.codebook.weight, "quantize.embedding.cluster_size": tok.codebook.cluster_size,
              "quantize.embedding.embed_avg": torch.zeros_like(tok.codebook.weight),
              "quantize.embedding.initted": torch.ones(1), "quantize.cluster_size": tok.codebook.cluster_size} | tok.released
    torch.save({"cfg": cfg, "model": {k: v.detach().float().contiguous().clone() for k, v in state.items()}}, path)

# -----------------------------------------------------------------------------
# tokens of a whole pack, computed once

def token_offsets(pack):
    """Where each clip's tokens begin in the pack's token file: (clips + 1,)."""
    return np.concatenate([[0], np.cumsum(num_tokens(torch.from_numpy(pack.samples.astype(np.int64))).numpy())])

def tokenizer_hash(tok) -> str:
    """Of its weights and configuration."""
    h = hashlib.sha256(repr(tokenizer_state(tok)["tokenizer"]).encode())
    if isinstance(tok, SelfDistilledTokenizer):
        h.update(repr(tok.encoder.cfg).encode())
    for name, tensor in tok.state_dict().items():
        h.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]

def token_id(tok, pack) -> str:
    """Hash of everything the tokens depend on: the tokenizer with its fbank statistics, the pack's index and audio."""
    return hashlib.sha256((tokenizer_hash(tok) + pack.info["id"]).encode()).hexdigest()[:16]

@torch.no_grad()
def cached_tokens(tok, pack, device, batch_seconds=200.0, dtype="float32"):
    """(tokens, offsets): data.Numbers of every clip's tokens end to end, uint16, and where each clip's begin (clips + 1,).

    Read from tokens-<id>.bin beside the pack, or computed there by all ranks. Until it is whole the file is called .partial,
    and a token that is still to be computed is 65535: a job that was killed, or runs beside another, does what is left.
    """
    offsets = token_offsets(pack)
    path = pack.path / f"tokens-{token_id(tok, pack)}.bin"
    partial = path.with_suffix(".partial")
    if all_sum(torch.tensor(float(not path.exists()), device=device)).item():       # all ranks go in, or none
        try:
            if rank() == 0 and not partial.exists() and not path.exists():
                new = path.with_suffix(f".{os.getpid()}.new")
                with open(new, "wb") as f:
                    for first in range(0, offsets[-1], 2**26):
                        f.write(np.full(min(2**26, offsets[-1] - first), 65535, "<u2").data)
                    os.fsync(f.fileno())
                with contextlib.suppress(FileExistsError):          # another job was faster: its file is as good
                    os.link(new, partial)
                new.unlink()
            barrier()
            try:
                f = open(partial, "r+b")
            except FileNotFoundError:               # another job has finished it
                f = open(path, "r+b")
            with f:
                clips = data.Clips([pack])
                while True:
                    todo = np.flatnonzero(np.maximum.reduceat(np.memmap(f, "<u2", "r"), offsets[:-1]) == 65535)
                    if not all_sum(torch.tensor(float(len(todo)), device=device)).item():   # no rank writes before all have looked
                        break
                    batches = data.epoch_batches(clips.samples, batch_seconds * data.SAMPLE_RATE, (0,), [todo],
                                                 shuffle=False)[rank()::world()]
                    items = [[(i,) for i in batch.tolist()] for batch in batches]
                    for batch in tqdm(data.Loader(clips, items, 1), desc=f"tokenizing {pack.path.name}", unit="batch",
                                      disable=True if rank() else None):
                        batch = data.to_device(batch, device)
                        with autocast(device, dtype):
                            codes = tok.encode(batch["wav"], batch["lengths"]).cpu().numpy()
                        for clip, row in zip(batch["clip"].tolist(), codes):
                            os.pwrite(f.fileno(), row[:offsets[clip + 1] - offsets[clip]].astype("<u2").tobytes(), 2 * offsets[clip])
                    os.fsync(f.fileno())
                    barrier()
            if rank() == 0:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(partial, path)
            barrier()
        except OSError as error:
            raise UserError(f"{partial}: {error.strerror}; tokens are kept beside the audio of a pack, "
                            "in a folder that all ranks share and can write to") from None
    try:
        return data.Numbers(path, "<u2", offsets[-1]), offsets
    except UserError as error:
        raise UserError(f"{error}; remove it, it is made again") from None

def code_use(counts):
    """counts (..., K) of codes per band -> dict: codes used, perplexity, entropy of the codes given the band in nats."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    entropy = lambda p: -(p * p.clamp(min=1e-300).log()).sum(-1)
    total, bands = counts.sum(0), counts.sum(-1)
    return dict(codes_used=int((total > 0).sum()), perplexity=entropy(total / total.sum().clamp(min=1)).exp().item(),
                entropy_given_band=(entropy(counts / bands.clamp(min=1)[:, None]) * bands).sum().item() / max(bands.sum().item(), 1))

@torch.inference_mode()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(flag.split("=")[0] == "--data" for flag in argv):
        import report
        return report.main(argv)
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description="""
Tokens of sounds; or, with --data, a report on the codes of one or several tokenizers (its flags: python report.py --help).

    python tokenizer.py Tokenizer_iter3.pt clip.wav folder/ --out tokens    # tokens/clip.npy: (tokens,), 8 bands per 160 ms
    python tokenizer.py out/tokenizer_iter2.pt random --data packs/mine     # robustness, classes, use of codes, side by side""")
    parser.add_argument("tokenizer", help="a checkpoint, ours or released")
    parser.add_argument("files", nargs="+", help="audio files, and folders of them, of any rate and length")
    parser.add_argument("--out", help="folder of the .npy files [beside the sounds]")
    parser.add_argument("--window", type=float, default=10.0, help="longer recordings are cut into windows of these seconds [10]")
    parser.add_argument("--device", default="auto", help="[auto]")
    args = parser.parse_args(argv)
    _, _, device = setup(args.device)
    tok = load_tokenizer(args.tokenizer).to(device)

    def tokenize(path, wav, lengths, starts, target):
        codes = torch.cat([tok.encode(w.to(device), n).cpu().flatten() for w, n in zip(wav.split(8), lengths.split(8))])
        np.save(target, codes[codes >= 0].numpy())
        print(f"{path} -> {target} ({int((codes >= 0).sum())},)")

    for_each_sound(args.files, args.out, args.window, args.window, tokenize)

if __name__ == "__main__":
    try:
        main()
    except (UserError, CheckpointError) as error:
        sys.exit(f"error: {error}")
