"""The full set of golden files, where the environment variable BEATS_GOLDEN names their folder (20 MB, not in the repository)."""
import os
from pathlib import Path

import pytest
import torch

import model
from model import MIN_SAMPLES, fbank, load_official, patchify, relative_bucket, valid_tokens
from official import encoder_to_official
from test_model import power
from tokenizer import load_tokenizer

FOLDER = Path(os.environ.get("BEATS_GOLDEN", "nowhere"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="BEATS_GOLDEN does not name the folder of the golden files")
CASES = ["single_1s", "batch_2s", "padded_2s", "readme_10000", "min_16frames", "short_27frames_padded", "ten_seconds"]

def read(name):
    return torch.load(FOLDER / name, weights_only=True)

@pytest.fixture(scope="module")
def inputs():
    return read("inputs.pt")

def valid_of(case):
    wav, mask = case["wav"], case["mask"]
    return None if mask is None else valid_tokens((~mask).sum(1), wav.shape[1], "official")

def test_front_end():
    golden = read("frontend.pt")
    assert (model.WINDOW - golden["povey_window"]).abs().max() < 1e-7
    banks = torch.zeros(128, 256)
    for band, (low, high, bank) in enumerate(model.MEL_BANKS):
        banks[16 * band:16 * band + 16, low:high] = bank.T
    assert (banks - golden["mel_banks"]).abs().max() < 2e-5

@pytest.mark.parametrize("name", CASES)
def test_fbank(inputs, name):
    # float32 FFTs of different processors differ: by 0.3 in log where a bin is 100 dB below the frame's peak. In power they agree
    golden, ours = read("tiny_encoder.golden.pt")[name], fbank(inputs[name]["wav"])
    theirs = golden["fbank"] * (2 * 6.55582) + 15.41663
    assert ((power(ours) - power(theirs)).abs() / power(theirs).amax(-1, keepdim=True)).max() < 3e-5

@pytest.mark.parametrize("name", CASES)
def test_encoder_layer_by_layer(inputs, name):
    golden, encoder, valid = (read("tiny_encoder.golden.pt")[name], load_official(FOLDER / "tiny_encoder.ckpt.pt"),
                              valid_of(inputs[name]))
    if valid is not None:
        assert torch.equal(~valid, golden["mask_tokens"])
    with torch.no_grad():
        patches = patchify(golden["fbank"])
        states = encoder(patches, valid, all_layers=True)
        close = lambda ours, theirs, limit=1e-4: (ours - theirs).abs().max() < limit
        assert close(states[0], golden["encoder_in"]) and close(states[-1], golden["out"])
        assert all(close(ours, theirs) for ours, theirs in zip(states[-len(golden["layers"]):], golden["layers"]))
        if "gates" in golden:
            assert close(encoder.patch(patches), golden["patch_conv"].flatten(2).transpose(1, 2))
            assert close(encoder.ln_patch(encoder.patch(patches)), golden["patch_ln"])
            assert close(encoder.conv_position(golden["pos_conv_in"]), golden["pos_conv"])
            assert close(encoder.position_bias(patches.shape[1])[0], golden["position_bias"], 1e-6)
            for block, x, gate, out in zip(encoder.blocks, [golden["encoder_in"], *golden["layers"]], golden["gates"],
                                           golden["attn_out"]):
                q = block.attn.qkv(x).chunk(3, dim=-1)[0].unflatten(-1, (encoder.cfg.heads, -1)).transpose(1, 2)
                u, r = block.attn.gate(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
                assert close(u * (r * block.attn.gate_scale[:, None] - 1) + 2, gate)
                key_bias = model.key_padding_bias(valid)
                assert close(block.attn(x, encoder.position_bias(x.shape[1]), key_bias), out)

@pytest.mark.parametrize("name", CASES)
def test_classifier(inputs, name):
    golden, classifier = read("tiny_finetuned.golden.pt")[name], load_official(FOLDER / "tiny_finetuned.ckpt.pt")
    with torch.no_grad():
        assert (classifier(patchify(golden["fbank"]), valid_of(inputs[name])).sigmoid() - golden["out"]).abs().max() < 1e-5

@pytest.mark.parametrize("name", CASES)
def test_tokenizer(inputs, name):
    golden, tok = read("tiny_tokenizer.golden.pt")[name], load_tokenizer(FOLDER / "tiny_tokenizer.ckpt.pt")
    labels = tok.codes(golden["fbank"] * (2 * 6.55582) + 15.41663, valid_of(inputs[name]))
    assert torch.equal(labels, golden["labels_bt"])

@pytest.mark.parametrize("name", ["batch_2s", "padded_2s"])
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_gradients(inputs, name, ratio):
    golden, encoder = read("tiny_encoder.grads.pt")[name, ratio], load_official(FOLDER / "tiny_encoder.ckpt.pt")
    encoder.cfg.grad_decay = ratio
    out = encoder(patchify(read("tiny_encoder.golden.pt")[name]["fbank"]), valid_of(inputs[name]))
    loss = (out * golden["loss_weight"]).sum() / out.numel()**0.5
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-4)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(p.grad)
    ours = encoder_to_official(encoder)[1]        # gradients under the official names
    for key, theirs in golden["grads"].items():
        assert (ours[key] - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, key

def test_buckets_and_masks():
    for (buckets, far), golden in read("rel_buckets.pt").items():
        assert torch.equal(relative_bucket(golden["relative_position"], buckets, far), golden["bucket"])
    for n, golden in read("padding_masks.pt").items():
        assert torch.equal(valid_tokens(golden["valid_samples"], n, "official"), ~golden["token_mask"]), n
    assert MIN_SAMPLES == 2800
