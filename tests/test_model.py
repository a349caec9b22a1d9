"""The model against the official code's outputs, naive loops and closed forms."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import infer
import model
from conftest import MICRO
from model import (PRESETS, CheckpointError, Classifier, Encoder, EncoderConfig, MaskedAudioModel, conv_by_fft, conv_direct,
                   export_official, fbank, load, load_official, num_tokens, patchify, relative_bucket, valid_tokens)
from official import encoder_to_official

# ---- front end

def power(features):
    return features.double().exp()

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_fbank_equals_the_official_one(golden, case):
    # in power, relative to the loudest bin of the frame: float32 FFTs of different machines round differently 70 dB below it
    ours = fbank(golden["inputs"][case]["wav"])
    theirs = golden["encoder"]["expected"][case]["fbank"] * (2 * 6.55582) + 15.41663
    error = (power(ours) - power(theirs)).abs() / power(theirs).amax(-1, keepdim=True)
    assert error.max() < 3e-5
    loud = power(theirs) > 1e-4 * power(theirs).amax(-1, keepdim=True)
    assert (ours - theirs)[loud].abs().max() < 1e-3 and loud.float().mean() > 0.1

def test_fbank_equals_a_naive_loop():
    wav = torch.randn(1, 1200, generator=torch.Generator().manual_seed(0)) * 0.1
    mel = lambda f: 1127 * math.log(1 + f / 700)
    step = (mel(8000) - mel(20)) / 129
    for i, ours in enumerate(fbank(wav)[0]):
        x = wav[0, i * 160:i * 160 + 400].double().numpy() * 32768
        x = x - x.mean()
        x = np.array([x[n] - 0.97 * x[max(n - 1, 0)] for n in range(400)])
        x = x * np.array([(0.5 - 0.5 * math.cos(2 * math.pi * n / 399))**0.85 for n in range(400)])
        spectrum = np.abs(np.fft.fft(x, 512))**2
        for m in range(128):
            left, centre, right = (mel(20) + (m + j) * step for j in range(3))
            energy = sum(max(0, min((mel(k * 31.25) - left) / (centre - left), (right - mel(k * 31.25)) / (right - centre)))
                         * spectrum[k] for k in range(256))
            if m != 3:      # the empty triangle
                assert ours[m] == pytest.approx(math.log(max(energy, 1.1920929e-07)), abs=2e-3), (i, m)

def test_fbank_of_silence_and_its_shape():
    features = fbank(torch.zeros(2, 16000))
    assert features.shape == (2, 98, 128) and torch.allclose(features, torch.tensor(-15.942385))

def test_fbank_is_batched_and_float32_under_autocast():
    wav = torch.randn(11, 4000) * 0.1
    alone = torch.cat([fbank(w[None]) for w in wav])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fbank(wav), alone) and fbank(wav.bfloat16()).dtype == torch.float32

@pytest.mark.parametrize("wav, message", [(torch.zeros(16000), "wav\\[None\\]"), (torch.zeros(1, 399), "at least 400"),
                                          (torch.zeros(1, 16000, dtype=torch.int16), "float")])
def test_fbank_explains_bad_input(wav, message):
    with pytest.raises(ValueError, match=message):
        fbank(wav)

def test_patches_are_time_major():
    x = torch.arange(2 * 35 * 128.0).view(2, 35, 128)
    patches = patchify(x)
    assert patches.shape == (2, 16, 256)
    for t in range(2):
        for f in range(8):
            assert torch.equal(patches[1, t * 8 + f].view(16, 16), x[1, t * 16:t * 16 + 16, f * 16:f * 16 + 16])

def test_num_tokens_counts_what_the_clip_alone_gives():
    for n in (0, 100, 400, 2799, 2800, 5359, 5360, 16000, 160000):
        expect = patchify(fbank(torch.zeros(1, n))).shape[1] if n >= 400 else 0
        assert num_tokens(n) == expect == num_tokens(torch.tensor([n])).item()
    assert num_tokens(160000) == 496

def test_official_padding_mask(golden):
    wav, mask = golden["inputs"]["padded_1s"]["wav"], golden["inputs"]["padded_1s"]["mask"]
    ours = valid_tokens((~mask).sum(1), wav.shape[1], "official")
    assert torch.equal(~ours, golden["encoder"]["expected"]["padded_1s"]["token_mask"])
    assert not torch.equal(ours, valid_tokens((~mask).sum(1), wav.shape[1]))

# ---- encoder

def golden_features(golden, kind, case, encoder):
    """Run our encoder on the official code's own fbank, so that nothing but the encoder is compared."""
    wav, mask = golden["inputs"][case]["wav"], golden["inputs"][case]["mask"]
    valid = None if mask is None else valid_tokens((~mask).sum(1), wav.shape[1], "official")
    return patchify(golden["encoder"]["expected"][case]["fbank"]), valid

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_encoder_equals_the_official_one(golden, official, case):
    encoder = load_official(official("encoder"))
    with torch.no_grad():
        ours = encoder(*golden_features(golden, "encoder", case, encoder))
    assert (ours - golden["encoder"]["expected"][case]["out"]).abs().max() < 1e-4

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_classifier_equals_the_official_one(golden, official, case):
    classifier = load_official(official("finetuned"))
    with torch.no_grad():
        ours = classifier(*golden_features(golden, "finetuned", case, classifier.encoder)).sigmoid()
    assert (ours - golden["finetuned"]["expected"][case]["out"]).abs().max() < 1e-5
    assert classifier.labels[3] == "/m/00003"

def test_features_from_waveform_follow_the_official_ones(golden, official):
    # from the waveform, within what rounding of the quietest bins does to it
    encoder = load_official(official("encoder"))
    wav, mask = golden["inputs"]["padded_1s"]["wav"], golden["inputs"]["padded_1s"]["mask"]
    x, valid = encoder.features(wav, (~mask).sum(1), padding="official")
    assert torch.equal(~valid, golden["encoder"]["expected"]["padded_1s"]["token_mask"])
    assert (x - golden["encoder"]["expected"]["padded_1s"]["out"]).abs().max() < 0.02

def test_buckets_equal_a_naive_loop():
    for buckets, far in ((320, 800), (32, 64), (320, 1280)):
        for distance in range(-1000, 1001, 7):
            half = buckets // 2
            n, exact = abs(distance), half // 2
            expect = n if n < exact else min(half - 1, exact + int(math.log(n / exact) / math.log(far / exact) * (half - exact) + 1e-9))
            expect += half if distance > 0 else 0
            assert abs(relative_bucket(torch.tensor(distance), buckets, far).item() - expect) <= (0 if n < exact else 1)
    assert (relative_bucket(torch.tensor([-777, -778, -2000, 778]), 320, 800) == torch.tensor([158, 159, 159, 319])).all()

def test_attention_equals_a_naive_loop(random_encoder):
    attention = random_encoder.blocks[0].attn
    x, H, hd = torch.randn(1, 5, 32), 2, 16
    bias = torch.randn(1, H, 5, 5)
    q, k, v = attention.qkv(x)[0].chunk(3, dim=-1)
    out = torch.zeros(5, 32)
    for h in range(H):
        part = slice(h * hd, h * hd + hd)
        for i in range(5):
            z = attention.gate(q[i, part])
            u, r = z[:4].sum().sigmoid(), z[4:].sum().sigmoid()
            gate = u * (r * attention.gate_scale[h] - 1) + 2
            weights = torch.stack([q[i, part] @ k[j, part] / hd**0.5 + gate * bias[0, h, i, j] for j in range(5)]).softmax(0)
            out[i, part] = sum(w * v[j, part] for j, w in enumerate(weights))
    assert torch.allclose(attention(x, bias, None)[0], attention.out(out), atol=1e-5)

WAYS = ["fused", pytest.param("flex", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="its backward needs a GPU"))]

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("clips", [1, 2])       # one bias for all, or one per clip
def test_all_ways_of_attention_agree(way, clips, monkeypatch):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)
    given = [make(2, 3, 40, 16), make(2, 3, 40, 16), make(2, 3, 40, 16), make(2, 3, 40, 1), make(clips, 3, 40, 40)]
    padding = model.key_padding_bias(torch.arange(40, device=device) < torch.tensor([[40], [27]], device=device))
    results = []
    for chosen in ("plain", way):
        monkeypatch.setattr(model, "ATTENTION", chosen)
        y = model.attend(*given, padding)
        results.append([y, *torch.autograd.grad(y.square().sum(), given)])
    assert all((a - b).abs().max() < 1e-5 * max(1, b.abs().max()) for a, b in zip(*results))

def test_flex_attention_is_exact_without_gradients(monkeypatch):
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 40, n) for n in (16, 16, 16, 1, 40)]
    padding = model.key_padding_bias(torch.arange(40) < torch.tensor([[40], [27]]))
    for key_bias in (None, padding):
        expect = model.attend(*given, key_bias)
        with monkeypatch.context() as patch:
            patch.setattr(model, "ATTENTION", "flex")
            assert torch.allclose(model.attend(*given, key_bias), expect, atol=1e-5)

@pytest.mark.parametrize("T, taps", [(8, 16), (48, 16), (128, 128), (40, 7)])
def test_position_convolution_by_fft(T, taps):
    x, weight = torch.randn(2, T, 12, dtype=torch.double), torch.randn(12, 3, taps, dtype=torch.double)
    naive = torch.zeros(2, T, 12, dtype=torch.double)
    for t in range(T):
        for k in range(taps):
            if 0 <= t + k - taps // 2 < T:
                for g in range(4):
                    naive[:, t, 3 * g:3 * g + 3] += x[:, t + k - taps // 2, 3 * g:3 * g + 3] @ weight[3 * g:3 * g + 3, :, k].T
    assert torch.allclose(conv_direct(x, weight, 4), naive)
    assert torch.allclose(conv_by_fft(x, weight, 4).double(), naive, atol=1e-4)

def test_parameter_counts():
    with torch.device("meta"):
        count = {name: sum(p.numel() for p in Encoder(PRESETS[name]).parameters()) for name in ("base", "large")}
    assert count == {"base": 90_311_792, "large": 311_376_576}

def test_initialisation_of_a_base_model():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(layers=12))
    beta, std = 96**-0.25, lambda p: pytest.approx(p, rel=0.03)
    q, k, v = encoder.blocks[5].attn.qkv.weight.chunk(3)
    block = encoder.blocks[5]
    assert q.std().item() == std(0.0361) and k.std().item() == std(0.0361) and v.std().item() == std(0.0361 * beta)
    assert (block.attn.out.weight.std().item() == std(0.01153)
            and block.fc1.weight.std().item() == std(0.00729) == block.fc2.weight.std().item())
    assert encoder.position_bias.table.std().item() == std(0.02) and block.attn.gate.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert encoder.conv_position.weight_v.std().item() == std(0.00638) and encoder.conv_position.weight_g.mean().item() == std(1.225)
    assert (block.attn.gate_scale == 1).all() and not block.fc1.bias.any() and not encoder.conv_position.bias.any()

# ---- lengths and masks

def clips_of(lengths):
    generator = torch.Generator().manual_seed(1)
    clips = [0.1 * torch.randn(n, generator=generator) for n in lengths]
    wav = torch.stack([torch.nn.functional.pad(c, (0, max(lengths) - len(c))) for c in clips])
    return clips, wav, torch.tensor(lengths)

def test_a_padded_clip_gives_what_it_gives_alone(random_encoder):
    clips, wav, lengths = clips_of([16000, 2800, 9000, 13041])
    wav[1, 2800:] = 7.0     # what stands in the padding does not matter
    classifier = Classifier(random_encoder, list("abc")).eval()
    with torch.no_grad():
        x, valid = random_encoder.features(wav, lengths)
        embedding, probabilities = random_encoder.embed(wav, lengths), classifier.predict(wav, lengths)
        for i, clip in enumerate(clips):
            alone, all_valid = random_encoder.features(clip[None])
            assert all_valid.all() and valid[i].sum() == alone.shape[1]
            assert (x[i, valid[i]] - alone[0]).abs().max() < 1e-5
            assert (embedding[i] - random_encoder.embed(clip[None])[0]).abs().max() < 1e-5
            assert (probabilities[i] - classifier.predict(clip[None])[0]).abs().max() < 1e-5

def test_a_row_of_padding_stays_finite(random_encoder):
    wav = torch.randn(2, 8000)
    for padding in ("exact", "official"):
        assert random_encoder.features(wav, torch.tensor([8000, 0]), padding=padding)[0].isfinite().all()

@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_what_it_says(p):
    torch.manual_seed(0)
    x = (torch.rand(1001, 999) + 0.5).requires_grad_()
    y = model.dropout(x, p)
    y.sum().backward()
    dropped = y == 0
    error = (p * (1 - p) / x.numel())**0.5                                      # of the share, if draws are independent
    assert abs(dropped.double().mean() - p) < 4 * error
    assert abs((dropped[:, 1:] & dropped[:, :-1]).double().mean() - p * p) < 4 * error
    assert torch.equal(x.grad, (~dropped) / (1 - p)) and torch.allclose(y, x * x.grad)
    assert torch.equal(model.dropout(x, 0.0), x) and not model.dropout(x, 1.0).any()
    layer = model.Dropout(p)
    assert (layer(x) == 0).any() and torch.equal(layer.eval()(x), x)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(random_encoder, dtype):
    wav = torch.cat([torch.randn(1, 32000), torch.ones(1, 32000), torch.zeros(1, 32000)])     # loud, constant, silent
    with torch.no_grad(), torch.autocast("cpu", dtype):
        x, _ = random_encoder.features(wav, torch.tensor([32000, 9000, 0]))
    exact, valid = random_encoder.features(wav, torch.tensor([32000, 9000, 0]))
    assert x.isfinite().all() and (x - exact)[valid].abs().mean() < 0.05

@pytest.mark.parametrize("n", [1, 399, 2799, 2800])
def test_clips_shorter_than_a_patch_are_padded(random_encoder, n):
    wav = torch.randn(1, n)
    x, valid = random_encoder.features(wav)
    padded, _ = random_encoder.features(torch.nn.functional.pad(wav, (0, 2800 - n)))
    assert x.shape == (1, 8, 32) and valid.all() and torch.equal(x, padded)
    batch = torch.cat([torch.nn.functional.pad(wav, (0, 9000 - n), value=5.0), torch.randn(1, 9000)])
    both, valid = random_encoder.features(batch, torch.tensor([n, 9000]))
    assert (both[0, valid[0]] - x[0]).abs().max() < 1e-5

def test_rows_and_their_times(random_encoder):
    x, _ = random_encoder.features(torch.randn(2, 16000))
    rows, seconds = model.rows_of(x)
    assert torch.equal(rows[1, 3, 5], x[1, 3 * 8 + 5]) and rows.shape == (2, 6, 8, 32)
    assert seconds.tolist() == pytest.approx([0.0875 + 0.16 * i for i in range(6)])

def test_windows_cover_a_recording():
    wav = torch.arange(1, 401.0)
    for seconds, hop in ((100 / 16000, 50 / 16000), (100 / 16000, 100 / 16000), (500 / 16000, 250 / 16000),
                         (400 / 16000, 100 / 16000), (90 / 16000, 70 / 16000)):
        parts, lengths, starts = model.windows(wav, seconds, hop)
        for part, n, start in zip(parts, lengths, starts):
            assert torch.equal(part[:n], wav[start:start + n]) and not part[n:].any()
        assert len(set(torch.cat([p[:n] for p, n in zip(parts, lengths)]).tolist())) == 400
    assert model.windows(wav[:30], 1.0, 0.5)[0].shape == (1, 30)

class FromWaveform(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, wav, lengths):
        return self.inner.predict(wav, lengths) if isinstance(self.inner, Classifier) else self.inner.features(wav, lengths)

@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_export_with_dynamic_batch_and_length(random_encoder, kind):
    inner = random_encoder if kind == "encoder" else Classifier(random_encoder, list("abc")).eval()
    program = model.export_program(inner)
    for lengths in ([16000], [50001, 20000, 7000, 33333]):
        wav, lengths = torch.randn(len(lengths), max(lengths)), torch.tensor(lengths)
        with torch.no_grad():
            ours, theirs = program.module()(wav, lengths), FromWaveform(inner)(wav, lengths)
        if kind == "encoder":
            assert torch.equal(ours[1], theirs[1])
            ours, theirs = ours[0][ours[1]], theirs[0][theirs[1]]
        assert (ours - theirs).abs().max() < 1e-4

def test_layers(random_encoder):
    wav = torch.randn(1, 8000)
    states, _ = random_encoder.features(wav, layer="all")
    assert len(states) == 3 and torch.equal(states[1], random_encoder.features(wav, layer=1)[0])
    assert torch.equal(states[-1], random_encoder.features(wav)[0])

def test_kept_tokens_stand_at_their_true_positions(random_encoder):
    # independent truth: the full-length forward in which all other tokens are padding,
    # and the position convolution hears the rest louder
    patches = torch.randn(3, 64, 256)
    kept = torch.rand(3, 64) < 0.25
    kept[0] = torch.arange(64) % 5 == 0
    K = int(kept.sum(1).max())
    keep = torch.where(kept, torch.arange(64), 64).sort(1).values[:, :K]
    real = torch.ones(3, 64, dtype=torch.bool)
    with torch.no_grad():
        compact = random_encoder(patches, real, keep)
        conv = random_encoder.conv_position.forward
        random_encoder.conv_position.forward = lambda x: conv(x * (64 / kept.sum(1))[:, None, None])
        full = random_encoder(patches, valid=kept)
        random_encoder.conv_position.forward = conv
    for i in range(3):
        assert (compact[i, :kept[i].sum()] - full[i, kept[i]]).abs().max() < 1e-5
        assert (random_encoder(patches[i:i + 1], None, keep[i:i + 1, :kept[i].sum()])       # no padding at all
                - compact[i, :kept[i].sum()]).abs().max() < 1e-5

def test_the_position_convolution_is_as_loud_in_pretraining_as_later(random_encoder):
    conv, heard = random_encoder.conv_position, []
    conv.weight_v.data[:] = conv.weight_v.data.mean(-1, keepdim=True)       # smooth over its taps, as trained ones are
    random_encoder.conv_position.forward = lambda x: heard.append(type(conv).forward(conv, x)) or heard[-1]
    patches, keep = torch.randn(1, 1, 256).expand(1, 256, 256), torch.rand(1, 256).argsort(1)[:, :64].sort(1).values
    with torch.no_grad():
        random_encoder(patches)
        random_encoder(patches, keep=keep)
    every, quarter = (h[:, 16:-16].abs().mean() for h in heard)
    assert quarter / every == pytest.approx(1, rel=0.15)

def micro_mam(seed=0):
    torch.manual_seed(seed)
    return MaskedAudioModel(Encoder(MICRO), codes=50, blocks=1, dim=32, heads=2)

def masked_inputs(B=2, T=48, n=(48, 32)):
    import train_mam
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(T) < torch.tensor(n)[:, None]
    keep, masked = train_mam.random_mask(torch.rand(B, T, generator=generator), valid, 0.75)
    targets = torch.randint(50, (B, T + 1), generator=generator).index_fill(1, torch.tensor([T]), -1).gather(1, masked)
    return torch.randn(B, T, 256, generator=generator), valid, keep, masked, targets

def test_recomputing_gives_the_same_gradient_for_less_memory():
    inputs, grads, kept = masked_inputs(), [], []
    for recompute in (False, True):
        model = micro_mam().train()
        model.encoder.recompute, held = recompute, []
        for block in [*model.encoder.blocks, *model.blocks]:
            block.dropout.p = block.attn.dropout = 0.1          # drawn alike both times
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            loss = model(*inputs[:4]).square().mean()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        kept.append(sum(held))
    assert torch.equal(*grads) and kept[1] < 0.5 * kept[0]

def test_random_mask():
    import train_mam
    valid = torch.arange(64) < torch.tensor([64, 40, 8, 0])[:, None]
    counts = torch.zeros(64)
    for seed in range(300):
        keep, masked = train_mam.random_mask(torch.rand(4, 64, generator=torch.Generator().manual_seed(seed)), valid, 0.75)
        for i, n in enumerate((64, 40, 8, 0)):
            kept, hidden = set(keep[i].tolist()) - {64}, set(masked[i].tolist()) - {64}
            assert kept | hidden == set(range(n)) and not kept & hidden and len(kept) == (max(1, round(n / 4)) if n else 0)
        counts[keep[0]] += 1
    assert (keep.sort(1).values == keep).all() and keep.shape == (4, 16) and masked.shape == (4, 48)
    assert (counts / 300 - 0.25).abs().max() < 0.12      # uniform: 4.8 standard errors

def test_masked_patches_are_never_seen():
    mam = micro_mam().eval()
    patches, valid, keep, masked, targets = masked_inputs()
    other = patches.clone()
    for i in range(2):
        hidden = torch.ones(48, dtype=torch.bool)
        hidden[keep[i][keep[i] < 48]] = False
        other[i, hidden] = 100 * torch.randn(int(hidden.sum()), 256)        # masked places and padding
    with torch.no_grad():
        a, b = mam.encoder(patches, valid, keep), mam.encoder(other, valid, keep)
        assert torch.equal(a[keep < 48], b[keep < 48])
        assert torch.equal(mam(patches, valid, keep, masked), mam(other, valid, keep, masked))

def test_loss_gradients_do_not_depend_on_masked_places_or_padding():
    import train_mam
    mam = micro_mam()
    patches, valid, keep, masked, targets = masked_inputs()
    grads = []
    for noise in (0.0, 100.0):
        x = patches.clone()
        for i in range(2):
            hidden = torch.ones(48, dtype=torch.bool)
            hidden[keep[i][keep[i] < 48]] = False
            x[i, hidden] += noise
        x.requires_grad_()
        mam.zero_grad()
        train_mam.loss_and_correct(mam, dict(patches=x, valid=valid, keep=keep, masked=masked), targets)[0].backward()
        assert not x.grad[0][~torch.isin(torch.arange(48), keep[0])].any() and x.grad[0][keep[0]].any()
        grads.append([p.grad.clone() for p in mam.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))

def test_every_parameter_gets_a_gradient():
    import train_mam
    mam = micro_mam()
    patches, valid, keep, masked, targets = masked_inputs()
    train_mam.loss_and_correct(mam, dict(patches=patches, valid=valid, keep=keep, masked=masked), targets)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in mam.parameters())

def test_gradient_decay():
    torch.manual_seed(0)
    encoder, patches, grads = Encoder(MICRO), torch.randn(1, 16, 256), {}
    for ratio in (1.0, 0.3):
        encoder.cfg = EncoderConfig(**{**MICRO.__dict__, "grad_decay": ratio})
        encoder.zero_grad()
        encoder(patches).square().sum().backward()
        grads[ratio] = [encoder.patch.weight.grad.norm(), encoder.blocks[0].fc1.weight.grad.norm(),
                        encoder.blocks[1].fc1.weight.grad.norm()]
    assert [(a / b).item() for a, b in zip(grads[0.3], grads[1.0])] == pytest.approx([0.09, 0.3, 1.0], rel=1e-4)

# ---- checkpoints

def test_export_gives_back_the_official_file(official, tmp_path):
    for kind in ("encoder", "finetuned"):
        before = torch.load(official(kind), weights_only=True)
        export_official(load_official(official(kind)), tmp_path / "back.pt")
        after = torch.load(tmp_path / "back.pt", weights_only=True)
        assert before["model"].keys() == after["model"].keys() and before["cfg"] == after["cfg"]
        assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())
        assert before.get("label_dict") == after.get("label_dict")

def test_other_dimensions_are_read_from_the_file(tmp_path):
    torch.manual_seed(0)
    for shape in (dict(layers=3, dim=48, heads=3, ffn=80, patch_dim=48, conv_pos=9, conv_groups=2, buckets=64, max_distance=100),
                  dict(layers=1, dim=32, heads=8, ffn=32, patch_dim=8, conv_pos=4, conv_groups=32, buckets=8, max_distance=20)):
        encoder = Encoder(EncoderConfig(**shape)).eval()
        export_official(encoder, tmp_path / "other.pt")
        again, wav = load_official(tmp_path / "other.pt"), torch.randn(1, 8000)
        assert dict(again.cfg.__dict__) == dict(encoder.cfg.__dict__)
        assert torch.equal(again.features(wav)[0], encoder.features(wav)[0])

def test_official_keys_and_shapes(tmp_path):
    with torch.device("meta"):
        base = Encoder(PRESETS["base"])
    state = encoder_to_official(base)[1]
    assert len(state) == 250 and len(encoder_to_official(Encoder(MICRO))[1]) == 10 + 2 * 20
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert shapes["encoder.pos_conv.0.weight_g"] == (1, 1, 128) and shapes["encoder.pos_conv.0.weight_v"] == (768, 48, 128)
    assert (shapes["encoder.layers.11.self_attn.relative_attention_bias.weight"] == (320, 12)
            and shapes["patch_embedding.weight"] == (512, 1, 16, 16))
    assert shapes["encoder.layers.7.self_attn.grep_a"] == (1, 12, 1, 1) and shapes["encoder.layers.7.fc1.weight"] == (3072, 768)

def test_classes_in_the_order_of_audioset(official, tmp_path):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 10]
    rows = "".join(f'{i},/m/{mid:05d},"Name, {mid}"\n' for i, mid in enumerate(order))
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n" + rows)
    plain, wav = load_official(official("finetuned")), torch.randn(1, 16000)
    ours = load_official(official("finetuned"), reorder="audioset", class_csv=tmp_path / "classes.csv")
    assert torch.allclose(ours.predict(wav)[0], plain.predict(wav)[0, order]) and ours.labels[:2] == ["Name, 3", "Name, 1"]
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n" + rows.replace("/m/00009", "/m/99999"))
    with pytest.raises(CheckpointError, match="/m/99999 is not there"):
        load_official(official("finetuned"), reorder="audioset", class_csv=tmp_path / "classes.csv")

def test_an_encoder_says_that_it_is_no_classifier(official):
    encoder = load_official(official("encoder"))
    for method in (encoder.predict, encoder.logits):
        with pytest.raises(CheckpointError, match="no classifier head"):
            method(torch.randn(1, 16000))
    with pytest.raises(CheckpointError, match="no classifier head"):
        load_official(official("encoder"), reorder="audioset", class_csv="x")

# ---- the command line

def test_labels_and_features_from_the_command_line(official, write_wav, tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_wav("in/stereo.flac", 0.1 * rng.standard_normal((44100, 2)), 44100)
    write_wav("in/long.wav", 0.1 * rng.standard_normal(8000 * 13), 8000)
    write_wav("in/one_sample.wav", 0.1 * rng.standard_normal(1))
    (tmp_path / "in/text.wav").write_text("no sound")
    infer.main([str(official("finetuned")), str(tmp_path / "in"), "--top", "2"])
    out, err = capsys.readouterr()
    assert out.count("/m/") == 6 and out.count("%") == 6 and "text.wav: cannot be read" in err
    infer.main([str(official("finetuned")), str(tmp_path / "in/long.wav"), "--per_window", "--top", "1"])
    assert "long.wav 0.0 s" in (out := capsys.readouterr().out) and "long.wav 5.0 s" in out
    infer.main([str(official("encoder")), str(tmp_path / "in"), "--out", str(tmp_path / "npy")])
    infer.main([str(official("encoder")), str(tmp_path / "in/long.wav"), "--out", str(tmp_path / "pooled"), "--pool", "--layer", "1"])
    shapes = {p.stem: np.load(p).shape for p in (tmp_path / "npy").iterdir()}
    assert shapes == {"stereo": (48, 64), "long": (496 + num_tokens(48000), 64), "one_sample": (8, 64)}
    assert np.load(tmp_path / "pooled/long.npy").shape == (64,)

def spoil(ckpt, change):
    ckpt = {**ckpt, "cfg": dict(ckpt["cfg"]), "model": dict(ckpt["model"])}
    change(ckpt)
    return ckpt

@pytest.mark.parametrize("change, message", [
    (lambda c: c["model"].pop("encoder.layers.1.fc2.bias"), "encoder.layers.1.fc2.bias.*missing"),
    (lambda c: c["model"].update(extra=torch.zeros(1)), "unknown keys, extra"),
    (lambda c: c["cfg"].update(layer_norm_first=True), "layer_norm_first=True is not supported"),
    (lambda c: c["cfg"].update(activation_fn="glu"), "activation_fn='glu'"),
    (lambda c: c["model"].update({"quantize.embedding.weight": torch.zeros(2, 2)}), "is a tokenizer"),
    (lambda c: c.pop("model"), "not a BEATs checkpoint")])
def test_bad_official_files_are_named(golden, tmp_path, change, message):
    torch.save(spoil(golden["encoder"]["checkpoint"], change), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        load_official(tmp_path / "bad.pt")
    assert str(tmp_path / "bad.pt") in str(error.value) and "\n" not in str(error.value)

def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    for name, message in (("text.pt", "not a readable checkpoint"), ("nowhere.pt", "no such checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)
