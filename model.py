"""
BEATs (Chen et al., 2022): patches of a log-mel filter bank -> transformer.

    Encoder               patch embedding, convolutional position embedding, post-norm blocks with DeepNorm
                          and a gated relative position bias: the released model, number for number
    MaskedAudioModel      encoder + label predictor, for pre-training
    Classifier            encoder + linear head, for fine-tuning
    load                  any checkpoint: ours, Microsoft's, ESPnet's (load_official, export_official)

One token is 16 frames (160 ms) of one of 8 frequency bands, numbered time-major: token = row * 8 + band.
Letters in shape comments: B clips, n samples, T tokens, K kept tokens, M masked tokens, D width, H heads.
"""

import dataclasses
import functools
import json
import math
import numbers
import re
import timeit
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from audio import (
    BANDS,
    FRAME,
    PATCH_BINS,
    PATCH_DIM,
    PATCH_FRAMES,
    fbank,
    on_cpu,
    patchify,
    prepare_clips
)
from common import TABLES, CheckpointError, UserError, check, load_state, note, read_checkpoint, reading
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            kind = numbers.Integral if field.type is int else numbers.Real
            number = isinstance(value, kind) and not isinstance(value, bool)
            check(number and math.isfinite(value), f"{name} is {value!r}, not a number of this kind")
            least = 1 if field.type is int else 0
            enough = value >= least or name == "fbank_mean"
            check(enough, f"{name} is {value}, below {least}")
            check(value <= 1 or "drop" not in name, f"{name} is {value}, a share above 1")
        check(self.fbank_std > 0, "fbank_std is 0")
        check(self.dim % self.heads == 0, f"{self.heads} heads do not divide a width of {self.dim}")
        check(
            1 < self.buckets // 4 < self.max_distance,
            f"{self.buckets} buckets do not fit distances up to {self.max_distance}"
        )

# regularisation that belongs to one training; the next starts without it
PLAIN = dict(activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, grad_decay=1.0)

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
PREDICTORS = defaultdict(lambda: (3, 0), tiny=(2, 128))
TABLES["model"] = PRESETS

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
        if key_bias is not None:
            key_bias = key_bias.to(bias.dtype)
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
    noise. So any other masking is another noise: changes/ masks whole rows and blocks.
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
        """(B, T, 256) -> (B, T, D), in the dtype of the weights"""
        x = self.patch(patches.to(self.patch.weight.dtype))
        return self.input_dropout(self.proj(self.ln_patch(x)))

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
        if layer == "all":
            return torch.stack(states), valid
        if layer not in range(-len(states), len(states)):
            raise ValueError(f"layer is None, \"all\" or 0 to {len(states) - 1}, not {layer!r}")
        return states[layer], valid

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
        cfg = dataclasses.replace(cfg, dim=dim, ffn=4 * dim, heads=heads, **PLAIN)
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
# checkpoints. Ours hold {"kind", "encoder": EncoderConfig as dict, "model", ...}, Microsoft's {"cfg",
# "model", ...}; others nest their weights, prefix their names, or say nothing of their shape. One way in
# for all: find the weights, strip the prefixes, read the shape, build, translate names, load strictly.

KINDS = dict(
    encoder="an encoder",
    mam="a pre-trained encoder with its label predictor",
    classifier="a fine-tuned classifier",
    tokenizer="a tokenizer",
    random_projection="a tokenizer (random projection)"
)
STANDS_ON = dict(  # names of what is on the encoder, in our layout
    classifier=("head.",),
    tokenizer=("codebook.", "quantize_layer.", "embed.", "estimator.", "head.", "target_")
)
# a name by which a model is known: of Microsoft's encoder, of ours, of a random projection
KNOWN_BY = re.compile(r"(.*\.|)(patch_embedding\.weight|patch\.weight|bin_mean)")
WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
OTHER_MODELS = {  # what is in some name of their weights
    "feature_extractor.conv_layers": "wav2vec 2.0, HuBERT or WavLM",
    "patch_embed.proj": "an image-like transformer (AST, AudioMAE, ViT)",
    "exp_avg": "an optimizer without its model"
}
SHOWN_BY = {  # field of EncoderConfig -> the weight that shows it, and which of its dimensions
    "dim": ("ln.weight", 0),
    "ffn": ("transformer.blocks.0.fc1.weight", 0),
    "heads": ("transformer.position_bias.table", 1),
    "patch_dim": ("ln_patch.weight", 0),
    "conv_pos": ("conv_position.weight_v", 2),
    "conv_groups": ("conv_position.weight_v", 1),
    "buckets": ("transformer.position_bias.table", 0)
}


def load(path, cfg=None, fbank=None):
    """Return an Encoder or Classifier in eval mode from any checkpoint: ours, Microsoft's, ESPnet's.

    Pre-training checkpoints give their encoder. What a file does not say is assumed, and said on stderr.
    cfg: says it instead of the file: a preset, a dict or a .json or .yaml file, in our or Microsoft's names,
    or ESPnet's config.yaml. fbank: (mean, std) of the filter bank on which the model was trained.
    Raises CheckpointError.
    """
    return build(path, *unpack(read_checkpoint(path), path, cfg, fbank))


def build(path, kind, encoder, rest, beside):
    """Build the Encoder or Classifier of what unpack returns."""
    if kind in ("tokenizer", "random_projection"):
        raise CheckpointError(
            f"{path}: this file is {KINDS[kind]}; use tokenizer.load_tokenizer"
        )
    if kind != "classifier":
        return encoder.eval()
    with reading(path):
        dropout = beside.get("cfg", {}).get("predictor_dropout", 0.0)
        model = Classifier(encoder, beside["labels"], beside["multilabel"], dropout)
    load_state(model, on_encoder(encoder, rest), path)
    return model.eval()


def with_settings(encoder, **settings):
    """Return a copy of an Encoder with other settings, such as its dropout."""
    copy = Encoder(dataclasses.replace(encoder.cfg, **settings))
    copy.load_state_dict(encoder.state_dict())
    return copy


def load_encoder(path, cfg=None, fbank=None):
    """Return the Encoder of any checkpoint, in eval mode; of a classifier, what is below its head."""
    model = load(path, cfg, fbank)
    return model.encoder if isinstance(model, Classifier) else model


def unpack(ckpt, path, cfg=None, fbank=None):
    """Return (kind, encoder, rest, beside) of the dict that a file holds.

    kind: one of KINDS; encoder: built and loaded, None of a random projection; rest: weights of what stands
    on it, in our names; beside: what the file, or ESPnet's config, says next to its weights.
    """
    notes = []
    with reading(path):
        weights, beside = find_weights(ckpt, notes)
        inner, rest = split(weights)
        if "bin_mean" in inner:
            return "random_projection", None, inner, beside

        # the shape: what the file says of it, what the caller says, and what the weights show
        theirs = "patch_embedding.weight" in inner
        if theirs:
            said = settings(beside.get("cfg", {}), strict=False)
        else:
            said = settings(beside["encoder"] if "kind" in beside else {})
        more, espnet = read_cfg(cfg)
        beside |= espnet
        official = theirs and bool(said or espnet)
        encoder = Encoder(settle(said | more, official, fbank, inner, notes))

        espnet_head = "decoder.linear_out.weight" in rest
        if theirs:
            inner, rest = from_official(encoder, inner, rest)
        kind = beside.get("kind")
        if theirs or kind is None:
            kind = kind_of(rest)
            rest = standing_on(kind, rest, notes)
        check(kind in KINDS, f"its kind, {kind!r}, is none of {', '.join(KINDS)}")
        if kind == "classifier":
            settle_labels(beside, rest, official, espnet_head, notes)
    load_state(encoder, inner, path)
    if notes:
        note(path, "; ".join(notes))
    return kind, encoder, rest, beside


def find_weights(ckpt, notes):
    """Return the weights of a BEATs model from nested dicts, and what stands beside them."""
    models = list(models_in(ckpt))
    if not models:
        names = list(tensor_names(ckpt))
        what = "it holds no weights"
        if names:
            what = f"its weights are {', '.join(names[:3])}, ..."
        for part, model in OTHER_MODELS.items():
            if any(part in name for name in names):
                what = f"it looks like {model}"
        raise UserError(f"not a BEATs checkpoint: {what}")
    where, weights, beside = models[0]
    if len(models) > 1:
        others = [other[0] for other in models[1:]]
        notes.append(f"the weights under {where} are taken, not those under {', '.join(others)}")
    return weights, beside


def models_in(content, where="", beside={}):
    """Yield (where, weights, what stands beside them) of each BEATs model, those under "model" first."""
    beside = beside | content
    weights = {}
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            name = WRAPPERS.sub("", str(key))
            # as torch writes a weight norm now
            name = name.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
            weights[name] = value
    if any(KNOWN_BY.fullmatch(name) for name in weights):
        yield where, weights, beside
    for key in sorted(content, key=lambda key: key != "model"):
        if isinstance(content[key], dict):
            yield from models_in(content[key], f"{where}.{key}".strip("."), beside)


def tensor_names(content):
    """Yield the names of all tensors in nested dicts."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from tensor_names(value)
        if isinstance(value, torch.Tensor):
            yield str(key)


def split(weights):
    """Return the weights of the encoder, or of a random projection, and of what stands on it.

    Both without the prefix of their names.
    """
    matches = [KNOWN_BY.fullmatch(name) for name in weights]
    prefixes = {match[1] for match in matches if match}
    check(
        len(prefixes) == 1,
        f"holds several models, named {', '.join(sorted(prefixes))}; save one of them alone"
    )
    (prefix,) = prefixes
    above = re.sub(r"(?<![^.])encoder\.$", "", prefix)  # of a head, which stands beside the encoder

    inner, rest = {}, {}
    for name, value in weights.items():
        if name.startswith(prefix):
            inner[name.removeprefix(prefix)] = value
        else:
            rest[name.removeprefix(above)] = value
    return inner, rest


def kind_of(rest):
    """Tell by what stands on an encoder, in our names, of what kind a checkpoint is."""
    if "codebook.weight" in rest:
        return "tokenizer"
    if any(name.startswith("predictor.") for name in rest):
        return "mam"
    return "classifier" if "head.weight" in rest else "encoder"


def standing_on(kind, rest, notes):
    """Return the weights that belong on the encoder of a checkpoint of some kind."""
    known = STANDS_ON.get(kind, ())
    left = [name for name in rest if not name.startswith(known)]
    if left and kind != "mam":
        notes.append(f"{len(left)} weights beside the {kind}, {left[0]} the first, are left out")
    return {name: rest[name] for name in rest if name.startswith(known)}


def settings(cfg, strict=True):
    """Return the fields of an EncoderConfig of which a dict speaks, in our or Microsoft's names."""
    check(isinstance(cfg, dict), f"its configuration is a {type(cfg).__name__}, not a dict")
    fields = [field.name for field in dataclasses.fields(EncoderConfig)]
    names = {OFFICIAL_CFG.get(name, name): name for name in fields}
    said = {}
    for name, value in cfg.items():
        if name in names or name in fields:
            said[names.get(name, name)] = value
        else:
            check(
                name in OFFICIAL_ALWAYS or not strict,
                f"{name} is no setting of an encoder; those are {', '.join(fields)}"
            )
    for name, expect in OFFICIAL_ALWAYS.items():
        value = cfg.get(name, expect)
        check(
            value == expect,
            f"{name}={value!r} is not supported; every released file has {expect!r}"
        )
    return said


def read_cfg(cfg):
    """Return (settings, what ESPnet says beside them) of a preset, a dict, or a .json or .yaml file."""
    if cfg is None:
        return {}, {}
    if cfg in list(PRESETS):
        said = dataclasses.asdict(PRESETS[cfg])
        del said["fbank_mean"], said["fbank_std"]  # not of its shape, but of what it heard
        return said, {}
    if isinstance(cfg, (str, Path)):
        with reading(cfg):
            cfg = read_config_file(Path(cfg))
    check(isinstance(cfg, dict), f"cfg is a {type(cfg).__name__}, not a dict of settings")
    if "encoder_conf" not in cfg:
        official = set(OFFICIAL_CFG.values()) - set(OFFICIAL_CFG)
        return settings(cfg, strict=official.isdisjoint(cfg)), {}

    conf = cfg["encoder_conf"]
    said = settings(conf.get("beats_config") or conf.get("tokenizer_config") or {}, strict=False)
    for name in ("fbank_mean", "fbank_std"):
        if name in conf:
            said[name] = conf[name]
    task = cfg.get("model_conf", {}).get("classification_type", "multi-class")
    beside = dict(multilabel=task == "multi-label")
    if cfg.get("token_list"):
        beside["token_list"] = cfg["token_list"]
    return said, beside


def read_config_file(path):
    check(
        path.suffix in (".json", ".yaml", ".yml"),
        f"cfg is a preset ({', '.join(PRESETS)}), a dict, a .json or a .yaml file"
    )
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    try:
        import yaml
    except ImportError:
        raise UserError("to read it, pip install pyyaml") from None
    return yaml.safe_load(text)


def settle(said, official, fbank, weights, notes):
    """Return the EncoderConfig of what is said of it and what weights show, which have to agree."""
    if "max_distance" not in said:
        # 1280: Microsoft's default where a cfg of theirs is silent; 800: what every released file has
        said["max_distance"] = 1280 if official else 800
        if not official:
            notes.append("max_distance 800, as in every released file, is assumed; cfg= says another")
    if fbank is not None:
        check(len(fbank) == 2, f"fbank is (mean, standard deviation), not {fbank}")
        said["fbank_mean"], said["fbank_std"] = fbank
    check(("fbank_mean" in said) == ("fbank_std" in said), "it has one of fbank_mean, fbank_std")
    if "fbank_mean" not in said and (not official or "raw2fbank_pad.weight" in weights):
        mean, std = EncoderConfig.fbank_mean, EncoderConfig.fbank_std
        notes.append(
            f"fbank statistics {mean}, {std} (Microsoft's) are assumed; "
            "for ESPnet's say fbank=(15.29130, 5.90532)"
        )
    return EncoderConfig(**agreed(said, shape_of(weights)))


def agreed(said, seen):
    """Return what is said of a shape and what weights show of it, or raise UserError if they disagree."""
    for name, value in seen.items():
        check(
            said.get(name, value) == value,
            f"{name} is {said.get(name)!r} by the configuration, {value} by the weights"
        )
    return said | seen


def shape_of(weights):
    """Return what the weights of an encoder, in our or Microsoft's names, show of its EncoderConfig."""
    theirs = "patch_embedding.weight" in weights
    shape = {}
    for field, (name, dimension) in SHOWN_BY.items():
        key = official_names(name, 1)[0] if theirs else name
        shape[field] = weights[key].shape[dimension]
    groups, left = divmod(shape["dim"], shape["conv_groups"])
    check(not left, f"{shape['conv_groups']} channels of a position convolution do not divide its width")
    stack = "encoder.layers." if theirs else "transformer.blocks."
    return shape | dict(conv_groups=groups, layers=count_blocks(weights, stack))


def count_blocks(names, stack):
    """Count the blocks of a stack by the names of weights."""
    inside = [name.removeprefix(stack) for name in names if name.startswith(stack)]
    return len({name.partition(".")[0] for name in inside})


def settle_labels(beside, rest, official, espnet, notes):
    """Settle the names of classes, and whether they exclude each other, where a file does not say it."""
    beside["labels"] = class_names(beside, len(rest["head.bias"]))
    if "multilabel" not in beside:
        # ESPnet's default is one class at a time; every released file of Microsoft has several
        beside["multilabel"] = not espnet
        if espnet or not official:
            notes.append(f"multilabel = {not espnet} is assumed; if not, set it on the model")
    check(isinstance(beside["multilabel"], bool), "multilabel is neither True nor False")


def class_names(beside, count):
    """Return the names of a file's classes: our labels, Microsoft's, ESPnet's, or else numbers."""
    names = beside.get("labels") or beside.get("token_list")
    if beside.get("label_dict"):
        numbered = {int(number): name for number, name in beside["label_dict"].items()}
        names = [numbered[number] for number in range(len(numbered))]
    if not names:
        return [str(number) for number in range(count)]

    check(isinstance(names, (list, tuple)), "the names of its classes are no list")
    if len(names) == count + 1 and names[-1] == "<unk>":  # for which ESPnet's heads have no output
        names = names[:-1]
    check(len(names) == count, f"{len(names)} names of classes, {count} outputs")
    return names


def on_encoder(encoder, rest):
    """Return the state_dict of an encoder and what stands on it."""
    return {f"encoder.{name}": value for name, value in encoder.state_dict().items()} | rest


# -----------------------------------------------------------------------------
# Microsoft's layout in and out. Names differ, q, k, v are one matrix here, and the table of relative
# positions, which all layers share, stands once.

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


ESPNET_PADS = {  # for its masks
    "patch_embedding_pad.weight": torch.ones(1, 1, PATCH_FRAMES, PATCH_BINS),
    "raw2fbank_pad.weight": torch.ones(1, 1, FRAME)
}
OFFICIAL_HEADS = {  # theirs -> ours, of what stands on the encoder
    r"predictor\.": "head.",
    r"decoder\.linear_out\.": "head.",  # ESPnet's
    r"quantize\.embedding\.weight": "codebook.weight",
    r"quantize\.cluster_size": "codebook.cluster_size"
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
    statistics = dict(fbank_mean=encoder.cfg.fbank_mean, fbank_std=encoder.cfg.fbank_std)
    if statistics != dict(fbank_mean=EncoderConfig.fbank_mean, fbank_std=EncoderConfig.fbank_std):
        cfg |= statistics
    return cfg | OFFICIAL_ALWAYS, state


def from_official(encoder, weights, rest):
    """Return the weights of an encoder and of what stands on it, named as ours.

    weights: theirs from patch_embedding on, every one of which is used; rest: what has other names.
    """
    weights, state = dict(weights), {}
    for name, value in encoder.state_dict().items():
        names = official_names(name, encoder.cfg.layers)
        table = name.endswith("table")
        if table:  # the same in every layer; some files hold it once
            names = [key for key in names if key in weights] or names
        first, *others = [weights.pop(key) for key in names]
        for other in others:
            alike = torch.equal(first, other) if table else first.shape == other.shape
            check(alike, f"{names[0]} is unlike its repetitions")

        if name == "patch.weight" or name.endswith("gate_scale"):
            first = first.reshape(value.shape)
        state[name] = torch.cat([first, *others]) if "qkv" in name else first

    for name in ESPNET_PADS:
        pad = weights.pop(name, torch.ones(1))
        check((pad == 1).all(), f"{name} is not all ones, as in every file of ESPnet")
    ready = weights.pop("quantize.embedding.initted", torch.ones(1))
    check(ready.all(), "its codebook was never initialised")
    for name in ("embed_avg", "cluster_size"):  # their code reads neither
        weights.pop(f"quantize.embedding.{name}", None)

    heads = {}
    for name, value in (rest | weights).items():
        ours = name
        for before, after in OFFICIAL_HEADS.items():
            ours = re.sub(rf"^{before}", after, ours)
        known = ours.startswith(STANDS_ON["tokenizer"])
        check(known or name in rest, f"unknown keys, {name} the first")
        heads[ours] = value
    return state, heads


def load_official(path, reorder=None, class_csv=None):
    """Do as load(path). reorder="audioset": classes in the order of class_csv, see Classifier.reorder."""
    if reorder not in (None, "audioset") or bool(reorder) != bool(class_csv):
        raise ValueError(
            'reorder is None or "audioset", which needs class_csv="class_labels_indices.csv"'
        )
    model = load(path)
    if reorder:
        if isinstance(model, Encoder):
            raise CheckpointError(
                f"{path}: this file has no classifier head, hence no classes to reorder"
            )
        model.reorder(class_csv)
    return model


def export_official(model, path, espnet=False):
    """Write an Encoder or Classifier in the released layout, readable by Microsoft's code (strict).

    That code knows sigmoids only, also where classes exclude each other; load() reads which it is.
    espnet: with two constants more, which ESPnet and openbeats ask for where they load strictly.
    """
    cfg, state = encoder_to_official(getattr(model, "encoder", model))
    if espnet:
        state |= ESPNET_PADS
    if isinstance(model, Encoder):
        return save_official(path, cfg, state)
    cfg |= dict(
        finetuned_model=True,
        predictor_dropout=model.dropout.p,
        predictor_class=len(model.labels)
    )
    state |= {"predictor.weight": model.head.weight, "predictor.bias": model.head.bias}
    beside = dict(label_dict=dict(enumerate(model.labels)))
    if not model.multilabel:
        beside["multilabel"] = False
    save_official(path, cfg, state, **beside)


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
    spectra = torch.fft.rfft(weight.float(), n=size).conj()
    spectra = spectra.view(groups, width, width, -1)         # (G, out, in, F)
    y = x.permute(1, 2, 0, 3) @ spectra.permute(3, 0, 2, 1)  # (F, G, B blocks, out)
    y = y.permute(2, 0, 1, 3).reshape(B * blocks, -1, D)
    y = torch.fft.irfft(y, n=size, dim=1)[:, :outputs]
    return y.reshape(B, -1, D)[:, :T].to(weight.dtype)
