"""The model against the official code's outputs, naive loops and closed forms."""
import dataclasses
import math
import re
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from audio import num_tokens, patchify, valid_tokens
from common import CheckpointError
from conftest import MICRO
from model import (PRESETS, Classifier, Encoder, EncoderConfig, MaskedAudioModel, conv_by_fft, conv_direct,
                   export_official, flops_of, load, load_encoder, load_official, random_mask, relative_bucket)
from train_mam import losses

def assert_close(ours, expect):
    for x, y in zip(ours, expect, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max().clamp(min=1)

# ---- the encoder

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_encoder_and_classifier_equal_the_official_ones(golden, official, case):
    encoder, classifier = load_official(official("encoder")), load_official(official("finetuned"))
    wav, mask = golden["inputs"][case]["wav"], golden["inputs"][case]["mask"]
    lengths = None if mask is None else (~mask).sum(1)
    valid = None if mask is None else valid_tokens(lengths, wav.shape[1], "official")
    expect = golden["encoder"]["expected"][case]
    patches = patchify(expect["fbank"])             # theirs, so that nothing but the encoder is compared
    with torch.no_grad():
        assert (encoder(patches, valid) - expect["out"]).abs().max() < 1e-4
        probabilities = classifier(patches, valid).sigmoid()
        assert (probabilities - golden["finetuned"]["expected"][case]["out"]).abs().max() < 1e-5
        # from the waveform, within what rounding of the quietest bins does to it
        x, _ = encoder.features(wav, lengths, padding="official")
        assert (x - expect["out"]).abs().max() < 0.02
    assert classifier.labels[3] == "/m/00003"

def test_buckets_equal_a_naive_loop():
    for buckets, far in ((320, 800), (32, 64), (320, 1280)):
        half, exact = buckets // 2, buckets // 4
        for distance in range(-1000, 1001, 7):
            n = expect = abs(distance)
            if n >= exact:
                octaves = math.log(n / exact) / math.log(far / exact)
                expect = min(half - 1, exact + int(octaves * (half - exact) + 1e-9))
            ours = relative_bucket(torch.tensor(distance), buckets, far).item() - half * (distance > 0)
            assert abs(ours - expect) <= (n >= exact)       # a logarithm may round to the next bucket
    assert relative_bucket(torch.tensor([-777, -778, -2000, 778]), 320, 800).tolist() == [158, 159, 159, 319]

def test_attention_equals_a_naive_loop(random_encoder):
    attention = random_encoder.transformer.blocks[0].attn
    x, bias, out = torch.randn(1, 5, 32), torch.randn(1, 2, 5, 5), torch.zeros(5, 32)
    q, k, v = attention.qkv(x)[0].chunk(3, dim=-1)
    for head, part in enumerate((slice(0, 16), slice(16, 32))):
        for i in range(5):
            z = attention.gate(q[i, part])
            update, reset = z[:4].sum().sigmoid(), z[4:].sum().sigmoid()
            gate = update * (reset * attention.gate_scale[head] - 1) + 2
            scores = [q[i, part] @ k[j, part] / 4 + gate * bias[0, head, i, j] for j in range(5)]
            for j, weight in enumerate(torch.stack(scores).softmax(0)):
                out[i, part] += weight * v[j, part]
    assert torch.allclose(attention(x, bias, None)[0], attention.out(out), atol=1e-5)

@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("way", ["fused", "flex"])
@pytest.mark.parametrize("biases", [1, 2])              # one for all clips, or one per clip
def test_all_ways_of_attention_agree(way, biases, monkeypatch):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(2, 3, 40, 16)] * 3 + [(2, 3, 40, 1), (biases, 3, 40, 40)]
    backward = way == "fused" or device == "cuda"       # flex_attention has none on a CPU
    given = [torch.randn(shape, device=device, requires_grad=backward) for shape in shapes]
    padding = model.key_padding_bias(torch.arange(40) < torch.tensor([[40], [27]])).to(device)
    for key_bias in (None, padding):
        results = []
        for chosen in ("plain", way):
            monkeypatch.setattr(model, "ATTENTION", chosen)
            y = model.attend(*given, key_bias)
            gradients = torch.autograd.grad(y.square().sum(), given) if backward else ()
            results.append([y, *gradients])
        assert_close(*results)

@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_kernel_gets_a_bias_that_it_takes(padded, dtype, random_encoder, monkeypatch):
    """In the dtype of the queries and with keys side by side: else torch falls back to slow plain steps."""
    patches, valid = torch.randn(2, 48, 256), torch.arange(48) < torch.tensor([[48], [32]])
    inputs = patches, valid if padded else None, random_mask(torch.rand(2, 48), valid, 0.5)[0]
    fused, attend, biases, results = F.scaled_dot_product_attention, model.attend, [], []
    def noticed(q, k, v, attn_mask, dropout_p):
        assert attn_mask.dtype == q.dtype == dtype
        assert attn_mask.stride(-1) == 1
        biases.append(attn_mask)
        return fused(q, k, v, attn_mask, dropout_p)
    def attended(q, k, v, gate, bias, key_bias, p):     # every block gets it ready
        assert bias.is_contiguous()
        assert bias.dtype == (dtype if model.ATTENTION == "fused" else torch.float32)
        return attend(q, k, v, gate, bias, key_bias, p)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noticed)
    monkeypatch.setattr(model, "attend", attended)
    for way in ("plain", "fused"):
        monkeypatch.setattr(model, "ATTENTION", way)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            results += [random_encoder(*inputs), random_encoder(patches, inputs[1])]
    assert len(biases) == 2 * 2                         # blocks, and with or without keep
    for plain, ours in zip(results[:2], results[2:]):
        difference = (plain - ours)[plain.isfinite()].abs().max()
        assert difference < (1e-5 if dtype == torch.float32 else 0.1) * plain.abs().max()

@pytest.mark.parametrize("T, taps", [(1, 16), (8, 16), (17, 16), (48, 16), (40, 7)])
def test_both_position_convolutions_equal_a_naive_loop(T, taps):
    torch.manual_seed(0)
    x, weight, naive = torch.randn(2, T, 12), torch.randn(12, 3, taps), torch.zeros(2, T, 12)
    for t in range(T):
        for tap in range(taps):
            heard = t + tap - taps // 2
            if 0 <= heard < T:
                for group in (slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)):
                    naive[:, t, group] += x[:, heard, group] @ weight[group, :, tap].T
    assert_close([conv_direct(x, weight, groups=4), conv_by_fft(x, weight, groups=4)], [naive, naive])

def test_the_faster_position_convolution_is_asked_for_once_also_by_a_compiler(monkeypatch):
    x, weight, slow, count = torch.randn(1, 40, 12), torch.randn(12, 3, 16), conv_direct, Counter()
    def slower(x, weight, groups):
        count["direct"] += 1
        time.sleep(0.01)
        return slow(x, weight, groups)
    monkeypatch.setattr(model, "conv_direct", slower)
    model.time_convolutions.cache_clear()
    shape, before = (12, 4, 16, x.device, x.dtype), torch.get_rng_state()
    def chosen(x):
        return x + (1 if model.faster_convolution(*shape) == "fft" else 0)
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), x + 1)
    timed = count["direct"]
    assert timed > 0
    assert model.faster_convolution(*shape) == "fft"
    assert count["direct"] == timed
    assert torch.equal(torch.get_rng_state(), before)   # what is random stays what it would have been
    for way, expect in (("direct", slow), ("fft", conv_by_fft), ("auto", conv_by_fft)):     # on a CPU
        monkeypatch.setattr(model, "CONVOLUTION", way)
        assert torch.equal(model.convolve(x, weight, 4), expect(x, weight, 4))

def test_parameter_counts():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Encoder(PRESETS[name]).parameters()) for name in ("base", "large")]
    assert counts == [90_311_792, 311_376_576]

def test_initialisation_of_a_base_model():
    torch.manual_seed(0)
    encoder, beta = Encoder(EncoderConfig()), 96**-0.25
    block = encoder.transformer.blocks[5]
    q, k, v = block.attn.qkv.weight.chunk(3)
    for weight, std in (
            (q, 0.0361), (k, 0.0361), (v, 0.0361 * beta), (block.attn.out.weight, 0.0361 * beta),
            (block.fc1.weight, 0.0228 * beta), (block.fc2.weight, 0.0228 * beta),
            (block.attn.gate.weight, 0.02), (encoder.transformer.position_bias.table, 0.02),
            (encoder.conv_position.weight_v, 0.00638)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)

def test_operations_are_counted_as_torch_counts_them():
    transformer, x = model.Transformer(MICRO, 2), torch.randn(1, 200, 32)
    with FlopCounterMode(display=False) as counter:
        transformer(x)
    assert flops_of(transformer, 200) == pytest.approx(counter.get_total_flops(), rel=0.02)

# ---- lengths, and some of the tokens

def test_a_padded_clip_gives_what_it_gives_alone(random_encoder):
    torch.manual_seed(1)
    lengths = torch.tensor([16000, 2800, 9000, 13041, 2799, 399, 1])
    clips = [0.1 * torch.randn(n) for n in lengths.tolist()]
    wav = torch.stack([F.pad(clip, (0, 16000 - len(clip)), value=7.0) for clip in clips])
    classifier = Classifier(random_encoder, list("abc")).eval()
    with torch.no_grad():
        x, valid = random_encoder.features(wav, lengths)
        probabilities = classifier.predict(wav, lengths)
        for i, clip in enumerate(clips):
            alone, _ = random_encoder.features(clip[None])
            assert alone.shape[1] == max(8, num_tokens(len(clip)))      # the shortest become one row
            assert (x[i, valid[i]] - alone[0]).abs().max() < 1e-5
            assert (probabilities[i] - classifier.predict(clip[None])[0]).abs().max() < 1e-5

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_precision_stays_finite(random_encoder, dtype):
    wav = torch.cat([torch.randn(1, 32000), torch.ones(1, 32000), torch.zeros(1, 32000)])
    lengths = torch.tensor([32000, 9000, 0])            # loud, constant, nothing but padding
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for padding in ("exact", "official"):
            assert random_encoder.features(wav, lengths, padding=padding)[0].isfinite().all()

def test_kept_tokens_stand_at_their_true_positions(random_encoder):
    # independent truth: the forward on all tokens, of which the others are padding,
    # and the position convolution hears the rest louder
    torch.manual_seed(0)
    patches, everything = torch.randn(3, 64, 256), torch.ones(3, 64, dtype=torch.bool)
    kept = torch.rand(3, 64) < 0.25
    kept[0] = torch.arange(64) % 5 == 0
    counts = kept.sum(1)
    keep = torch.where(kept, torch.arange(64), 64).sort(1).values[:, :counts.max()]
    with torch.no_grad():
        compact = random_encoder(patches, everything, keep)
        unpadded = [random_encoder(patches[[i]], None, keep[[i], :counts[i]])[0] for i in range(3)]
        conv = random_encoder.conv_position.forward
        random_encoder.conv_position.forward = lambda x: conv(x * (64 / counts)[:, None, None])
        full = random_encoder(patches, valid=kept)
    for i in range(3):
        assert (compact[i, :counts[i]] - full[i, kept[i]]).abs().max() < 1e-5
        assert (compact[i, :counts[i]] - unpadded[i]).abs().max() < 1e-5

def test_random_masks_are_uniform_and_cut_each_clip_in_two():
    lengths = (64, 40, 8, 0)
    valid = torch.arange(64) < torch.tensor(lengths)[:, None]
    counts = torch.zeros(64)
    for seed in range(300):
        noise = torch.rand(4, 64, generator=torch.Generator().manual_seed(seed))
        keep, masked = random_mask(noise, valid, 0.75)
        for i, n in enumerate(lengths):
            kept, hidden = ([token for token in row[i].tolist() if token < 64] for row in (keep, masked))
            assert sorted(kept + hidden) == list(range(n))
            assert len(kept) == (max(1, round(n / 4)) if n else 0)
        counts[keep[0]] += 1
    assert torch.equal(keep.sort(1).values, keep)
    assert (keep.shape, masked.shape) == ((4, 16), (4, 48))             # whatever the lengths
    assert (counts / 300 - 0.25).abs().max() < 0.12                     # 4.8 standard errors

def micro_mam(dropout=0.0):
    torch.manual_seed(0)
    cfg = dataclasses.replace(MICRO, dropout=dropout, attention_dropout=dropout)
    return MaskedAudioModel(Encoder(cfg), codes=50, blocks=1, dim=32, heads=2)

def masked_inputs():
    """Two clips of 48 and 32 tokens: inputs, targets, and (B, T) True where the encoder may not look."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(48) < torch.tensor([[48], [32]])
    keep, masked = random_mask(torch.rand(2, 48, generator=generator), valid, 0.75)
    codes = F.pad(torch.randint(50, (2, 48), generator=generator), (0, 1), value=-1)
    hidden = torch.ones(2, 49, dtype=torch.bool).scatter(1, keep, False)[:, :48]
    patches = torch.randn(2, 48, 256, generator=generator)
    return dict(patches=patches, valid=valid, keep=keep, masked=masked), codes.gather(1, masked), hidden

def test_masked_patches_and_padding_are_never_seen():
    mam = micro_mam()
    inputs, targets, hidden = masked_inputs()
    results = []
    for noise in (0.0, 100.0):
        patches = inputs["patches"] + noise * hidden[..., None] * torch.randn(2, 48, 256)
        sums = losses(mam, inputs | dict(patches=patches.requires_grad_()), targets)
        seen, *gradients = torch.autograd.grad(sums["loss"], [patches, *mam.parameters()])
        assert torch.equal(seen.any(-1), ~hidden)
        results.append([sums["loss"], *gradients])
    for ours, expect in zip(*results):
        assert torch.equal(ours, expect)
        assert expect.any()                             # every parameter gets a gradient

def test_recomputing_gives_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        mam = micro_mam(dropout=0.1)
        model.recompute_blocks(mam, recompute)
        torch.manual_seed(1)                            # drawn alike both times
        loss = mam(**masked_inputs()[0]).square().mean()
        gradients.append(torch.autograd.grad(loss, mam.parameters()))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)

def test_gradients_decay_at_every_layer():
    norms = []
    for decay in (1.0, 0.3):
        torch.manual_seed(0)
        encoder = Encoder(dataclasses.replace(MICRO, grad_decay=decay))
        encoder(torch.randn(1, 16, 256)).square().sum().backward()
        norms.append(encoder.patch.weight.grad.norm())
    assert norms[1] / norms[0] == pytest.approx(0.3**2, rel=1e-4)       # of two

def test_dropout_drops_what_it_says(p=0.1):
    torch.manual_seed(0)
    x = torch.rand(1001, 999) + 0.5
    y = model.dropout(x, p)
    dropped = y == 0
    error = (p * (1 - p) / x.numel())**0.5              # of the share, if draws are independent
    assert abs(dropped.double().mean() - p) < 4 * error
    assert abs((dropped[:, 1:] & dropped[:, :-1]).double().mean() - p * p) < 4 * error
    assert torch.allclose(y, x * ~dropped / (1 - p))

# ---- checkpoints

@pytest.mark.parametrize("kind", ["encoder", "finetuned"])
def test_export_gives_back_the_official_file(official, tmp_path, kind):
    export_official(load_official(official(kind)), tmp_path / "back.pt")
    before, after = (torch.load(path, weights_only=True) for path in (official(kind), tmp_path / "back.pt"))
    torch.testing.assert_close(after.pop("model"), before.pop("model"), rtol=0, atol=0)
    assert after == before                              # dimensions, names of classes

def test_other_dimensions_are_read_from_the_file(tmp_path):
    shape = dict(layers=3, dim=48, heads=3, ffn=80, patch_dim=48, conv_pos=9, conv_groups=2, buckets=64)
    encoder, wav = Encoder(EncoderConfig(**shape, max_distance=100)).eval(), torch.randn(1, 8000)
    export_official(encoder, tmp_path / "other.pt")
    assert torch.equal(load(tmp_path / "other.pt").embed(wav), encoder.embed(wav))

def test_checkpoints_also_those_whose_stacks_had_no_names(random_encoder, tmp_path):
    classifier = Classifier(random_encoder, ["a", "b"], multilabel=False).eval()
    mam, wav = MaskedAudioModel(random_encoder, codes=50, blocks=1), torch.randn(1, 8000)
    path, more = tmp_path / "ours.pt", dict(labels=["a", "b"], multilabel=False)
    for kind, module in (("mam", mam), ("classifier", classifier)):
        state = module.state_dict()
        old = {re.sub(r"(transformer|predictor)\.", "", name): value for name, value in state.items()}
        for names in (state, old):
            torch.save(dict(kind=kind, model=names, encoder=dataclasses.asdict(MICRO), **more), path)
            assert torch.equal(load_encoder(path).embed(wav), random_encoder.embed(wav))
    assert torch.equal(load(path).predict(wav), classifier.predict(wav))

def test_classes_in_the_order_of_audioset(official, tmp_path):
    order, wav, table = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 10], torch.randn(1, 16000), tmp_path / "classes.csv"
    lines = [f'{i},/m/{mid:05d},"Name, {mid}"\n' for i, mid in enumerate(order)]
    table.write_text("index,mid,display_name\n" + "".join(lines))
    plain, ours = load(official("finetuned")), load_official(official("finetuned"), "audioset", table)
    assert torch.allclose(ours.predict(wav)[0], plain.predict(wav)[0, order])
    assert ours.labels[:2] == ["Name, 3", "Name, 1"]
    with pytest.raises(CheckpointError, match="no classifier head"):
        load_official(official("encoder"), "audioset", table)
    table.write_text(table.read_text().replace("/m/00009", "/m/99999"))
    with pytest.raises(CheckpointError, match="classes are not the model's.*/m/99999"):
        load_official(official("finetuned"), "audioset", table)

@pytest.mark.parametrize("part, change, message", [
    ("model", {"encoder.layers.1.fc2.bias": None}, "encoder.layers.1.fc2.bias.*missing"),
    ("model", {"extra": torch.zeros(1)}, "unknown keys, extra"),
    ("model", {"quantize.embedding.weight": torch.zeros(2, 2)}, "is a tokenizer"),
    ("cfg", {"layer_norm_first": True}, "layer_norm_first=True is not supported")])
def test_bad_official_files_are_named(golden, tmp_path, part, change, message):
    ckpt = dict(golden["encoder"]["checkpoint"])
    ckpt[part] = {key: value for key, value in (ckpt[part] | change).items() if value is not None}
    torch.save(ckpt, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'bad.pt'}: .*{message}.*$"):
        load(tmp_path / "bad.pt")

def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save(dict(cfg={}), tmp_path / "bare.pt")
    for name, message in (("text", "not a readable"), ("nowhere", "no such"), ("bare", "not a BEATs")):
        with pytest.raises(CheckpointError, match=f"{name}.pt: {message} checkpoint"):
            load(tmp_path / f"{name}.pt")
