"""The model against the official code's outputs, naive loops and closed forms."""
import dataclasses
import json
import math
import os
import random
import re
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import model
from audio import num_tokens, patchify, valid_tokens
from common import CheckpointError, UserError
from conftest import MICRO
from model import (PRESETS, Classifier, Encoder, EncoderConfig, MaskedAudioModel, conv_by_fft, conv_direct,
                   export_official, flops_of, load, load_encoder, load_official, random_mask, relative_bucket)
from tokenizer import RandomProjectionTokenizer, load_any, load_tokenizer
from tools.infer import export_program
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

@pytest.mark.parametrize("dtype, error", [(torch.half, 5e-3), (torch.bfloat16, 5e-2), (torch.double, 1e-5)])
def test_a_model_of_another_precision_gives_nearly_the_same(random_encoder, dtype, error):
    wav, lengths, features = 0.1 * torch.randn(2, 24000), torch.tensor([24000, 9000]), torch.randn(1, 32, 128)
    classifier, results = Classifier(random_encoder, list("abc")).eval(), []
    for _ in range(2):
        with torch.no_grad():
            x = random_encoder.features(wav, lengths)[0]
            assert x.dtype == random_encoder.patch.weight.dtype
            results.append([x, random_encoder.features(wav, layer="all")[0], random_encoder.embed(wav),
                            classifier.predict(wav, lengths), classifier.teach(features, None)])
        classifier.to(dtype)
    for full, other in zip(*results):
        assert (full - other).abs().max() < error * full.abs().max()

@pytest.mark.parametrize("layer", [9, -4, "last"])
def test_layers_that_are_not_there_are_refused(random_encoder, layer):
    with pytest.raises(ValueError, match='layer is None, "all" or 0 to 2'):
        random_encoder.features(torch.zeros(1, 16000), layer=layer)

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

def test_the_predictor_is_told_band_and_time_and_what_the_encoder_says_of_kept_tokens():
    mam, (inputs, _, hidden), seen = micro_mam(), masked_inputs(), []
    mam.predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mam(**inputs)
    said = mam.embed(mam.encoder(inputs["patches"], inputs["valid"], inputs["keep"]))
    for b in range(2):
        told = iter(said[b])
        for t in range(48):
            angle = [t // 8 / 10000**(2 * i / 32) for i in range(16)]
            due = mam.band[t % 8] + torch.tensor([*map(math.sin, angle), *map(math.cos, angle)])
            due = due if hidden[b, t] else due + next(told)
            assert torch.allclose(seen[0][b, t], due, atol=1e-5)

def test_what_is_predicted_of_a_padded_clip_is_what_is_predicted_of_it_alone():
    mam, (inputs, targets, _) = micro_mam().eval(), masked_inputs()
    logits = mam(**inputs)[1][targets[1] >= 0]
    keep, masked = (inputs[name][1:, inputs[name][1] < 32] for name in ("keep", "masked"))
    alone = mam(inputs["patches"][1:, :32], None, keep, masked)[0]
    assert torch.allclose(alone, logits, atol=1e-5)

def test_layers_are_left_out_as_often_as_asked_of_the_encoder_alone():
    encoder = Encoder(dataclasses.replace(MICRO, layerdrop=0.2))
    mam = MaskedAudioModel(encoder, codes=50, blocks=2, dim=32).train()
    patches, changed = torch.randn(1, 8, 256), []
    for _ in range(100):
        states = mam.encoder(patches, all_layers=True)
        changed += [not torch.equal(x, y) for x, y in zip(states, states[1:])]
    assert abs(sum(changed) / 200 - 0.8) < 0.12                 # 4.2 standard errors
    x = torch.randn(1, 8, 32)
    assert all(torch.equal(mam.predictor(x), mam.predictor(x)) for _ in range(20))

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

def test_statistics_of_the_filter_bank_come_through_an_export(random_encoder, tmp_path, capsys):
    path, wav = tmp_path / "x.pt", torch.randn(1, 8000)
    random_encoder.cfg = dataclasses.replace(MICRO, fbank_mean=14.6, fbank_std=5.625)
    for model_ in (random_encoder, Classifier(random_encoder, ["a", "b"])):
        for espnet in (False, True):                    # whose files have two constants more
            export_official(model_, path, espnet=espnet)
            assert torch.equal(load_encoder(path).embed(wav), random_encoder.embed(wav))
            names = torch.load(path, weights_only=True)["model"]
            assert ("raw2fbank_pad.weight" in names) == ("patch_embedding_pad.weight" in names) == espnet
    assert capsys.readouterr().err == ""                # nothing to be assumed
    other = load_encoder(path, fbank=(10.0, 4.0))
    random_encoder.cfg = dataclasses.replace(MICRO, fbank_mean=10.0, fbank_std=4.0)
    assert torch.equal(other.embed(wav), random_encoder.embed(wav))

@pytest.mark.parametrize("multilabel", [False, True])
def test_probabilities_come_through_an_export(random_encoder, multilabel, tmp_path):
    """Also of classes that exclude each other, which no released file has."""
    classifier, wav = Classifier(random_encoder, ["a", "b", "c"], multilabel).eval(), torch.randn(1, 8000)
    torch.nn.init.normal_(classifier.head.weight)
    export_official(classifier, tmp_path / "x.pt")
    assert torch.equal(load(tmp_path / "x.pt").predict(wav), classifier.predict(wav))

def test_other_dimensions_are_read_from_the_file(tmp_path):
    shape = dict(layers=3, dim=48, heads=3, ffn=80, patch_dim=48, conv_pos=9, conv_groups=2, buckets=64)
    encoder, wav = Encoder(EncoderConfig(**shape, max_distance=100)).eval(), torch.randn(1, 8000)
    export_official(encoder, tmp_path / "other.pt")
    assert torch.equal(load(tmp_path / "other.pt").embed(wav), encoder.embed(wav))

def test_checkpoints_of_both_kinds_give_their_encoder(random_encoder, tmp_path):
    classifier = Classifier(random_encoder, ["a", "b"], multilabel=False).eval()
    mam, wav = MaskedAudioModel(random_encoder, codes=50, blocks=1), torch.randn(1, 8000)
    path, more = tmp_path / "ours.pt", dict(labels=["a", "b"], multilabel=False)
    for kind, module in (("mam", mam), ("classifier", classifier)):
        content = dict(kind=kind, model=module.state_dict(), encoder=dataclasses.asdict(MICRO), **more)
        torch.save(content, path)
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

def exported(made, path, **options):
    """Return what export_official writes."""
    export_official(made, path, **options)
    return torch.load(path, weights_only=True)

def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}

WRAPPERS = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module.encoder.", "a.b.c.",
            "encoder._orig_mod.", "_fsdp_wrapped_module.net."]

@pytest.mark.parametrize("names", ["ours", "theirs"])
def test_weights_are_found_below_any_names_and_in_any_nest(random_encoder, tmp_path, names):
    path, wav = tmp_path / "x.pt", torch.randn(1, 8000)
    state = random_encoder.state_dict() if names == "ours" else exported(random_encoder, path)["model"]
    files = [with_prefix(prefix, state) for prefix in WRAPPERS]
    files += [{nest: files[1], "epoch": 3, "args": ["a", None], "optimizer": {"state": {0: torch.zeros(2)}}}
              for nest in ("model", "state_dict", "model_state_dict", "module", "net", "ema")]
    files += [{"pl": {"model": {"state_dict": state}}}, {"ema": {"weights": {}}, **state}]
    for file in files:
        for zipped in (True, False):                        # torch's format since 1.6, and the one before
            torch.save(file, path, _use_new_zipfile_serialization=zipped)
            encoder = load(path, cfg=dataclasses.asdict(MICRO))
            assert torch.equal(encoder.embed(wav), random_encoder.embed(wav))

def test_weights_of_any_type_are_loaded(random_encoder, tmp_path, monkeypatch):
    path, wav, ckpt = tmp_path / "x.pt", torch.randn(1, 8000), exported(random_encoder, tmp_path / "x.pt")
    def strided(x):
        return torch.stack([x, x], -1)[..., 0]
    for change, error in ((torch.Tensor.half, 0.01), (torch.Tensor.bfloat16, 0.1), (torch.Tensor.double, 0),
                          (torch.nn.Parameter, 0), (strided, 0)):
        state = {name: change(value) for name, value in ckpt["model"].items()}
        torch.save(ckpt | dict(model=state), path)
        encoder = load(path)
        assert encoder.patch.weight.dtype == torch.float32
        assert (encoder.embed(wav) - random_encoder.embed(wav)).abs().max() <= error

    # written on a GPU; the table once, as safetensors keeps it; a weight norm's new names
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    state = dict(ckpt["model"])
    del state["encoder.layers.1.self_attn.relative_attention_bias.weight"]
    for name, number in (("weight_g", 0), ("weight_v", 1)):
        value = state.pop(f"encoder.pos_conv.0.{name}")
        state[f"encoder.pos_conv.0.parametrizations.weight.original{number}"] = value
    torch.save(ckpt | dict(model=state), path)
    assert torch.equal(load(path).embed(wav), random_encoder.embed(wav))

def espnet_files(encoder, head, path):
    """Yield (file, config.yaml, its classes) in the layouts of ESPnet."""
    ckpt = exported(encoder, path, espnet=True)
    names, cfg, conf = ["a", "b", "c"], ckpt["cfg"] | dict(decoder_layers=2), dict(model_conf={})
    conf["encoder_conf"] = dict(beats_config=cfg)
    whole = with_prefix("encoder.", ckpt["model"])
    classes = with_prefix("decoder.linear_out.", head.state_dict())
    predictor = {"decoder.mask_token": torch.zeros(2), "decoder.decoder_blocks.0.fc1.weight": torch.zeros(2)}
    yield dict(cfg=cfg, model=ckpt["model"]), None, None
    yield whole | predictor, conf, None                                 # of a trainer
    yield dict(module=whole | predictor), conf, None                    # DeepSpeed
    yield dict(state_dict=with_prefix("model.", whole | predictor)), conf, None
    yield dict(cfg=cfg, model=whole | classes, token_list=names + ["<unk>"]), None, names
    yield whole | classes, conf, ["0", "1", "2"]
    yield whole | classes, conf | dict(token_list=names), names

def test_files_of_espnet(random_encoder, tmp_path, capsys):
    path, wav, head = tmp_path / "x.pt", torch.randn(1, 8000), torch.nn.Linear(32, 3)
    for file, conf, labels in espnet_files(random_encoder, head, path):
        torch.save(file, path)
        (tmp_path / "config.json").write_text(json.dumps(conf))
        made = load(path, cfg=tmp_path / "config.json" if conf else None)
        assert torch.equal(made.embed(wav), random_encoder.embed(wav))
        if labels:
            expect = head(random_encoder.features(wav)[0]).mean(1)
            assert torch.allclose(made.logits(wav), expect, atol=1e-5)
            assert made.labels == labels
            assert not made.multilabel                                  # as ESPnet has it
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert re.match(rf"{path}: .*15.41663, 6.55582.* for ESPnet's say fbank=\(15.29130, 5.90532\)", said)
    conf |= dict(model_conf=dict(classification_type="multi-label"))
    conf["encoder_conf"] |= dict(fbank_mean=15.29130, fbank_std=5.90532)
    made = load(path, cfg=conf)
    assert made.multilabel
    assert made.encoder.cfg == dataclasses.replace(MICRO, fbank_mean=15.29130, fbank_std=5.90532)

def test_what_a_file_does_not_say_is_said_and_can_be_given(random_encoder, tmp_path, capsys, monkeypatch):
    path, table = tmp_path / "x.pt", tmp_path / "shape.yaml"
    torch.save(random_encoder.state_dict(), path)
    expect = dict(dropout=0.1, attention_dropout=0.1, max_distance=800)     # weights do not show them
    assert load(path).cfg == dataclasses.replace(MICRO, **expect)
    assert re.fullmatch(rf"{path}: max_distance 800, .*15.41663, 6.55582 .*\n", capsys.readouterr().err)
    monkeypatch.setattr(common, "rank", lambda: 1)
    load(path)
    assert capsys.readouterr().err == ""

    assert load(path, cfg="micro").cfg == MICRO
    statistics = dict(fbank_mean=2.0, fbank_std=3.0)
    assert load(path, cfg="micro", fbank=(2.0, 3.0)).cfg == dataclasses.replace(MICRO, **statistics)
    shape = dataclasses.asdict(MICRO) | statistics
    torch.save(dict(kind="encoder", encoder=shape, model=random_encoder.state_dict()), path)
    assert load(path, cfg="micro").cfg == dataclasses.replace(MICRO, **statistics)      # a preset is a shape
    torch.save(random_encoder.state_dict(), path)
    theirs = exported(random_encoder, tmp_path / "y.pt")["cfg"]
    assert load(path, cfg=theirs).cfg == MICRO
    table.write_text("max_distance: 77\ndropout: 0.2\n")
    try:
        import yaml                                                         # noqa: F401
        assert load(path, cfg=str(table)).cfg.max_distance == 77
    except ImportError:
        with pytest.raises(CheckpointError, match=f"{table}: .*pip install pyyaml"):
            load(path, cfg=table)
    for cfg, message in (
            ("tiny", "dim is 192 by the configuration, 32 by the weights"), ("x", "a preset"),
            (3, "cfg is a int"), (dict(heads=4), "heads is 4 by"), (dict(head=4), "head is no setting"),
            ("x.json", "No such file"), (theirs | dict(deep_norm=False), "deep_norm=False is not")):
        with pytest.raises(CheckpointError, match=message):
            load(path, cfg=cfg)
    for fbank in ((1.0,), (1.0, 0.0), (1.0, -1.0), (math.nan, 1.0), ("a", 1.0), 3):
        with pytest.raises(CheckpointError, match=str(path)):
            load(path, fbank=fbank)

def test_of_several_models_in_a_file_one_is_taken_and_said(random_encoder, tmp_path, capsys):
    path, wav = tmp_path / "x.pt", torch.randn(1, 8000)
    state, other = random_encoder.state_dict(), Encoder(MICRO).state_dict()
    torch.save(dict(ema=other, model=state, head=dict(w=torch.zeros(2))), path)
    assert torch.equal(load(path, cfg="micro").embed(wav), random_encoder.embed(wav))
    assert "under model are taken, not those under ema" in capsys.readouterr().err
    torch.save(with_prefix("encoder.", state) | dict(probe=torch.zeros(2)), path)
    load(path, cfg="micro")
    assert "1 weights beside the encoder, probe the first, are left out" in capsys.readouterr().err
    torch.save(with_prefix("teacher.", other) | with_prefix("student.", state), path)
    with pytest.raises(CheckpointError, match="several models, named student., teacher."):
        load(path)

# ---- files that are not what they should be

@pytest.mark.parametrize("part, change, message", [
    ("model", {"encoder.layers.1.fc2.bias": None}, "encoder.layers.1.fc2.bias.*missing"),
    ("model", {"extra": torch.zeros(1)}, "unknown keys, extra"),
    ("model", {"quantize.embedding.weight": torch.zeros(2, 2)}, "is a tokenizer"),
    ("model", {"raw2fbank_pad.weight": torch.zeros(1, 1, 400)}, "raw2fbank_pad.weight is not all ones"),
    ("model", {"encoder.layers.0.self_attn.k_proj.bias": torch.zeros(3)}, "q_proj.bias is unlike"),
    ("model", {"encoder.layers.0.self_attn.relative_attention_bias.weight": torch.ones(32, 4)}, "is unlike"),
    ("model", {"layer_norm.bias": torch.full((32,), math.nan)}, "layer_norm.bias: holds NaN"),
    ("cfg", {"layer_norm_first": True}, "layer_norm_first=True is not supported"),
    ("cfg", {"encoder_layers": 10**9}, "layers is 1000000000 by the configuration, 2 by the weights"),
    ("cfg", {"dropout": -0.1}, "dropout is -0.1, below 0"),
    ("cfg", {"encoder_layerdrop": 1.5}, "layerdrop is 1.5, a share above 1"),
    ("cfg", {"max_distance": "far"}, "max_distance is 'far', not a number"),
    ("cfg", {"max_distance": 8}, "32 buckets do not fit distances up to 8"),
    ("cfg", {"fbank_mean": 1.0}, "one of fbank_mean, fbank_std")])
def test_bad_official_files_are_named(golden, tmp_path, part, change, message):
    ckpt = dict(golden["encoder"]["checkpoint"])
    ckpt[part] = {key: value for key, value in (ckpt[part] | change).items() if value is not None}
    torch.save(ckpt, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'bad.pt'}: .*{message}.*$"):
        load(tmp_path / "bad.pt")

def test_configurations_that_no_encoder_has():
    for change in (dict(heads=5), dict(layers=0), dict(dim=32.0), dict(ffn=True), dict(dropout=2),
                   dict(buckets=4), dict(fbank_std=0.0), dict(fbank_mean=math.inf), dict(grad_decay="1")):
        with pytest.raises(UserError, match=next(iter(change))):
            dataclasses.replace(MICRO, **change)

def zip_of_text(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")

OTHER_FILES = {
    "empty": b"",
    "text": b"hello",
    "a web page": b"\n <!DOCTYPE html><html></html>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
    "safetensors": b"\x40\0\0\0\0\0\0\0{\"a\":{}}",
    "a compressed file": b"\x1f\x8b\x08\0\0",
    "zip file": zip_of_text,
    "a sound": b"RIFF....WAVE",
    "Python objects .model.Encoder.": lambda path: torch.save(Encoder(MICRO), path),
    "Python objects .numpy": lambda path: torch.save(dict(best=np.float64(1.0)), path),
    "holds a Tensor": lambda path: torch.save(torch.zeros(2), path),
    "an optimizer without": lambda path: torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}}, path),
    "wav2vec": lambda path: torch.save({"model": {"feature_extractor.conv_layers.0": torch.zeros(2)}}, path),
    "its weights are fc.weight": lambda path: torch.save({"fc.weight": torch.zeros(2)}, path),
    "holds no weights": lambda path: torch.save(dict(cfg={}), path),
    "a folder": Path.mkdir,
    "a folder or a device": os.mkfifo,
    "no such checkpoint": lambda path: None
}

@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path, kind):
    path, write = tmp_path / "x.pt", OTHER_FILES[kind]
    path.write_bytes(write) if isinstance(write, bytes) else write(path)
    message = "not a readable checkpoint" if kind == "text" else kind
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}[^\n]*$"):
        load(path)

def test_a_damaged_file_is_refused_wherever_the_damage_is(random_encoder, tmp_path):
    path, chance = tmp_path / "x.pt", np.random.default_rng(0)
    export_official(random_encoder, path)
    whole, expect, refused = path.read_bytes(), random_encoder.state_dict(), 0
    for number in range(60):
        damaged = bytearray(whole)
        damaged[chance.integers(len(whole))] ^= 1 << number % 8
        path.write_bytes(damaged if number < 50 else whole[:chance.integers(len(whole))])
        try:
            torch.testing.assert_close(load(path).state_dict(), expect, rtol=0, atol=0)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 50                                 # all, but for a few bytes between the weights

def test_a_checkpoint_without_checksums_is_read(random_encoder, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        export_official(random_encoder, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert isinstance(load(tmp_path / "x.pt"), Encoder)

@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux")
def test_what_is_loaded_does_not_live_in_the_file(random_encoder, tmp_path):
    export_official(random_encoder, tmp_path / "x.pt")
    held = common.read_checkpoint(tmp_path / "x.pt")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert held["model"]

def test_moments_that_are_not_finite_are_refused(tmp_path):
    for moment in (1.0, math.inf):
        state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.full((2,), moment)}}}
        torch.save(dict(model={}, optimizer=state), tmp_path / "x.pt")
        if moment == 1:
            common.read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'x.pt'}: optimizer state 0 exp_avg: holds NaN"):
        common.read_checkpoint(tmp_path / "x.pt")

@pytest.fixture
def checkpoints(random_encoder, distilled, official):
    """A file of each kind, as dicts."""
    shape, classifier = dataclasses.asdict(MICRO), Classifier(random_encoder, ["a", "b"])
    mam = MaskedAudioModel(random_encoder, codes=50, blocks=1)
    classes = dict(labels=["a", "b"], multilabel=True)
    released = [torch.load(official(kind), weights_only=True) for kind in ("finetuned", "tokenizer")]
    return [*released, distilled.state(), RandomProjectionTokenizer(64).state(),
            dict(kind="mam", encoder=shape, model=mam.state_dict()),
            dict(kind="classifier", encoder=shape, model=classifier.state_dict(), **classes)]

NONSENSE = [None, "x", -1, 10**9, math.nan, [], {}, torch.zeros(0), torch.zeros(3)]
DAMAGES = [lambda x: x[:1], lambda x: x[None], lambda x: x.T, lambda x: x * math.nan, lambda x: x.to("meta"),
           lambda x: x.long(), lambda x: x.to_sparse(), lambda x: x.double() * 1e300 + 1e300]

def mutations(ckpt, chance):
    """Yield changed copies of a checkpoint: a field missing, too many, or of nonsense; a weight damaged."""
    for key, value in ckpt.items():
        yield {other: ckpt[other] for other in ckpt if other != key}
        yield ckpt | {key: chance.choice(NONSENSE)}
        if isinstance(value, dict):
            field = chance.choice(list(value))
            yield ckpt | {key: {other: value[other] for other in value if other != field}}
            yield ckpt | {key: value | {field: chance.choice(NONSENSE)}}
            yield ckpt | {key: value | {"encoder.layers.1000000000.new": chance.choice(NONSENSE)}}
    for damage in DAMAGES:
        name = chance.choice(list(ckpt["model"]))
        yield ckpt | dict(model=ckpt["model"] | {name: damage(ckpt["model"][name])})

@pytest.mark.filterwarnings("ignore")
def test_an_edited_checkpoint_is_a_model_or_one_clear_line(checkpoints, tmp_path):
    path, chance, refused, loaded = tmp_path / "edited.pt", random.Random(0), 0, 0
    for ckpt in checkpoints:
        for edited in mutations(ckpt, chance):
            torch.save(edited, path)
            try:
                made = chance.choice([load_any, load, load_encoder, load_official, load_tokenizer])(path)
                assert all(value.isfinite().all() for value in made.state_dict().values())
                loaded += 1
            except CheckpointError as error:
                assert re.match(rf"{path}: .+$", str(error))
                refused += 1
    assert refused > 100
    assert loaded > 5

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_becomes_onnx(random_encoder, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(export_program(random_encoder), f=tmp_path / "x.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    for n in (5360, 6160, 20000):       # frames that fill whole rows of patches, and not
        wav, lengths = 0.1 * torch.randn(2, n), torch.tensor([n, n - 2000])
        inputs = {given.name: x.numpy() for given, x in zip(session.get_inputs(), (wav, lengths))}
        x, valid = map(torch.from_numpy, session.run(None, inputs))
        with torch.no_grad():
            expect, real = random_encoder.features(wav, lengths)
        assert torch.equal(valid, real)
        assert (x - expect)[real].abs().max() < 1e-4
