"""
BEATs (Chen et al., 2022): patches of a log-mel filter bank -> transformer.

    Encoder               patch embedding, convolutional position embedding, post-norm blocks with DeepNorm
                          and a gated relative position bias: the released model, number for number
    MaskedAudioModel      encoder + label predictor, for pre-training
    Classifier            encoder + linear head, for fine-tuning
    load                  any checkpoint, ours or Microsoft's (load_official, export_official)

One token is 16 frames (160 ms) of one of 8 frequency bands, numbered time-major: token = row * 8 + band.
Letters in shape comments: B clips, n samples, T tokens, K kept tokens, M masked tokens, D width, H heads.
"""

import dataclasses
import functools
import math
import re
import timeit
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from audio import (
    BANDS,
    PATCH_BINS,
    PATCH_DIM,
    PATCH_FRAMES,
    fbank,
    on_cpu,
    patchify,
    prepare_clips
)
from common import CheckpointError, read_checkpoint
from recipes.tables import read_classes

@dataclass
class EncoderConfig:
    layers: int = 12
    dim: int = 768
    ffn: int = 3072
    heads: int = 12
    patch_dim: int = 512            # width of the patch embedding, before the projection to dim
    conv_pos: int = 128             # taps of the convolutional position embedding, in tokens
    conv_groups: int = 16
    buckets: int = 320              # relative position buckets
    max_distance: int = 800         # tokens; everything farther shares a bucket
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.0
    layerdrop: float = 0.0
    grad_decay: float = 1.0         # gradient entering each layer, times this (released "layer-wise decay")
    fbank_mean: float = 15.41663    # AudioSet; features are (fbank - mean) / (2 std)
    fbank_std: float = 6.55582

PRESETS = {
    "tiny": EncoderConfig(
        layers=4,
        dim=192,
        ffn=768,
        heads=4,
        patch_dim=128,
        dropout=0.0,
        attention_dropout=0.0
    ),
    "base": EncoderConfig(),                                            # 90.3 M parameters
    "large": EncoderConfig(layers=24, dim=1024, ffn=4096, heads=16)    # 311.4 M
}

# blocks and width of the label predictor that goes with them; 0 = the encoder's width
PREDICTORS = {"tiny": (2, 128), "base": (3, 0), "large": (3, 0)}

# -----------------------------------------------------------------------------
# transformer


def relative_bucket(distance, buckets, max_distance):
    """Put key - query distances, int64 of any shape, into T5's buckets.

    Half of them are for each sign; they are exact up to buckets / 4, then logarithmic.
    """
    half = buckets // 2
    exact = half // 2
    steps = distance.abs()

    octaves = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (octaves * (half - exact)).long()
    bucket = torch.where(steps < exact, steps, far.clamp(max=half - 1))
    return bucket + half * (distance > 0)


class RelativeBias(nn.Module):
    """A learned number per head and bucket of distance, shared by all layers."""

    def __init__(self, buckets, max_distance, heads):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, T, positions=None):
        """positions: (B, K) token indices in a grid of T, None = all of them. Returns (B or 1, H, K, K)."""
        if positions is None:
            positions = torch.arange(T, device=self.table.device)[None]

        # one number per distance first; T itself may stand for no token (see take and put)
        distance = torch.arange(-T, T + 1, device=self.table.device)
        bucket = relative_bucket(distance, self.buckets, self.max_distance)
        # F.embedding, not indexing, whose backward adds up in no fixed order with several threads
        bias = F.embedding(bucket, self.table)  # (2T + 1, H)

        key_minus_query = positions[:, None, :] - positions[:, :, None]
        bias = F.embedding(key_minus_query + T, bias)  # (B, K, K, H)
        # heads first in memory, too: blocks read it row by row, and fused kernels want keys side by side
        return bias.permute(0, 3, 1, 2).contiguous()


ATTENTION = "auto"  # auto | plain | fused | flex: how attend() computes; auto = fused on GPUs, else plain


def fused(x):
    return ATTENTION == "fused" or ATTENTION == "auto" and x.is_cuda


def attend(q, k, v, gate, bias, key_bias, p=0.0):
    """Compute softmax(q k^T / sqrt(hd) + gate * bias + key_bias) v, with dropout p.

    q, k, v: (B, H, T, hd); gate: (B, H, T, 1); bias: (B or 1, H, T, T); key_bias: (B, 1, 1, T) or None.
    """
    if ATTENTION == "flex" and p == 0:  # which knows no dropout
        return flex_attend(q, k, v, gate, bias, key_bias)
    if fused(q):
        # the largest tensor of a block: written once, in the dtype of the queries
        gate, bias = gate.to(q.dtype), bias.to(q.dtype)
        if key_bias is None:
            bias = gate * bias
        else:
            bias = torch.addcmul(key_bias.to(q.dtype), gate, bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)

    # on a CPU the backward pass of the fused kernel with a dense bias is several times slower
    scores = torch.addcmul((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), gate, bias)
    if key_bias is not None:
        scores = scores + key_bias
    return dropout(scores.softmax(-1), p) @ v


compiled = functools.cache(torch.compile)


def flex_attend(q, k, v, gate, bias, key_bias):
    """Do as attend() by flex_attention, where gate * bias never exists in memory."""
    from torch.nn.attention.flex_attention import flex_attention

    if key_bias is None:
        key_bias = q.new_zeros(1, 1, 1, k.shape[2])

    def add(score, b, h, i, j):
        score = score + gate[b, h, i, 0] * bias[b % len(bias), h, i, j]
        return score + key_bias[b % len(key_bias), 0, 0, j]

    run = compiled(flex_attention) if q.is_cuda else flex_attention
    return run(q, k, v, score_mod=add)


class Attention(nn.Module):
    """Multi-head self-attention whose position bias is gated per query (WavLM's gate)."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim // heads, 8)  # shared by the heads of the layer
        self.gate_scale = nn.Parameter(torch.ones(heads))

    def forward(self, x, bias, key_bias):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, hd) each

        # the gate: two sums of four outputs; summing the weights first is the same and cheaper
        weight = self.gate.weight.view(2, 4, -1).sum(1)
        offset = self.gate.bias.view(2, 4).sum(1)
        update, reset = F.linear(q, weight, offset).sigmoid().split(1, dim=-1)      # (B, H, T, 1)
        gate = update * (reset * self.gate_scale[:, None, None] - 1) + 2

        y = attend(q, k, v, gate, bias, key_bias, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Post-norm transformer block with DeepNorm: the residual times alpha = (2L)^(1/4), Wang et al. 2022.

    Initialised by Xavier's normal distribution, with gain 1 for q and k and (8L)^(-1/4) for v, out, fc1,
    fc2; the gate by N(0, 0.02), near its neutral value; biases 0.
    """

    def __init__(self, cfg, depth):
        super().__init__()
        self.alpha = (2 * depth) ** 0.25
        self.attn = Attention(cfg.dim, cfg.heads, cfg.attention_dropout)
        self.ln1 = nn.LayerNorm(cfg.dim)
        self.fc1 = nn.Linear(cfg.dim, cfg.ffn)
        self.fc2 = nn.Linear(cfg.ffn, cfg.dim)
        self.ln2 = nn.LayerNorm(cfg.dim)
        self.dropout = Dropout(cfg.dropout)
        self.activation_dropout = Dropout(cfg.activation_dropout)

        beta = (8 * depth) ** -0.25
        q, k, v = self.attn.qkv.weight.chunk(3)
        for weight in (q, k):
            nn.init.xavier_normal_(weight)
        for weight in (v, self.attn.out.weight, self.fc1.weight, self.fc2.weight):
            nn.init.xavier_normal_(weight, beta)
        nn.init.normal_(self.attn.gate.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x, bias, key_bias):
        attended = self.attn(x, bias, key_bias)
        x = self.ln1(self.alpha * x + self.dropout(attended))
        h = self.activation_dropout(F.gelu(self.fc1(x)))
        return self.ln2(self.alpha * x + self.dropout(self.fc2(h)))


class Transformer(nn.Module):
    """A stack of blocks under one position bias. It is used three times: encoder, label predictor, estimator.

    To try another position scheme, change RelativeBias and Attention; another block, Block.
    """

    def __init__(self, cfg, depth):
        super().__init__()
        self.cfg, self.recompute = cfg, False
        self.position_bias = RelativeBias(cfg.buckets, cfg.max_distance, cfg.heads)
        self.blocks = nn.ModuleList(Block(cfg, depth) for _ in range(depth))

    def forward(self, x, valid=None, positions=None, T=None, all_layers=False):
        """x: (B, K, D), the tokens at `positions` (B, K) of a grid of T, or all K = T of them.

        valid: (B, K) True = real, None = all. Returns (B, K, D), or with all_layers the list of all
        len(blocks) + 1 states, the input first.
        """
        bias = self.position_bias(T or x.shape[1], positions)
        key_bias = key_padding_bias(valid)
        if fused(x):  # rounded once, not again in every block
            bias = bias.to(dtype_of_products(x))

        states = [x]
        for block in self.blocks:
            x = self.step(block, x, bias, key_bias)
            if all_layers:
                states.append(x)
        return states if all_layers else x

    def step(self, block, x, bias, key_bias):
        """Go through one block, with what training adds to it."""
        if self.cfg.grad_decay != 1.0:  # the same numbers, a smaller gradient
            x = torch.lerp(x.detach(), x, self.cfg.grad_decay)
        if not self.training:
            return block(x, bias, key_bias)

        # activations are not kept, but computed again in the backward pass
        if self.recompute:
            y = checkpoint(block, x, bias, key_bias, use_reentrant=False)
        else:
            y = block(x, bias, key_bias)
        # computed and left out: the same graph on every rank and step
        if self.cfg.layerdrop > 0:
            y = torch.where(torch.rand((), device=x.device) < self.cfg.layerdrop, x, y)
        return y


def dtype_of_products(x):
    """Return the dtype in which Linear layers answer to x here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def key_padding_bias(valid):
    """(B, T) True = real -> (B, 1, 1, T), -inf at padding; a row of nothing but padding stays finite."""
    if valid is None:
        return None
    hide = ~valid & valid.any(1, keepdim=True)
    bias = torch.zeros(valid.shape, device=valid.device).masked_fill(hide, -math.inf)
    return bias[:, None, None]


def recompute_blocks(model, on=True):
    """Let every stack of a model compute its activations twice instead of keeping them."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.recompute = on


def flops_of(module, tokens):
    """Count the floating-point operations, forward, of Linear layers and attention on so many tokens."""
    total = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            total += 2 * tokens * part.weight.numel()
        if isinstance(part, Attention):
            total += 4 * tokens**2 * part.out.in_features
    return total


# -----------------------------------------------------------------------------
# some of the tokens: indices (B, K) ascend, and T stands for "no token" where a clip has fewer than K


def take(x, index):
    """x: (B, T, D), index: (B, K) -> (B, K, D). No token gives any row: who asks leaves it out later."""
    index = index.clamp(max=x.shape[1] - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def put(x, index, T):
    """x: (B, K, D), index: (B, K) -> (B, T, D), zeros where nothing is put."""
    grid = x.new_zeros(len(x), T + 1, x.shape[-1])  # what belongs to no token goes to T
    index = index[..., None].expand(-1, -1, x.shape[-1])
    return grid.scatter(1, index, x)[:, :T]


def chosen_tokens(chosen, most):
    """chosen: (B, T) bool -> (B, most) indices of the chosen tokens, ascending, filled up with T."""
    T = chosen.shape[1]
    token = torch.arange(T, device=chosen.device)
    return torch.where(chosen, token, T).sort(1).values[:, :most]


def random_mask(noise, valid, mask_ratio):
    """Mask at random, with static shapes. noise, valid: (B, T) -> keep (B, K), masked (B, M) indices.

    Of the n valid tokens of a clip max(1, round((1 - mask_ratio) n)) are kept: those with the least
    noise. So any other masking is another noise. With grid = noise.view(B, rows, BANDS), its mean(2) for
    every band masks whole rows, its mean(1) for every row whole bands; smoothed, it masks blocks.
    """
    T = noise.shape[1]
    visible = max(1, round(T * (1 - mask_ratio)))
    count = valid.sum(1, keepdim=True).double() * (1 - mask_ratio)

    order = noise.masked_fill(~valid, torch.inf).argsort(1).argsort(1)  # 0 = least noise
    kept = valid & (order < count.round().clamp(min=1))
    return chosen_tokens(kept, visible), chosen_tokens(valid & ~kept, T - visible)


def visible_share(keep, valid, T):
    """Return the share of a clip's tokens that is kept, (B, 1, 1) or one number.

    Kept tokens are divided by it before the position convolution, to make up for the hidden ones as
    dropout does: else the convolution would answer four times louder once all tokens are there.
    """
    if valid is None:
        return keep.shape[1] / T
    kept = (keep < T).sum(1).clamp(min=1)
    return (kept / valid.sum(1).clamp(min=1))[:, None, None]


def masked_mean(x, valid):
    """x: (B, T, D), valid: (B, T) -> (B, D); 0 for a clip without valid tokens."""
    weight = valid[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


# -----------------------------------------------------------------------------
# encoder


class ConvPosition(nn.Module):
    """Grouped convolution over the token axis, weight-normalised per tap: x -> gelu(conv(x)), (B, T, D)."""

    def __init__(self, dim, taps, groups):
        super().__init__()
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, taps))
        self.weight_g = nn.Parameter(torch.empty(1, 1, taps))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight_v, std=math.sqrt(4 / (taps * dim)))
        self.weight_g.data = self.weight_v.data.norm(dim=(0, 1), keepdim=True)

    def forward(self, x):
        norm = self.weight_v.norm(dim=(0, 1), keepdim=True)
        weight = self.weight_v * (self.weight_g / norm)
        return F.gelu(convolve(x, weight, self.groups) + self.bias)


CONVOLUTION = "auto"  # auto | direct | fft: how convolve() computes; auto = fft on CPUs, the faster on GPUs


def convolve(x, weight, groups):
    """Convolve x (B, T, D) along T with weight (D, D / groups, taps), in one of two ways."""
    way = CONVOLUTION
    if way == "auto":
        way = "fft" if on_cpu(x) else "direct"
        if x.is_cuda and not torch.compiler.is_exporting():
            D, _, taps = weight.shape
            way = faster_convolution(D, groups, taps, x.device, dtype_of_products(x))
    return conv_by_fft(x, weight, groups) if way == "fft" else conv_direct(x, weight, groups)


@torch.compiler.assume_constant_result  # a compiler asks, and takes the answer into its graph
def faster_convolution(*shape):
    return time_convolutions(*shape)


@functools.cache
def time_convolutions(dim, groups, taps, device, dtype):
    """Time both ways on a device, forward and backward, and return the faster: "direct" or "fft"."""
    times = {}
    with torch.inference_mode(False):  # gradients, also where the caller wants none
        x = torch.ones(16, 512, dim, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(dim, dim // groups, taps, device=device, requires_grad=True)
        for name, way in dict(direct=conv_direct, fft=conv_by_fft).items():

            def run():
                y = way(x, weight, groups)
                _, slope = torch.autograd.grad(y.sum(), [x, weight])
                return slope[0, 0, 0].item()  # waits for the device

            run()
            times[name] = min(timeit.repeat(run, number=3, repeat=3))
    return min(times, key=times.get)


def conv_direct(x, weight, groups):
    """Convolve x (B, T, D) with weight (D, D / groups, taps).

    Output i sees inputs i - taps/2 .. i + (taps-1)/2: an even kernel loses its last position.
    """
    taps = weight.shape[-1]
    x = F.pad(x.transpose(1, 2), (taps // 2, (taps - 1) // 2))
    return F.conv1d(x, weight.to(x.dtype), groups=groups).transpose(1, 2)


class Encoder(nn.Module):
    """The BEATs encoder. Every parameter, by its initialisation in a fresh model:

    patch (patch_dim, 256), ln_patch, proj (dim, patch_dim; none if equal)   PyTorch's defaults
    conv_position   weights N(0, sqrt(4 / (taps dim))), gain = their norm per tap, bias 0
    ln              1, 0
    transformer     position_bias N(0, 0.02); blocks: see Block, with gate_scale 1

    What others use of it, so what another backbone has to have: cfg (dim, layers, fbank_mean, fbank_std),
    forward(patches, valid, keep, all_layers), normalise, features, embed, teach.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.teach_width = cfg, cfg.dim
        self.patch = nn.Linear(PATCH_DIM, cfg.patch_dim, bias=False)
        self.ln_patch = nn.LayerNorm(cfg.patch_dim)
        self.proj = (
            nn.Linear(cfg.patch_dim, cfg.dim) if cfg.patch_dim != cfg.dim else nn.Identity()
        )
        self.input_dropout = Dropout(cfg.input_dropout)
        self.conv_position = ConvPosition(cfg.dim, cfg.conv_pos, cfg.conv_groups)
        self.ln = nn.LayerNorm(cfg.dim)
        self.dropout = Dropout(cfg.dropout)
        self.transformer = Transformer(cfg, cfg.layers)

    def patch_embedding(self, patches):
        """(B, T, 256) -> (B, T, D)"""
        return self.input_dropout(self.proj(self.ln_patch(self.patch(patches))))

    def forward(self, patches, valid=None, keep=None, all_layers=False):
        """patches: (B, T, 256) normalised; valid: (B, T) True = real, None = all.

        keep: (B, K) indices of the tokens that the encoder may see. They stay at their true positions:
        the position convolution runs on the full grid with zeros elsewhere, the relative bias is
        indexed by the kept positions. Masked patches are never looked at.
        Returns (B, T or K, D), or with all_layers the list of layers + 1 states, the first being the
        first block's input.
        """
        T = patches.shape[1]
        if keep is None:
            x = self.patch_embedding(patches)
            if valid is not None:
                x = x * valid[..., None]
            x = x + self.conv_position(x)
        else:
            x = self.patch_embedding(take(patches, keep))           # (B, K, D)
            grid = put(x / visible_share(keep, valid, T), keep, T)  # (B, T, D)
            x = x + take(self.conv_position(grid), keep)
            if valid is not None:
                valid = keep < T
        return self.transformer(self.dropout(self.ln(x)), valid, keep, T, all_layers)

    def normalise(self, features):
        """Shift and scale a filter bank to mean 0 and standard deviation 0.5, on the data it is of."""
        return (features - self.cfg.fbank_mean) / (2 * self.cfg.fbank_std)

    def patches(self, wav, lengths=None, padding="exact"):
        """(B, n) waveforms, (B,) samples -> (B, T, 256) normalised patches, (B, T) valid."""
        wav, valid = prepare_clips(wav, lengths, padding)
        return patchify(self.normalise(fbank(wav))), valid

    def features(self, wav, lengths=None, layer=None, padding="exact"):
        """Compute token features: x (B, T, D), and valid (B, T), True = real.

        wav: (B, n) float in [-1, 1] at 16 kHz, zero-padded; lengths: (B,) samples, None = n.
        layer: None = last; k = output of block k (0 = the first block's input); "all" = (layers + 1,
        B, T, D). audio.rows_of says where they stand in time and frequency.
        """
        patches, valid = self.patches(wav, lengths, padding)
        if layer is None:
            return self(patches, valid), valid
        states = self(patches, valid, all_layers=True)
        return (torch.stack(states) if layer == "all" else states[layer]), valid

    def embed(self, wav, lengths=None, padding="exact"):
        """Average the features over the real tokens: (B, D)."""
        return masked_mean(*self.features(wav, lengths, padding=padding))

    def teach(self, features, valid, layers="last"):
        """Return what a tokenizer learns to predict of a filter bank (B, N, 128): (B, T, D).

        That is the last block's output, or with layers="mean" the mean over the blocks.
        """
        patches = patchify(self.normalise(features))
        if layers == "last":
            return self(patches, valid)
        _, *states = self(patches, valid, all_layers=True)
        return torch.stack(states).mean(0)


# -----------------------------------------------------------------------------
# heads


class MaskedAudioModel(nn.Module):
    """Encoder + label predictor (paper section 3.3): which code does each masked patch have?

    The predictor (Linear, `blocks` transformer blocks, Linear) sees the full grid: encoder outputs at
    kept tokens, zeros at masked ones, and at each an embedding of its band and of its time. It is thrown
    away after pre-training.
    """

    def __init__(self, encoder, codes, blocks=3, dim=0, heads=0):
        super().__init__()
        cfg = encoder.cfg
        dim, heads = dim or cfg.dim, heads or cfg.heads
        self.encoder = encoder
        self.embed = nn.Linear(cfg.dim, dim)
        self.band = nn.Parameter(torch.randn(BANDS, dim) * 0.02)
        cfg = dataclasses.replace(
            cfg, dim=dim, ffn=4 * dim, heads=heads, layerdrop=0.0, grad_decay=1.0
        )
        self.predictor = Transformer(cfg, blocks)
        self.head = nn.Linear(dim, codes)

    def forward(self, patches, valid, keep, masked):
        """patches (B, T, 256), valid (B, T), keep (B, K), masked (B, M) -> logits (B, M, codes)"""
        T = patches.shape[1]
        x = self.embed(self.encoder(patches, valid, keep))  # (B, K, D)
        x = put(x, keep, T)                                 # (B, T, D)

        time = sinusoids(T // BANDS, x.shape[-1], x.device)
        x = x + self.band.repeat(T // BANDS, 1) + time.repeat_interleave(BANDS, 0)
        return self.head(take(self.predictor(x, valid), masked))


def sinusoids(length, dim, device):
    """Return the (length, dim) sinusoidal embedding of time (Vaswani et al. 2017)."""
    time, channel = torch.arange(length, device=device), torch.arange(
        0, dim, 2, device=device
    )
    angle = time[:, None] * 10000.0 ** (-channel / dim)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :dim]


class Classifier(nn.Module):
    """Encoder + one linear layer on every token, averaged over the real ones.

    labels: list of class names. multilabel: probabilities are sigmoids, as in every released file, else
    a softmax.
    """

    def __init__(self, encoder, labels, multilabel=True, dropout=0.0):
        super().__init__()
        self.encoder = encoder
        self.labels, self.multilabel = list(labels), multilabel
        self.teach_width = len(labels)
        self.features, self.embed = encoder.features, encoder.embed
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(encoder.cfg.dim, len(labels))

    def forward(self, patches, valid=None, keep=None):
        """(B, T, 256), (B, T), keep as in Encoder -> logits (B, classes)"""
        x = self.head(self.dropout(self.encoder(patches, valid, keep)))
        if valid is None:
            return x.mean(1)
        return masked_mean(x, valid if keep is None else keep < patches.shape[1])

    def logits(self, wav, lengths=None, padding="exact"):
        """(B, n), (B,) -> (B, classes)"""
        return self(*self.encoder.patches(wav, lengths, padding))

    def predict(self, wav, lengths=None, padding="exact"):
        """(B, n), (B,) -> probabilities (B, classes), in the order of self.labels"""
        logits = self.logits(wav, lengths, padding).float()
        return logits.sigmoid() if self.multilabel else logits.softmax(-1)

    def teach(self, features, valid, layers="last"):
        """Return what a tokenizer learns to predict of a filter bank (B, N, 128): token logits."""
        return self.head(self.encoder.teach(features, valid))

    def reorder(self, class_csv):
        """Bring the classes into the order of AudioSet's class_labels_indices.csv, with its names.

        The released files have an order of their own, and MIDs for names. Raises CheckpointError if
        the table has other classes.
        """
        names = read_classes(class_csv)  # MID -> name
        if set(names) != set(self.labels):
            raise CheckpointError(
                f"{class_csv}: its {len(names)} classes are not the model's {len(self.labels)}; "
                f"not there: {sorted(set(names) - set(self.labels))[:3]}"
            )
        order = [self.labels.index(mid) for mid in names]
        self.head.weight.data = self.head.weight.data[order]
        self.head.bias.data = self.head.bias.data[order]
        self.labels = list(names.values())
        return self


# -----------------------------------------------------------------------------
# checkpoints: ours hold {"kind", "encoder": EncoderConfig as dict, "model", ...}, theirs {"cfg", "model"}


def load(path):
    """Return an Encoder or Classifier in eval mode from any checkpoint, ours or official.

    Pre-training checkpoints (mam) give their encoder. Raises CheckpointError.
    """
    ckpt = read_checkpoint(path)
    if "cfg" in ckpt:
        return load_official(path)
    if ckpt["kind"] not in ("classifier", "mam"):
        raise CheckpointError(
            f"{path}: a {ckpt['kind']} checkpoint holds no encoder to use alone; "
            "tokenizers are loaded with tokenizer.load_tokenizer"
        )
    state = with_stacks(ckpt["model"])
    model = Encoder(EncoderConfig(**ckpt["encoder"]))
    if ckpt["kind"] == "classifier":
        model = Classifier(model, ckpt["labels"], ckpt["multilabel"])
    else:
        inside = [key for key in state if key.startswith("encoder.")]
        state = {key.removeprefix("encoder."): state[key] for key in inside}
    load_state(model, state, path)
    return model.eval()


def load_state(model, state, path):
    """Do model.load_state_dict(state), or raise CheckpointError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: tensors do not fit together: {reason}") from None


def load_encoder(path):
    """Return the Encoder of any checkpoint, in eval mode; of a classifier, what is below its head."""
    model = load(path)
    return model.encoder if isinstance(model, Classifier) else model


def with_stacks(state):
    """Rename the keys of our first checkpoints, in which no stack of blocks was a module of its own."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^encoder\.(blocks|position_bias)\.", r"encoder.transformer.\1.", key)
        key = re.sub(r"^(blocks|position_bias)\.", r"estimator.\1.", key)
        renamed[key] = value
    return renamed


# -----------------------------------------------------------------------------
# released files: Microsoft's layout in and out. Names differ, q, k, v are one matrix here, and the table
# of relative positions, which all layers share, stands once. (Released tokenizers: tokenizer.py.)

OFFICIAL_NAMES = {  # ours -> theirs, part by part
    "ln_patch": "layer_norm",
    "patch.": "patch_embedding.",
    "proj": "post_extract_proj",
    "conv_position": "encoder.pos_conv.0",
    "transformer.blocks": "encoder.layers",
    "attn.gate_scale": "self_attn.grep_a",
    "attn.gate": "self_attn.grep_linear",
    "attn.out": "self_attn.out_proj",
    "attn.qkv": "self_attn.qkv_proj",  # three of theirs, see official_names
    "ln1": "self_attn_layer_norm",
    "ln2": "final_layer_norm"
}
OFFICIAL_CFG = {  # ours -> theirs
    "layers": "encoder_layers",
    "dim": "encoder_embed_dim",
    "ffn": "encoder_ffn_embed_dim",
    "heads": "encoder_attention_heads",
    "patch_dim": "embed_dim",
    "conv_pos": "conv_pos",
    "conv_groups": "conv_pos_groups",
    "buckets": "num_buckets",
    "max_distance": "max_distance",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "dropout_input",
    "layerdrop": "encoder_layerdrop",
    "grad_decay": "layer_wise_gradient_decay_ratio"
}
OFFICIAL_ALWAYS = {  # what every released file says, and this model is
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "layer_norm_first": False,
    "conv_bias": False,
    "activation_fn": "gelu",
    "input_patch_size": PATCH_FRAMES
}


def official_names(name, layers):
    """Return the released names of one of our parameters: several where it is split or repeated there."""
    if name == "transformer.position_bias.table":
        return [
            f"encoder.layers.{i}.self_attn.relative_attention_bias.weight"
            for i in range(layers)
        ]
    if name.startswith("ln."):
        return [f"encoder.layer_norm.{name[3:]}"]
    for ours, theirs in OFFICIAL_NAMES.items():
        name = name.replace(ours, theirs)
    return [name.replace("qkv", part) for part in "qkv"] if "qkv" in name else [name]


def encoder_to_official(encoder):
    """Return (cfg, state_dict) in the released layout, where every layer repeats the bias table."""
    state = {}
    for name, value in encoder.state_dict().items():
        if name == "patch.weight":
            value = value.view(-1, 1, PATCH_FRAMES, PATCH_BINS)
        if name.endswith("gate_scale"):
            value = value.view(1, -1, 1, 1)
        names = official_names(name, encoder.cfg.layers)
        values = value.chunk(3) if "qkv" in name else [value] * len(names)
        state |= zip(names, values)
    cfg = {theirs: getattr(encoder.cfg, ours) for ours, theirs in OFFICIAL_CFG.items()}
    return cfg | OFFICIAL_ALWAYS, state


def encoder_from_official(ckpt, path):
    """Return the Encoder of a released file, and the rest of its state_dict, which is not the encoder's."""
    cfg, rest = ckpt["cfg"], dict(ckpt["model"])
    for key, value in OFFICIAL_ALWAYS.items():
        said = cfg.get(key, value)
        if said != value:
            raise CheckpointError(
                f"{path}: {key}={said!r} is not supported; every released file has {value!r}"
            )
    shape = {"max_distance": 1280}  # what their class takes where a file is silent
    shape |= {ours: cfg[theirs] for ours, theirs in OFFICIAL_CFG.items() if theirs in cfg}
    encoder, state = Encoder(EncoderConfig(**shape)), {}
    try:
        for name, value in encoder.state_dict().items():
            values = [rest.pop(key) for key in official_names(name, encoder.cfg.layers)]
            if name == "patch.weight" or "gate_scale" in name:
                values[0] = values[0].view(value.shape)
            state[name] = torch.cat(values) if "qkv" in name else values[0]
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a released BEATs file: {error} is missing or of another shape"
        ) from None
    load_state(encoder, state, path)
    return encoder, rest


def load_official(path, reorder=None, class_csv=None):
    """Load a released file: an Encoder, or a Classifier if it is fine-tuned, in eval mode.

    reorder="audioset" brings the classes into the order of class_csv, see Classifier.reorder.
    Strict: every key is used and none is missing. Raises CheckpointError.
    """
    if reorder not in (None, "audioset") or bool(reorder) != bool(class_csv):
        raise ValueError(
            'reorder is None or "audioset", which needs class_csv="class_labels_indices.csv"'
        )
    ckpt = read_checkpoint(path)
    if "cfg" not in ckpt:
        raise CheckpointError(
            f"{path}: not an official checkpoint but one of ours; use load"
        )
    model, rest = encoder_from_official(ckpt, path)
    if "quantize.embedding.weight" in rest:
        raise CheckpointError(
            f"{path}: this file is a tokenizer; use tokenizer.load_tokenizer"
        )

    if "predictor.weight" in rest:
        head = {part: rest.pop(f"predictor.{part}") for part in ("weight", "bias")}
        names = {int(number): mid for number, mid in ckpt.get("label_dict", {}).items()}
        labels = [names.get(i, str(i)) for i in range(len(head["bias"]))]
        model = Classifier(model, labels, dropout=ckpt["cfg"].get("predictor_dropout", 0.0))
        model.head.load_state_dict(head)
    if rest:
        raise CheckpointError(
            f"{path}: {len(rest)} unknown keys, {sorted(rest)[0]} the first"
        )
    if reorder:
        if isinstance(model, Encoder):
            raise CheckpointError(
                f"{path}: this file has no classifier head, hence no classes to reorder"
            )
        model.reorder(class_csv)
    return model.eval()


def export_official(model, path):
    """Write an Encoder or Classifier in the released layout, readable by Microsoft's code (strict)."""
    if isinstance(model, Encoder):
        return save_official(path, *encoder_to_official(model))
    cfg, state = encoder_to_official(model.encoder)
    cfg |= dict(
        finetuned_model=True,
        predictor_dropout=model.dropout.p,
        predictor_class=len(model.labels)
    )
    state |= {"predictor.weight": model.head.weight, "predictor.bias": model.head.bias}
    save_official(path, cfg, state, label_dict=dict(enumerate(model.labels)))


def save_official(path, cfg, state, **more):
    state = {
        key: value.detach().float().contiguous().clone() for key, value in state.items()
    }
    torch.save({"cfg": cfg, "model": state} | more, path)


# -----------------------------------------------------------------------------
# faster on a CPU: the same results by other steps


def dropout(x, p):
    """Drop as F.dropout does. On a CPU 16 random bits decide over each element: p to within 1e-5.

    That is cheaper than a Bernoulli draw.
    """
    if p in (0, 1) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = bits >= round(p * 2**16) - 2**15
    return x * (kept.to(x.dtype) / (1 - p))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def conv_by_fft(x, weight, groups):
    """Do what conv_direct does by products of spectra, ten times as fast with its backward pass.

    Block by block (overlap-save): 2 taps inputs give taps + 1 outputs, whatever the length of the clip.
    """
    B, T, D = x.shape
    taps, width = weight.shape[-1], D // groups
    size, outputs = 2 * taps, taps + 1
    blocks = -(-T // outputs)
    before = taps // 2
    x = F.pad(x.float(), (0, 0, before, blocks * outputs - T + taps - 1 - before))
    x = x.unfold(1, size, outputs).mT if blocks > 1 else x[:, None]  # (B, blocks, size, D)
    x = torch.fft.rfft(x, dim=2).view(B * blocks, -1, groups, width)
    weight = torch.fft.rfft(weight.float(), n=size).conj()
    weight = weight.view(groups, width, width, -1)          # (G, out, in, F)
    y = x.permute(1, 2, 0, 3) @ weight.permute(3, 0, 2, 1)  # (F, G, B blocks, out)
    y = y.permute(2, 0, 1, 3).reshape(B * blocks, -1, D)
    y = torch.fft.irfft(y, n=size, dim=1)[:, :outputs]
    return y.reshape(B, -1, D)[:, :T]
