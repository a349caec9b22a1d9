"""The full set of golden files of the official code (20 MB, in no repository), where BEATS_GOLDEN says."""
import os
from pathlib import Path

import pytest
import torch

from audio import MEL_FILTERS, WINDOW, fbank, patchify, valid_tokens
from model import Classifier, encoder_to_official, load, load_official, relative_bucket
from test_audio import error_in_power
from tokenizer import load_tokenizer

FOLDER = Path(os.environ.get("BEATS_GOLDEN", "nowhere"))
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not FOLDER.is_dir(), reason="BEATS_GOLDEN is no folder")]
CASES = ["single_1s", "batch_2s", "padded_2s", "readme_10000", "min_16frames", "short_27frames_padded",
         "ten_seconds"]

def read(name):
    return torch.load(FOLDER / name, weights_only=True)

def valid_of(name):
    wav, mask = read("inputs.pt")[name]["wav"], read("inputs.pt")[name]["mask"]
    return None if mask is None else valid_tokens((~mask).sum(1), wav.shape[1], "official")

def kaldi(golden):
    return golden["fbank"] * (2 * 6.55582) + 15.41663

def assert_close(ours, theirs, limit=1e-4):
    assert (ours - theirs).abs().max() < limit

def test_front_end():
    assert_close(WINDOW, read("frontend.pt")["povey_window"], 1e-7)
    assert_close(MEL_FILTERS.T, read("frontend.pt")["mel_banks"], 2e-5)

@pytest.mark.parametrize("name", CASES)
def test_fbank(name):
    wav, golden = read("inputs.pt")[name]["wav"], read("tiny_encoder.golden.pt")[name]
    assert error_in_power(fbank(wav), kaldi(golden)) < 3e-5

@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_encoder_layer_by_layer(name):
    golden, encoder = read("tiny_encoder.golden.pt")[name], load_official(FOLDER / "tiny_encoder.ckpt.pt")
    patches, valid = patchify(golden["fbank"]), valid_of(name)
    states = encoder(patches, valid, all_layers=True)
    assert_close(states[0], golden["encoder_in"])
    assert_close(states[-1], golden["out"])
    for ours, theirs in zip(reversed(states), reversed(golden["layers"])):
        assert_close(ours, theirs)

@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_classifier(name):
    golden = read("tiny_finetuned.golden.pt")[name]
    classifier = load_official(FOLDER / "tiny_finetuned.ckpt.pt")
    logits = classifier(patchify(golden["fbank"]), valid_of(name))
    assert_close(logits.sigmoid(), golden["out"], 1e-5)

@pytest.mark.parametrize("name", CASES)
def test_tokenizer(name):
    golden = read("tiny_tokenizer.golden.pt")[name]
    tokenizer = load_tokenizer(FOLDER / "tiny_tokenizer.ckpt.pt")
    assert torch.equal(tokenizer.codes(kaldi(golden), valid_of(name)), golden["labels_bt"])

@pytest.mark.parametrize("name", ["batch_2s", "padded_2s"])
@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_gradients(name, decay):
    golden = read("tiny_encoder.grads.pt")[name, decay]
    encoder = load_official(FOLDER / "tiny_encoder.ckpt.pt")
    encoder.cfg.grad_decay = decay
    out = encoder(patchify(read("tiny_encoder.golden.pt")[name]["fbank"]), valid_of(name))
    loss = (out * golden["loss_weight"]).sum() / out.numel()**0.5
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-4)
    for parameter in encoder.parameters():
        parameter.data = parameter.grad                 # so that gradients come under the official names
    ours = encoder_to_official(encoder)[1]
    for name, theirs in golden["grads"].items():
        assert (ours[name] - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name

@torch.no_grad()
def test_files_of_espnet(tmp_path):
    files = read("espnet_files.pt")
    wav, lengths = files["inputs"]["wav"], files["inputs"]["lengths"]
    configured = ("trainer_state_dict", "finetuned_state_dict", "deepspeed", "lightning")
    for name in ("encoder", "finetuned", *configured):
        torch.save(files[name], tmp_path / "x.pt")
        cfg = files["trainer_config"] if name in configured else None
        for statistics, fbank in (("audioset_statistics", None), ("espnet_statistics", (15.29130, 5.90532))):
            model = load(tmp_path / "x.pt", cfg=cfg, fbank=fbank)
            x, valid = model.features(wav, lengths)
            assert_close(x[valid], files["expected"]["features"][statistics][valid])
        assert isinstance(model, Classifier) == ("finetuned" in name)
        if name == "finetuned":
            assert model.labels == files["finetuned"]["token_list"][:-1]    # the last is <unk>
    torch.save(files["tokenizer"], tmp_path / "x.pt")
    codes = load_tokenizer(tmp_path / "x.pt", fbank=(15.29130, 5.90532)).encode(wav, lengths)
    assert torch.equal(codes[codes >= 0], files["expected"]["codes"][codes >= 0])

def test_buckets_and_masks():
    for (buckets, far), golden in read("rel_buckets.pt").items():
        assert torch.equal(relative_bucket(golden["relative_position"], buckets, far), golden["bucket"])
    for n, golden in read("padding_masks.pt").items():
        assert torch.equal(valid_tokens(golden["valid_samples"], n, "official"), ~golden["token_mask"]), n
