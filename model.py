"""
BEATs (Chen et al., 2022): waveform -> log-mel filter bank -> 16x16 patches -> transformer.

    fbank                 Kaldi-compatible log-mel features, batched
    Encoder               patch embedding, convolutional position embedding, post-norm blocks with DeepNorm
                          and a gated relative position bias: the released model, number for number
    MaskedAudioModel      encoder + label predictor, for pre-training
    Classifier            encoder + linear head, for fine-tuning
    load                  any checkpoint, ours or Microsoft's (official.py: load_official, export_official)

    python model.py CKPT clip.wav folder/       # labels, embeddings or features; see infer.py

One token is 16 frames (160 ms) of one of 8 frequency bands. Tokens are numbered time-major: token = row * 8 + band.
Letters in shape comments: B clips, n samples, N frames, T tokens, K kept tokens, D width, H heads.
"""
import csv
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SAMPLE_RATE = 16000
FRAME, HOP, MELS = 400, 160, 128    # 25 ms windows every 10 ms
PATCH, BANDS = 16, 8                # a patch is 16 frames x 16 mel bins, so one patch row has 8 bands
MIN_SAMPLES = FRAME + (PATCH - 1) * HOP     # 2,800: the shortest clip with one patch row
LOG_FLOOR = math.log(torch.finfo(torch.float32).eps)    # fbank value of digital silence, -15.94

class CheckpointError(ValueError):
    """A file that cannot be used; the message names it and says why."""

# -----------------------------------------------------------------------------
# front end

def num_tokens(samples):
    """Tokens whose frames lie wholly within the first `samples` samples. int or integer tensor, any shape."""
    rows = (1 + (samples - FRAME) // HOP) // PATCH
    return (rows.clamp(min=0) if torch.is_tensor(rows) else max(rows, 0)) * BANDS

def _fbank_constants():
    window = torch.hann_window(FRAME, periodic=False).pow(0.85)     # Kaldi's "povey" window
    mel = lambda hz: 1127.0 * math.log(1.0 + hz / 700.0)
    low, high = mel(20.0), mel(SAMPLE_RATE / 2)
    step = (high - low) / (MELS + 1)
    left, centre, right = (low + (torch.arange(MELS)[:, None] + i) * step for i in (0.0, 1.0, 2.0))
    bins = 1127.0 * (1.0 + SAMPLE_RATE / 512 * torch.arange(256) / 700.0).log()
    # triangles in mel, in torchaudio's float32 arithmetic: low ones are so narrow that rounding decides their height
    banks = torch.min((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0).T
    bands = []                                                      # most of it is zeros: each 16 mel bins see few frequencies
    for bank in banks.split(PATCH, dim=1):
        seen = bank.any(1).nonzero()
        low, high = int(seen[0]), int(seen[-1]) + 1
        bands.append((low, high, bank[low:high].contiguous()))
    return window, bands

WINDOW, MEL_BANKS = _fbank_constants()      # (400,), 8 x (low, high, (high - low, 16))

@functools.lru_cache
def _on(device):
    return WINDOW.to(device), [(low, high, bank.to(device)) for low, high, bank in MEL_BANKS]

@torch.no_grad()
def fbank(wav: torch.Tensor) -> torch.Tensor:
    """Kaldi log-mel filter bank: 128 bins, 25 ms Povey window, 10 ms hop, no dither, no padding at the edges.

    wav: (B, n) float in [-1, 1] at 16 kHz, n >= 400. Returns (B, 1 + (n - 400) // 160, 128) float32 on wav's device.
    Equal to torchaudio.compliance.kaldi.fbank(wav * 2**15, num_mel_bins=128, ...). Always float32, also under
    autocast: the power spectrum reaches 3e12 and float16 ends at 65504.
    """
    if wav.dim() != 2 or not wav.is_floating_point():
        raise ValueError(f"fbank takes a float tensor (clips, samples), not {wav.dtype} of shape {tuple(wav.shape)}; "
                         "a single clip is wav[None], a stereo clip wav.mean(0)[None]")
    if wav.shape[1] < FRAME:
        raise ValueError(f"fbank needs at least {FRAME} samples (25 ms at 16 kHz), got {wav.shape[1]}; zero-pad the clip")
    if wav.device.type == "cpu" and not torch.compiler.is_exporting() and len(wav) > 1:
        return torch.cat([fbank(clip) for clip in wav.split(1)])        # one clip at a time stays in the cache: 3x faster
    with torch.autocast(wav.device.type, enabled=False):
        window, banks = _on(wav.device)
        x = (wav.float() * 2**15).unfold(1, FRAME, HOP)                         # (B, N, 400)
        x = x - x.mean(-1, keepdim=True)
        # pre-emphasis within the frame; its first sample is left out, for there the window is 0
        x = torch.sub(x[..., 1:], x[..., :-1], alpha=0.97).mul_(window[1:])
        x = torch.view_as_real(torch.fft.rfft(x, n=512)).square_()              # (B, N, 257, 2)
        x = x[..., 0] + x[..., 1]
        x = torch.cat([x[..., low:high] @ bank for low, high, bank in banks], -1)       # (B, N, 128)
        return x.clamp_(min=torch.finfo(torch.float32).eps).log_()

def patchify(x: torch.Tensor) -> torch.Tensor:
    """(B, N, 128) frames -> (B, N // 16 * 8, 256) patches, time-major; frames beyond the last whole row are dropped."""
    B, N, _ = x.shape
    rows = N // PATCH
    x = x[:, :rows * PATCH].reshape(B, rows, PATCH, BANDS, PATCH)               # (B, row, frame, band, bin)
    return x.transpose(2, 3).reshape(B, rows * BANDS, PATCH * PATCH)

def valid_tokens(lengths: torch.Tensor, n: int, padding: str = "exact") -> torch.Tensor:
    """Which tokens of a zero-padded batch are real. lengths: (B,) samples of each clip; n: samples of the batch.

    Returns (B, T) bool. padding="exact": the tokens the clip would have alone. padding="official": the released
    code's mask, which ties frames to samples with a stride of n // N and walks along frequency at the end; it keeps
    0 to 9 tokens too many and is here for parity only (unilm #1427, #1621).
    """
    T = num_tokens(n)
    if padding == "exact":
        return torch.arange(T, device=lengths.device) < num_tokens(lengths)[:, None]
    if padding != "official":
        raise ValueError(f'padding is "exact" or "official", not {padding!r}')
    mask = torch.arange(n, device=lengths.device) >= lengths[:, None]           # True = padding
    for size in (1 + (n - FRAME) // HOP, T):                                    # samples -> frames -> tokens
        mask = mask[:, :mask.shape[1] // size * size].reshape(mask.shape[0], size, -1).all(-1)
    return ~mask

def prepare_clips(wav, lengths=None, padding="exact"):
    """(B, n) waveforms and their (B,) lengths in samples (None = n) -> (B, n') waveforms, (B, T) valid.

    A clip of 1 to 2,799 samples counts as one of 2,800, zero-padded: the shortest with a row of patches. What stands
    beyond a clip's length has no effect (with padding="official" it has, as in the released code).
    """
    n = wav.shape[1]
    lengths = torch.full((wav.shape[0],), n, device=wav.device) if lengths is None else torch.as_tensor(lengths, device=wav.device)
    if padding == "exact":
        wav = wav.masked_fill(torch.arange(n, device=wav.device) >= lengths[:, None], 0)
        lengths = torch.where(lengths > 0, lengths.clamp(min=MIN_SAMPLES), 0)
    if n < MIN_SAMPLES:
        wav = F.pad(wav, (0, MIN_SAMPLES - n))
    return wav, valid_tokens(lengths, wav.shape[1], padding)

def rows_of(x):
    """Tokens (B, T, D) -> (B, T // 8, 8, D), one row of 8 bands per 160 ms, low to high; and each row's centre in seconds."""
    rows = x.shape[1] // BANDS
    centre = (torch.arange(rows, device=x.device) * PATCH * HOP + MIN_SAMPLES / 2) / SAMPLE_RATE
    return x.view(x.shape[0], rows, BANDS, -1), centre

def windows(wav, seconds=10.0, hop=5.0):
    """A recording (n,) -> (W, window) zero-padded windows, (W,) their lengths and (W,) starts in samples."""
    size, step = round(seconds * SAMPLE_RATE), round(hop * SAMPLE_RATE)
    starts = torch.arange(0, max(1, len(wav) - size + step), step)
    lengths = (len(wav) - starts).clamp(max=size)
    padded = F.pad(wav, (0, max(0, int(starts[-1]) + size - len(wav))))
    return padded.unfold(0, size, step)[:, :int(lengths.max())], lengths, starts       # a view, also of a day

# -----------------------------------------------------------------------------
# encoder

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
    grad_decay: float = 1.0         # gradient entering each layer is multiplied by this (the released "layer-wise decay")
    fbank_mean: float = 15.41663    # AudioSet; features are (fbank - mean) / (2 std)
    fbank_std: float = 6.55582

PRESETS = {
    "tiny": EncoderConfig(layers=4, dim=192, ffn=768, heads=4, patch_dim=128, dropout=0.0, attention_dropout=0.0),
    "base": EncoderConfig(),                                                     # 90.3 M parameters
    "large": EncoderConfig(layers=24, dim=1024, ffn=4096, heads=16),             # 311.4 M
}

def dropout(x, p):
    """F.dropout. On a CPU 16 random bits decide over each element: cheaper than a Bernoulli draw; p to within 1e-5."""
    if p in (0, 1) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:x.numel()].view(x.shape)
    return x * ((bits >= round(p * 2**16) - 2**15).to(x.dtype) / (1 - p))

class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x

class ConvPosition(nn.Module):
    """Grouped convolution over the token axis, weight-normalised per tap: x -> gelu(conv(x)). (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, taps, groups):
        super().__init__()
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, taps))
        self.weight_g = nn.Parameter(torch.empty(1, 1, taps))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight_v, std=math.sqrt(4 / (taps * dim)))
        with torch.no_grad():
            self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))

    def forward(self, x):
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        conv = conv_by_fft if x.device.type == "cpu" and not torch.compiler.is_exporting() else conv_direct
        return F.gelu(conv(x, weight, self.groups) + self.bias)

def conv_direct(x, weight, groups):
    """x: (B, T, D), weight: (D, D / groups, taps) -> (B, T, D). Output i sees inputs i - taps/2 .. i + (taps-1)/2:
    an even kernel loses its last position, not its first."""
    taps = weight.shape[-1]
    x = F.pad(x.transpose(1, 2), (taps // 2, (taps - 1) // 2))
    return F.conv1d(x, weight.to(x.dtype), groups=groups).transpose(1, 2)

def conv_by_fft(x, weight, groups):
    """The same, as products of spectra: on CPU ten times faster than conv1d and its backward for the tiny model."""
    B, T, D = x.shape
    taps, width = weight.shape[-1], D // groups
    n = (T + taps - 1 + 63) // 64 * 64      # no wrap-around; small factors
    with torch.autocast(x.device.type, enabled=False):
        x = torch.fft.rfft(x.float(), n=n, dim=1).view(B, -1, groups, width).permute(1, 2, 0, 3)        # (F, G, B, in)
        weight = torch.fft.rfft(weight.float(), n=n).conj().view(groups, width, width, -1).permute(3, 0, 2, 1)  # (F, G, in, out)
        y = torch.fft.irfft((x @ weight).permute(2, 0, 1, 3).reshape(B, -1, D), n=n, dim=1)
    return y.roll(taps // 2, 1)[:, :T]

def relative_bucket(distance: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """T5 buckets of key - query distances: half for each sign, exact up to buckets/4, then logarithmic. Long in, long out."""
    half = buckets // 2
    exact = half // 2
    n = distance.abs()
    log = exact + (torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)).long()
    return (distance > 0) * half + torch.where(n < exact, n, log.clamp(max=half - 1))

class RelativeBias(nn.Module):
    """One table for all layers. positions: (B, K) token indices in a grid of T -> (B, H, K, K); None: all T -> (1, H, T, T)."""

    def __init__(self, buckets, max_distance, heads):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, T, positions=None):
        if positions is None:
            positions = torch.arange(T, device=self.table.device)[None]
        distance = torch.arange(-T, T + 1, device=self.table.device)            # T itself is a place: see Encoder
        # F.embedding, not indexing, whose backward adds up in no fixed order with several threads
        bias = F.embedding(relative_bucket(distance, self.buckets, self.max_distance), self.table)      # (2T + 1, H)
        return F.embedding(positions[:, None, :] - positions[:, :, None] + T, bias).permute(0, 3, 1, 2)     # [query, key]

ATTENTION = "auto"      # auto | plain | fused | flex: how attend() computes; auto = fused on GPUs, else plain

def attend(q, k, v, gate, bias, key_bias, p=0.0):
    """softmax(q k^T / sqrt(hd) + gate * bias + key_bias) v.

    q, k, v: (B, H, T, hd); gate: (B, H, T, 1); bias: (B or 1, H, T, T); key_bias: (B, 1, 1, T) or None; p: of dropout.
    """
    way = ATTENTION if ATTENTION != "auto" else "fused" if q.is_cuda else "plain"
    if way == "flex" and not p:             # it has no dropout; gate * bias never exists in memory
        def add(score, b, h, i, j):
            score = score + gate[b, h, i, 0] * bias[b if len(bias) > 1 else 0, h, i, j]
            return score if key_bias is None else score + key_bias[b, 0, 0, j]
        return flex_attention(q.is_cuda)(q, k, v, score_mod=add)
    if way != "plain":
        bias = gate * bias if key_bias is None else gate * bias + key_bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=p)
    # on CPU the fused kernel's backward with a dense bias is several times slower than the plain steps
    att = torch.addcmul((q * q.shape[-1]**-0.5) @ k.transpose(-1, -2), gate, bias)
    att = att if key_bias is None else att + key_bias
    return dropout(att.softmax(-1), p) @ v

@functools.lru_cache
def flex_attention(compiled):
    from torch.nn.attention import flex_attention as flex
    return torch.compile(flex.flex_attention) if compiled else flex.flex_attention

class Attention(nn.Module):
    """Multi-head self-attention whose position bias is gated per query (WavLM's gate)."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim // heads, 8)      # shared by the heads of the layer
        self.gate_scale = nn.Parameter(torch.ones(heads))

    def forward(self, x, bias, key_bias):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)      # (B, H, T, hd) each
        # two sums of four outputs, from the query before scaling; summing the weights first is the same and cheaper
        weight, offset = self.gate.weight.view(2, 4, -1).sum(1), self.gate.bias.view(2, 4).sum(1)
        u, r = F.linear(q, weight, offset).sigmoid().split(1, dim=-1)                   # (B, H, T, 1)
        gate = u * (r * self.gate_scale[:, None, None] - 1) + 2
        y = attend(q, k, v, gate, bias, key_bias, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

class Block(nn.Module):
    """Post-norm transformer block with DeepNorm: the residual is scaled by alpha = (2L)^(1/4), Wang et al. 2022."""

    def __init__(self, cfg, depth):
        super().__init__()
        self.alpha = (2 * depth)**0.25
        self.attn = Attention(cfg.dim, cfg.heads, cfg.attention_dropout)
        self.ln1 = nn.LayerNorm(cfg.dim)
        self.fc1 = nn.Linear(cfg.dim, cfg.ffn)
        self.fc2 = nn.Linear(cfg.ffn, cfg.dim)
        self.ln2 = nn.LayerNorm(cfg.dim)
        self.dropout = Dropout(cfg.dropout)
        self.activation_dropout = Dropout(cfg.activation_dropout)
        # q, k: xavier; v, out, fc1, fc2: xavier with gain (8L)^(-1/4); the gate stays near its neutral value
        beta = (8 * depth)**-0.25
        for rows, gain in zip(self.attn.qkv.weight.chunk(3), (1.0, 1.0, beta)):
            nn.init.xavier_normal_(rows, gain)
        for linear in (self.attn.out, self.fc1, self.fc2):
            nn.init.xavier_normal_(linear.weight, beta)
        nn.init.normal_(self.attn.gate.weight, std=0.02)
        for linear in (self.attn.qkv, self.attn.out, self.attn.gate, self.fc1, self.fc2):
            nn.init.zeros_(linear.bias)

    def forward(self, x, bias, key_bias):
        x = self.ln1(self.alpha * x + self.dropout(self.attn(x, bias, key_bias)))
        h = self.fc2(self.activation_dropout(F.gelu(self.fc1(x))))
        return self.ln2(self.alpha * x + self.dropout(h))

def run_block(block, x, bias, key_bias, recompute=False):
    """block(x, bias, key_bias); with recompute its activations are not kept but computed again in the backward pass."""
    return checkpoint(block, x, bias, key_bias, use_reentrant=False) if recompute else block(x, bias, key_bias)

class GradScale(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None

def key_padding_bias(valid):
    """(B, T) True = real -> (B, 1, 1, T) with -inf at padding; a row of nothing but padding stays finite."""
    if valid is None:
        return None
    hide = ~valid & valid.any(1, keepdim=True)
    return torch.zeros(valid.shape, device=valid.device).masked_fill(hide, -math.inf)[:, None, None]

class Encoder(nn.Module):
    """The BEATs encoder. Every parameter, by its initialisation in a fresh model:

    patch (patch_dim, 256), ln_patch, proj (dim, patch_dim; none if equal)   PyTorch's defaults
    conv_position   weights N(0, sqrt(4 / (taps dim))), gain = their norm per tap, bias 0
    ln              1, 0
    position_bias   N(0, 0.02)
    blocks          see Block; with gate_scale 1
    """

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.cfg, self.recompute = cfg, False
        self.patch = nn.Linear(PATCH * PATCH, cfg.patch_dim, bias=False)
        self.ln_patch = nn.LayerNorm(cfg.patch_dim)
        self.proj = nn.Linear(cfg.patch_dim, cfg.dim) if cfg.patch_dim != cfg.dim else nn.Identity()
        self.input_dropout = Dropout(cfg.input_dropout)
        self.conv_position = ConvPosition(cfg.dim, cfg.conv_pos, cfg.conv_groups)
        self.ln = nn.LayerNorm(cfg.dim)
        self.dropout = Dropout(cfg.dropout)
        self.position_bias = RelativeBias(cfg.buckets, cfg.max_distance, cfg.heads)
        self.blocks = nn.ModuleList(Block(cfg, cfg.layers) for _ in range(cfg.layers))

    def forward(self, patches, valid=None, keep=None, all_layers=False):
        """patches: (B, T, 256) normalised; valid: (B, T) True = real, None = all.

        keep: (B, K) ascending indices of the tokens the encoder may see, T where a padded clip has fewer. Kept tokens stay
        at their true positions: the position convolution runs on the full grid with zeros elsewhere, the relative
        bias is indexed by the kept positions. Masked patches are never looked at.
        Returns (B, T or K, D), or with all_layers the list of layers + 1 states, the first being the first block's input.
        """
        T = patches.shape[1]
        if keep is None:
            x = self.input_dropout(self.proj(self.ln_patch(self.patch(patches))))
            if valid is not None:
                x = x * valid[..., None]
            x = x + self.conv_position(x)
        else:
            x = take(patches, keep.clamp(max=T - 1))
            x = self.input_dropout(self.proj(self.ln_patch(self.patch(x))))             # (B, K, D)
            # as dropout does, kept tokens make up for the others: else the convolution answers 4 times louder when all are there
            share = (keep.shape[1] / T if valid is None
                     else (keep < T).sum(1).clamp(min=1)[:, None, None] / valid.sum(1).clamp(min=1)[:, None, None])
            grid = put(x / share, keep, T + 1)[:, :T]       # place T takes the surplus and is cut off
            x = x + take(self.conv_position(grid), keep.clamp(max=T - 1))
            valid = None if valid is None else keep < T
        x = self.dropout(self.ln(x))
        bias, key_bias = self.position_bias(T, keep), key_padding_bias(valid)
        states = [x]
        for block in self.blocks:
            if self.cfg.grad_decay != 1.0:
                x = GradScale.apply(x, self.cfg.grad_decay)
            y = run_block(block, x, bias, key_bias, self.recompute and self.training)
            if self.training and self.cfg.layerdrop > 0:    # computed and left out: same graph on every rank, every step
                y = torch.where(torch.rand((), device=x.device) < self.cfg.layerdrop, x, y)
            x = y
            if all_layers:
                states.append(x)
        return states if all_layers else x

    def normalise(self, features):
        """fbank -> zero mean and standard deviation 0.5 on the data the statistics are from."""
        return (features - self.cfg.fbank_mean) / (2 * self.cfg.fbank_std)

    def patches(self, wav, lengths=None, padding="exact"):
        """(B, n) waveforms, (B,) samples -> (B, T, 256) normalised patches, (B, T) valid."""
        wav, valid = prepare_clips(wav, lengths, padding)
        return patchify(self.normalise(fbank(wav))), valid

    def features(self, wav, lengths=None, layer=None, padding="exact"):
        """Token features. wav: (B, n) float in [-1, 1] at 16 kHz, zero-padded; lengths: (B,) samples, None = all n.

        layer: None = last; k = output of block k (0 = the first block's input); "all" = (layers + 1, B, T, D).
        Returns x (B, T, D) and valid (B, T), True = real; see rows_of for their places in time and frequency.
        """
        patches, valid = self.patches(wav, lengths, padding)
        if layer is None:
            return self(patches, valid), valid
        states = self(patches, valid, all_layers=True)
        return (torch.stack(states) if layer == "all" else states[layer]), valid

    def embed(self, wav, lengths=None, padding="exact"):
        """(B, D): mean over the real tokens."""
        return masked_mean(*self.features(wav, lengths, padding=padding))

    def predict(self, *args, **kwargs):
        raise CheckpointError("this model has no classifier head: it is an encoder, with features() and embed(); "
                              "class probabilities need a fine-tuned file")
    logits = predict

def take(x, index):
    """x: (B, T, D), index: (B, K) -> (B, K, D)"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

def put(x, index, T):
    """x: (B, K, D), index: (B, K) -> (B, T, D), zeros where nothing was put"""
    grid = x.new_zeros(x.shape[0], T, x.shape[-1])
    return grid.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), x)

def random_mask(noise, valid, mask_ratio):
    """Uniformly random masks with static shapes. noise, valid: (B, T) -> keep (B, K), masked (B, M) token indices.

    Of the n valid tokens of a clip max(1, round((1 - mask_ratio) n)) are kept, those with the least noise. Indices
    ascend; a clip with fewer than K or M of them is filled up with T, which stands for no token.
    """
    T = noise.shape[1]
    kept, most = (valid.sum(1).double() * (1 - mask_ratio)).round().clamp(min=1), max(1, round(T * (1 - mask_ratio)))
    rank_of = noise.masked_fill(~valid, 2.0).argsort(1).argsort(1)             # 0 = least noise
    token = torch.arange(T, device=noise.device)
    keep = torch.where(valid & (rank_of < kept[:, None]), token, T).sort(1).values[:, :most]
    masked = torch.where(valid & (rank_of >= kept[:, None]), token, T).sort(1).values[:, :T - most]
    return keep, masked

def masked_mean(x, valid):
    """x: (B, T, D), valid: (B, T) -> (B, D); 0 for a clip without valid tokens."""
    weight = valid[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)

# -----------------------------------------------------------------------------
# heads

class MaskedAudioModel(nn.Module):
    """Encoder + label predictor (paper section 3.3): which label does each masked patch have?

    The predictor (Linear, `blocks` transformer blocks, Linear) sees the full grid: encoder outputs at kept places, zeros
    at masked ones, and at each place an embedding of its band and of its time. It is thrown away after pre-training.
    """

    def __init__(self, encoder: Encoder, codes: int, blocks: int = 3, dim: int = 0, heads: int = 0):
        super().__init__()
        cfg = encoder.cfg
        dim, heads = dim or cfg.dim, heads or cfg.heads
        cfg = dataclasses.replace(cfg, dim=dim, ffn=4 * dim, heads=heads)
        self.encoder = encoder
        self.embed = nn.Linear(encoder.cfg.dim, dim)
        self.band = nn.Parameter(torch.randn(BANDS, dim) * 0.02)
        self.position_bias = RelativeBias(cfg.buckets, cfg.max_distance, heads)
        self.blocks = nn.ModuleList(Block(cfg, blocks) for _ in range(blocks))
        self.head = nn.Linear(dim, codes)

    def forward(self, patches, valid, keep, masked):
        """patches (B, T, 256); valid (B, T); keep (B, K), masked (B, M): token indices, T where a clip has fewer.
        Returns logits (B, M, codes)."""
        T = patches.shape[1]
        x = self.embed(self.encoder(patches, valid, keep))                      # (B, K, P)
        x = put(x, keep, T + 1)[:, :T]
        x = x + self.band.repeat(T // BANDS, 1) + sinusoids(T // BANDS, x.shape[-1], x.device).repeat_interleave(BANDS, 0)
        bias, key_bias = self.position_bias(T), key_padding_bias(valid)
        for block in self.blocks:
            x = run_block(block, x, bias, key_bias, self.encoder.recompute and self.training)
        return self.head(take(x, masked.clamp(max=T - 1)))

def sinusoids(length, dim, device):
    """(length, dim) sinusoidal embedding of time (Vaswani et al. 2017)."""
    angle = torch.arange(length, device=device)[:, None] * 10000.0**(-torch.arange(0, dim, 2, device=device) / dim)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :dim]

class Classifier(nn.Module):
    """Encoder + one linear layer on every token, averaged over the real ones.

    labels: list of class names. multilabel: probabilities are sigmoids (as in every released file), else a softmax.
    """

    def __init__(self, encoder: Encoder, labels: list, multilabel: bool = True, dropout: float = 0.0):
        super().__init__()
        self.encoder = encoder
        self.labels, self.multilabel = list(labels), multilabel
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(encoder.cfg.dim, len(labels))

    def forward(self, patches, valid=None, keep=None):
        """(B, T, 256), (B, T), keep as in Encoder -> logits (B, classes)"""
        x = self.head(self.dropout(self.encoder(patches, valid, keep)))
        valid = keep < patches.shape[1] if valid is not None and keep is not None else valid
        return x.mean(1) if valid is None else masked_mean(x, valid)

    def token_logits(self, wav, lengths=None, padding="exact"):
        """(B, T, classes) before averaging, and valid (B, T)."""
        x, valid = self.encoder.features(wav, lengths, padding=padding)
        return self.head(x), valid

    def logits(self, wav, lengths=None, padding="exact"):
        """(B, n), (B,) -> (B, classes)"""
        return self(*self.encoder.patches(wav, lengths, padding))

    def predict(self, wav, lengths=None, padding="exact"):
        """(B, n), (B,) -> probabilities (B, classes), in the order of self.labels"""
        logits = self.logits(wav, lengths, padding).float()
        return logits.sigmoid() if self.multilabel else logits.softmax(-1)

    def features(self, *args, **kwargs):
        """Encoder.features"""
        return self.encoder.features(*args, **kwargs)

    def embed(self, *args, **kwargs):
        """Encoder.embed"""
        return self.encoder.embed(*args, **kwargs)

    def reorder(self, class_csv):
        """Put the classes in the order of AudioSet's class_labels_indices.csv (index,mid,display_name), with its names.

        The released files have an order of their own. Raises CheckpointError if the two do not have the same classes.
        """
        with open(class_csv, newline="") as f:
            rows = [(int(row["index"]), row["mid"], row["display_name"]) for row in csv.DictReader(f)]
        place = {mid: i for i, mid in enumerate(self.labels)}
        missing = [mid for _, mid, _ in rows if mid not in place]
        if missing or len(rows) != len(place):
            raise CheckpointError(f"{class_csv}: its {len(rows)} classes are not the model's {len(place)}"
                                  + (f"; {missing[0]} is not there" if missing else ""))
        order = [place[mid] for _, mid, _ in sorted(rows)]
        with torch.no_grad():
            self.head.weight.copy_(self.head.weight[order].clone())
            self.head.bias.copy_(self.head.bias[order].clone())
        self.labels = [name for _, _, name in sorted(rows)]
        return self

# -----------------------------------------------------------------------------
# checkpoints: ours hold {"kind", "encoder": EncoderConfig as dict, "model", ...}, the official ones {"cfg", "model"}

def read_checkpoint(path) -> dict:
    """torch.load on CPU that never runs code from the file. Raises CheckpointError."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0][:200]})") from None
    if not isinstance(ckpt, dict) or "model" not in ckpt or not ("cfg" in ckpt or "kind" in ckpt):
        raise CheckpointError(f"{path}: not a BEATs checkpoint: it needs 'model' and 'cfg' (official) or 'kind' (ours)")
    return ckpt

def load(path):
    """An Encoder or Classifier in eval mode from any checkpoint, ours or official.

    Pre-training checkpoints (mam) give their encoder. Raises CheckpointError.
    """
    ckpt = read_checkpoint(path)
    if "cfg" in ckpt:
        from official import load_official
        return load_official(path)
    encoder = Encoder(EncoderConfig(**ckpt["encoder"]))
    if ckpt["kind"] == "classifier":
        model = Classifier(encoder, ckpt["labels"], ckpt["multilabel"])
        model.load_state_dict(ckpt["model"])
    elif ckpt["kind"] == "mam":
        model = encoder
        model.load_state_dict({k[len("encoder."):]: v for k, v in ckpt["model"].items() if k.startswith("encoder.")})
    else:
        raise CheckpointError(f"{path}: a {ckpt['kind']} checkpoint holds no encoder to use alone; "
                         "tokenizers are loaded with tokenizer.load_tokenizer")
    return model.eval()

class _FromWaveform(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, wav, lengths):
        return (self.model.predict if isinstance(self.model, Classifier) else self.model.features)(wav, lengths)

def export_program(model):
    """torch.export of (wav (B, n), lengths (B,)) -> probabilities of a Classifier, or (features, valid) of an Encoder.

    Any batch, any length from two patch rows (5,360 samples) to ten minutes. Save with torch.export.save.
    """
    B, n = torch.export.Dim("B", max=4096), torch.export.Dim("n", min=MIN_SAMPLES + PATCH * HOP, max=600 * SAMPLE_RATE)
    example = (torch.zeros(3, 20000), torch.tensor([20000, 9000, 3000]))
    device = next(model.parameters()).device
    _on(device)         # constants are made before tracing
    with torch.no_grad():
        return torch.export.export(_FromWaveform(model.eval()), tuple(x.to(device) for x in example),
                                   dynamic_shapes=({0: B, 1: n}, {0: B}), prefer_deferred_runtime_asserts_over_guards=True)

def __getattr__(name):
    if name in ("load_official", "export_official"):        # in a file of their own, which needs the classes above
        import official
        return getattr(official, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

if __name__ == "__main__":
    from infer import run
    run()
