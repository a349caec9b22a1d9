"""Random projection, codebook, self-distilled tokenizer, the token cache."""
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import tokenizer
import train_mam
import train_tokenizer
from conftest import MICRO, ROOT
from model import PRESETS, CheckpointError, Classifier, Encoder, fbank, load, load_official, patchify, valid_tokens
from tokenizer import (Codebook, RandomProjectionTokenizer, SelfDistilledTokenizer, cached_tokens, code_use, export_official_tokenizer,
                       is_silent, load_tokenizer, token_id, moments, whitening)

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_labels_equal_the_official_ones(golden, official, case):
    tok, wav, mask = load_tokenizer(official("tokenizer")), golden["inputs"][case]["wav"], golden["inputs"][case]["mask"]
    valid = None if mask is None else valid_tokens((~mask).sum(1), wav.shape[1], "official")
    features = golden["encoder"]["expected"][case]["fbank"] * (2 * 6.55582) + 15.41663
    labels = tok.codes(features, valid)
    assert torch.equal(labels, golden["tokenizer"]["expected"][case]["labels"])
    again = tok.encode(wav, None if mask is None else (~mask).sum(1), padding="official")
    assert torch.equal(again[again >= 0], labels[again >= 0])

def test_export_gives_back_the_official_file(official, tmp_path):
    before = torch.load(official("tokenizer"), weights_only=True)
    export_official_tokenizer(load_tokenizer(official("tokenizer")), tmp_path / "back.pt")
    after = torch.load(tmp_path / "back.pt", weights_only=True)
    assert before["model"].keys() == after["model"].keys() and before["cfg"] == after["cfg"]
    assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())

def test_files_of_the_wrong_kind_are_named_as_what_they_are(official):
    with pytest.raises(CheckpointError, match="is an encoder, not a tokenizer"):
        load_tokenizer(official("encoder"))
    with pytest.raises(CheckpointError, match="is a fine-tuned classifier"):
        load_tokenizer(official("finetuned"))
    with pytest.raises(CheckpointError, match="is a tokenizer"):
        load_official(official("tokenizer"))

# ---- codebook

def test_codebook_steps_equal_the_official_ones():
    golden = torch.load(Path(__file__).parent / "golden_quantizer.pt", weights_only=True)
    codebook = Codebook(24, 8)
    for i, step in enumerate(golden["steps"]):
        z = F.normalize(step["z"], dim=-1)
        flat = z.flatten(0, 1)
        if i == 0:
            codebook.kmeans_start_(flat, start=golden["kmeans_first_perm"])
        else:       # a dead code is planted between two of the steps
            codebook.weight.copy_(step["state_before"]["embedding.weight"])
        codes = codebook.nearest(z)
        assert torch.equal(codes.flatten(), step["idx"])
        assert torch.allclose(codebook.weight[codes], step["z_q"], atol=1e-6)
        assert torch.allclose((z - codebook.weight[codes]).square().mean(), step["loss"], atol=1e-7)     # the official mean
        if step["mode"] == "train":
            codebook.update_(flat, codes.flatten(), torch.ones(len(flat), dtype=torch.bool))
            assert torch.allclose(codebook.cluster_size, step["state_after"]["cluster_size"], atol=1e-5)
        assert torch.allclose(codebook.weight, step["state_after"]["embedding.weight"], atol=1e-6)

def test_kmeans_finds_planted_clusters():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(8, 16), dim=-1)
    z = F.normalize(centres.repeat(100, 1) + 0.05 * torch.randn(800, 16), dim=-1)
    codebook = Codebook(8, 16)
    codebook.kmeans_start_(z, start=torch.arange(8))
    assert (codebook.weight @ centres.T).max(0).values.min() > 0.99

def test_a_dead_code_is_put_to_use_and_stays():
    torch.manual_seed(0)
    codebook, everything = Codebook(4, 8), torch.ones(200, dtype=torch.bool)
    z = F.normalize(torch.randn(200, 8), dim=-1)
    codebook.weight.copy_(F.normalize(torch.randn(4, 8), dim=-1))
    codebook.weight[2] = 0                                                  # a code that nothing chooses
    revived, steps = 0, 0
    while not revived:
        codes = (z @ codebook.weight.T)
        codes[:, 2] = -9
        revived, steps = codebook.update_(z, codes.argmax(-1), everything, revive=0.1), steps + 1
    assert 150 < steps < 300                                                # 0.99^229 = 0.1
    assert (z @ codebook.weight[2]).max() > 0.999                           # it is one of the vectors
    for _ in range(20):
        assert codebook.update_(z, codebook.nearest(z), everything, revive=0.1) == 0
    assert (codebook.nearest(z) == 2).any()

def test_padding_and_silence_do_not_move_the_codebook():
    """Neither averages, nor sizes, nor the vectors that dead codes are put on."""
    torch.manual_seed(0)
    start, z = F.normalize(torch.randn(16, 8), dim=-1), F.normalize(torch.randn(60, 8), dim=-1)
    use = torch.arange(60) % 3 == 0
    some, only = Codebook(16, 8), Codebook(16, 8)
    for codebook, rows in ((some, slice(None)), (only, use)):
        codebook.weight.copy_(start)
        codebook.update_(z[rows], codebook.nearest(z[rows]), use[rows])
    assert torch.allclose(some.weight, only.weight) and torch.equal(some.cluster_size, only.cluster_size)
    some.cluster_size.fill_(1e-6)
    some.cluster_size[0] = 20
    assert some.update_(z, torch.zeros(60, dtype=torch.long), use, revive=0.5) == 15             # all but code 0
    found = some.weight[1:] @ z.T
    assert (found.max(1).values > 0.999).all() and use[found.argmax(1)].all()
    assert len(found.argmax(1).unique()) == 15                                                   # each its own
    some.cluster_size[1:] = 1e-6
    few = torch.arange(60) < 5
    assert some.update_(z, torch.zeros(60, dtype=torch.long), few, revive=0.5) == 5              # no more than there are vectors

def test_looking_up_changes_nothing():
    torch.manual_seed(0)
    tok = SelfDistilledTokenizer(Encoder(MICRO), 16, 8, 1, 32)
    tok.codebook.kmeans_start_(F.normalize(torch.randn(100, 8), dim=-1))
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    tok.train()(torch.randn(1, 16, 256), torch.ones(1, 16, dtype=torch.bool))
    tok.eval().encode(torch.randn(1, 8000))
    assert all(torch.equal(v, before[k]) for k, v in tok.state_dict().items())

def test_straight_through():
    torch.manual_seed(0)
    tok = SelfDistilledTokenizer(Encoder(MICRO), 16, 8, 1, 32)
    tok.codebook.kmeans_start_(F.normalize(torch.randn(100, 8), dim=-1))
    seen = []
    tok.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    z, codes, prediction = tok(torch.randn(1, 16, 256), torch.ones(1, 16, dtype=torch.bool))
    assert torch.allclose(seen[0], tok.codebook.weight[codes], atol=1e-6)   # the estimator is fed codes
    prediction.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tok.parameters())       # and the encoder learns through them

# ---- lengths

def tokenizers():
    torch.manual_seed(0)
    distilled = SelfDistilledTokenizer(Encoder(MICRO), 32, 8, 0).eval()
    distilled.codebook.kmeans_start_(F.normalize(torch.randn(500, 8), dim=-1))
    projection = RandomProjectionTokenizer(64)
    projection.fit_([(0.1 * torch.randn(8, 16000), torch.full((8,), 16000))])
    return distilled, projection

@pytest.mark.parametrize("tok", tokenizers(), ids=["distilled", "projection"])
def test_a_padded_clip_gives_the_tokens_it_gives_alone(tok):
    lengths = torch.tensor([16000, 2800, 9000])
    clips = [0.1 * torch.randn(n) for n in lengths]
    wav = torch.stack([F.pad(c, (0, 16000 - len(c))) for c in clips])
    codes = tok.encode(wav, lengths)
    for i, clip in enumerate(clips):
        alone = tok.encode(clip[None])[0]
        assert torch.equal(codes[i, :len(alone)], alone) and (codes[i, len(alone):] == -1).all() and (alone >= 0).all()

def test_tokens_from_the_command_line(official, write_wav, tmp_path, capsys):
    x = 0.1 * np.random.default_rng(0).standard_normal(16000 * 12)
    tokenizer.main([str(official("tokenizer")), str(write_wav("a.wav", x)), "--out", str(tmp_path / "tokens"), "--device", "cpu"])
    codes, tok = np.load(tmp_path / "tokens/a.npy"), load_tokenizer(official("tokenizer"))
    wav = torch.from_numpy(data.read_audio(tmp_path / "a.wav"))
    assert np.array_equal(codes, torch.cat([tok.encode(wav[None, :160000])[0], tok.encode(wav[None, 160000:])[0]]).numpy())

# ---- random projection

def test_projection_labels_equal_a_naive_search(toy):
    pack = data.Pack(toy)
    wav = torch.from_numpy(np.stack([pack.audio(i) for i in range(20)]) / np.float32(32768))
    for smooth in (True, False):
        tok = RandomProjectionTokenizer(smooth=smooth).fit_([(wav, torch.full((20,), 48000))])
        patches = patchify((fbank(wav[:1]) - tok.bin_mean) / tok.bin_std)[0]
        for t in range(0, 48, 7):
            z = (patches[t] @ tok.filters - tok.mean) @ tok.whiten
            expect = (z / z.norm() - tok.codebook).norm(dim=-1).argmin()
            assert tok.encode(wav[:1])[0, t] == expect

def test_projection_statistics(toy):
    pack = data.Pack(toy)
    wav = torch.from_numpy(np.stack([pack.audio(i) for i in range(40)]) / np.float32(32768))
    tok = RandomProjectionTokenizer().fit_([(wav[:20], torch.full((20,), 48000)), (wav[20:], torch.full((20,), 48000))])
    z = (tok.project(fbank(wav)) - tok.mean) @ tok.whiten
    assert torch.allclose(torch.cov(z.flatten(0, 1).T), torch.eye(8), atol=1e-3) and z.mean((0, 1)).abs().max() < 1e-3
    assert code_use(torch.bincount(tok.encode(wav).flatten(), minlength=1024)[None])["codes_used"] > 700

def test_projection_has_its_own_seed():
    torch.manual_seed(1)
    a = RandomProjectionTokenizer(seed=3)
    state = torch.get_rng_state()
    b = RandomProjectionTokenizer(seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.filters, b.filters) and not torch.equal(a.filters, RandomProjectionTokenizer(seed=4).filters)

def test_silence_and_padding_do_not_count_in_the_statistics(toy):
    pack = data.Pack(toy)
    wav = torch.from_numpy(np.stack([pack.audio(i)[:16000] for i in range(20)]) / np.float32(32768))
    plain = RandomProjectionTokenizer().fit_([(wav, torch.full((20,), 16000))])
    padded = RandomProjectionTokenizer().fit_([(F.pad(wav, (0, 8000), value=0.3), torch.full((20,), 16000))])
    assert torch.allclose(plain.bin_mean, padded.bin_mean) and torch.allclose(plain.whiten, padded.whiten, atol=1e-4)
    features = fbank(F.pad(wav, (0, 12000)))            # rows 0-5 are sound, the seventh is partly so, the rest is silence
    silent = RandomProjectionTokenizer().fit_([(F.pad(wav, (0, 12000)), torch.full((20,), 28000))])
    assert is_silent(features)[:, 56:].all() and not is_silent(features)[:, :56].any()
    assert torch.allclose(silent.bin_mean, features[:, :112].mean((0, 1)), atol=1e-4)

def test_digital_silence_cannot_be_fitted():
    with pytest.raises(ValueError, match="digital silence"):
        RandomProjectionTokenizer().fit_([(torch.zeros(2, 16000), torch.tensor([16000, 16000]))])

# ---- use of codes, cache

def test_code_use_closed_form():
    use = code_use(torch.tensor([[10, 10, 0, 0], [0, 0, 20, 0]]))
    assert use["codes_used"] == 3 and use["perplexity"] == pytest.approx(np.exp(1.5 * np.log(2)))
    assert use["entropy_given_band"] == pytest.approx(0.5 * np.log(2))

@pytest.fixture
def pack(ragged, tmp_path):
    shutil.copytree(ragged, tmp_path / "pack")
    return data.Pack(tmp_path / "pack")

def test_token_cache(pack):
    tok = tokenizers()[0]
    tokens, offsets = cached_tokens(tok, pack, torch.device("cpu"))
    for i in (0, 5, 23):
        alone = tok.encode(torch.from_numpy(pack.audio(i) / np.float32(32768))[None])[0]
        tokens.read_into(kept := np.empty(len(alone), "<u2"), offsets[i])
        assert np.array_equal(kept, alone.numpy())
    files = lambda: sorted(p.name for p in pack.path.glob("tokens-*"))
    first = files()
    tok.encode = None                                                       # not asked again
    cached_tokens(tok, pack, torch.device("cpu"))
    assert files() == first and len(first) == 1 and first[0].endswith(".bin")

def test_tokens_of_another_tokenizer_or_sound_are_not_used(pack, tmp_path):
    tok = tokenizers()[0]
    before = token_id(tok, pack)
    for p in (tok.encoder.blocks[0].fc1.bias.data[:1], tok.codebook.weight[:1]):    # one weight, one code
        p += 1e-3
        assert token_id(tok, pack) != before
        p -= 1e-3
    tok.encoder.cfg.fbank_mean += 1e-4                                              # statistics
    assert token_id(tok, pack) != before
    tok.encoder.cfg.fbank_mean -= 1e-4
    rows = [dict(path=f"{i}", labels=[], split="", group="") for i in range(24)]
    for change in (0, 1 / 32768):                                                   # one sample of one clip
        read = lambda row: (pack.audio(int(row["path"])) / np.float32(32768) + np.float32(change) * (row["path"] == "7")
                            * np.eye(1, pack.samples[int(row["path"])], 99, np.float32)[0])
        other = data.write_pack(tmp_path / f"copy{change}", rows, read)
        assert (token_id(tok, other) == token_id(tok, data.Pack(tmp_path / "copy0"))) == (change == 0)

def test_half_written_tokens_are_finished_not_trusted(pack):
    tok = tokenizers()[0]
    tokens, offsets = cached_tokens(tok, pack, torch.device("cpu"))
    path = Path(tokens.path)
    whole = np.fromfile(path, "<u2")
    half = whole.copy()
    half[offsets[3]:offsets[9]] = 65535                                     # never reached
    half[offsets[12] + 5:offsets[13]] = 65535                               # cut in the middle of a clip
    path.unlink()
    half.tofile(path.with_suffix(".partial"))
    asked, encode = [], tok.encode
    tok.encode = lambda wav, lengths: asked.append(len(wav)) or encode(wav, lengths)
    cached_tokens(tok, pack, torch.device("cpu"))
    assert sum(asked) == 7 and np.array_equal(np.fromfile(path, "<u2"), whole) and not list(path.parent.glob("*.partial"))

def test_two_jobs_at_the_same_tokens(pack):
    tok, other = tokenizers()[0], []
    encode = tok.encode
    def encode_beside(wav, lengths):            # another job begins, and finishes, in the middle of this one
        if not other:
            other.append(True)
            cached_tokens(tok, data.Pack(pack.path), torch.device("cpu"))
        return encode(wav, lengths)
    tok.encode = encode_beside
    tokens, offsets = cached_tokens(tok, pack, torch.device("cpu"))
    mine = np.fromfile(tokens.path, "<u2")
    Path(tokens.path).unlink()
    assert other and np.array_equal(mine, np.fromfile(cached_tokens(tok, pack, torch.device("cpu"))[0].path, "<u2"))
    assert [p.suffix for p in pack.path.glob("tokens-*")] == [".bin"]

def test_a_token_file_of_the_wrong_size_is_refused(pack):
    tok = tokenizers()[0]
    path = cached_tokens(tok, pack, torch.device("cpu"))[0].path
    Path(path).write_bytes(b"00")
    with pytest.raises(ValueError, match="2 bytes instead of"):
        cached_tokens(tok, pack, torch.device("cpu"))

# ---- encoding is pure

@pytest.mark.parametrize("tok", tokenizers(), ids=["distilled", "projection"])
def test_encoding_is_pure(tok):
    """The same tokens in any batch, with any padding, whatever was encoded before; nothing changes, no chance is drawn."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([16000, 2800, 9000, 12345, 1000])
    clips = [0.1 * torch.randn(n, generator=generator) for n in lengths]
    state, chance = {k: v.clone() for k, v in tok.state_dict().items()}, torch.get_rng_state()
    alone = [tok.encode(clip[None])[0] for clip in clips]
    for order, padding, junk in (([0, 1, 2, 3, 4], 0, 0.0), ([4, 2, 0], 4000, 0.0), ([3, 3, 1], 777, 9.0)):
        n = max(int(lengths[i]) for i in order) + padding
        wav = torch.stack([F.pad(clips[i], (0, n - len(clips[i])), value=junk) for i in order])
        for codes, i in zip(tok.encode(wav, lengths[order]), order):
            assert torch.equal(codes[:len(alone[i])], alone[i]) and (codes[len(alone[i]):] == -1).all()
    assert all(torch.equal(v, state[k]) for k, v in tok.state_dict().items()) and torch.equal(torch.get_rng_state(), chance)

@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_tokens():
    torch.manual_seed(0)
    tok = SelfDistilledTokenizer(Encoder(dataclasses.replace(MICRO, layers=1)), 32, 8, 0).eval()
    tok.codebook.kmeans_start_(F.normalize(torch.randn(500, 8), dim=-1))
    wav, lengths = 0.1 * torch.randn(3, 16000), torch.tensor([16000, 2800, 9000])
    before = tok.encode(wav, lengths)
    tok.encoder.compile()
    assert torch.equal(tok.encode(wav, lengths), before)

# ---- distillation

def test_whitening():
    torch.manual_seed(0)
    x = torch.randn(5000, 12) @ torch.diag(torch.tensor([9.0, 4, 2, 1] + [0.01] * 8)) @ torch.linalg.qr(torch.randn(12, 12))[0] + 7
    mean, matrix = whitening(*moments(x), share=0.95, least=1)
    assert torch.allclose(mean, x.mean(0), atol=1e-4)
    # 81 + 16 of 102: two suffice
    assert torch.allclose(torch.cov(((x - mean) @ matrix).T), torch.diag(torch.tensor([1.0, 1] + [0.0] * 10)), atol=1e-2)
    # few: all of them
    assert torch.allclose(torch.cov(((x - mean) @ whitening(*moments(x), share=0.95)[1]).T), torch.eye(12), atol=1e-2)
    # nothing: nothing
    assert whitening(*moments(torch.zeros(0, 3)))[1].abs().max() == 0

def test_a_tokenizer_starts_as_k_means_of_whitened_features():
    torch.manual_seed(0)
    clusters, centres = torch.randint(16, (4000,)), F.normalize(torch.randn(16, 8), dim=-1)
    x = (torch.cat([30 * torch.randn(4000, 1), centres[clusters] + 0.02 * torch.randn(4000, 8)], 1)
         @ torch.linalg.qr(torch.randn(32, 32))[0][:9] + 3)
    purity = {}
    for whiten in (True, False):
        tok = SelfDistilledTokenizer(Encoder(MICRO), 48, 64, 1, 32)         # a code or more for each cluster
        tok.start_(x, whiten)
        codes = tok.codebook.nearest(F.normalize(tok.quantize_layer(x), dim=-1))
        together = torch.zeros(48, 16).index_put_((codes, clusters), torch.ones(4000), accumulate=True)
        purity[whiten] = together.max(1).values.sum() / 4000
        assert torch.allclose(tok.codebook.weight.norm(dim=-1), torch.ones(48), atol=1e-5)
    assert purity[True] > 0.8 and purity[False] < 0.4           # a loud direction that says nothing does not hide the clusters

def test_targets_are_float32_also_in_mixed_precision(random_encoder):
    torch.manual_seed(0)
    tok = SelfDistilledTokenizer(random_encoder, 16, 8, 1, 32).eval()
    tok.codebook.kmeans_start_(F.normalize(torch.randn(50, 8), dim=-1))
    tok.target_map.copy_(torch.randn(32, 32))
    patches, valid, target = torch.randn(2, 16, 256), torch.ones(2, 16, dtype=torch.bool), torch.randn(2, 16, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predicted = tok(patches, valid)[2]
        distance = train_tokenizer.losses(tok, patches, valid, target)[0]
    assert distance == pytest.approx(
        (1 - F.cosine_similarity(predicted.float(), target @ tok.target_map, dim=-1)).sum().item(), rel=2e-6)

@pytest.mark.parametrize("targets", ["whiten", "centre", "raw"])
def test_targets_of_distillation(targets, toy, teacher, tmp_path):
    train_tokenizer.main(data=toy, teacher=teacher, out_dir=str(tmp_path), targets=targets, max_steps=1, **DISTIL)
    tok, encoder = load_tokenizer(tmp_path / "tokenizer_iter2.pt"), load(teacher)
    pack = data.Pack(toy)
    x = torch.cat([encoder.features(torch.from_numpy(pack.audio(i)[None] / np.float32(32768)))[0][0]
                   for i in range(len(pack))]).detach()
    y = (x - tok.target_mean) @ tok.target_map
    other = "raw" if targets == "centre" else "centre"
    with pytest.raises(common.UserError, match=f"was begun with --targets {targets}"):
        train_tokenizer.main(out_dir=str(tmp_path), resume=True, targets=other, max_steps=2)
    assert (y.mean(0).abs().max() < 0.2) == (targets != "raw")
    spread = torch.cov(y.T).diagonal()
    assert (abs(spread[spread > 0.1] - 1).max() < 0.2) == (targets == "whiten")


DISTIL = dict(codes=64, code_dim=16, estimator_blocks=1, batch_seconds=20.0, warmup_steps=2, log_every=2, device="cpu")

@pytest.fixture
def teacher(tmp_path, random_encoder):
    """A checkpoint of a pre-trained encoder, in tmp_path."""
    model = {f"encoder.{k}": v for k, v in random_encoder.state_dict().items()}
    torch.save(dict(kind="mam", encoder=dataclasses.asdict(MICRO), model=model), tmp_path / "mam_iter1.pt")
    return str(tmp_path / "mam_iter1.pt")

def test_presets_are_the_papers_table(toy, teacher, tmp_path):
    paper = dict(max_steps=400_000, warmup_steps=32_000, weight_decay=0.01, dropout=0.1, batch_seconds=1400.0)
    for preset, lr in (("ssl", 5e-5), ("sl", 5e-4)):
        assert dataclasses.asdict(train_tokenizer.Config(**train_tokenizer.TABLE_4[preset])).items() >= (paper | dict(lr=lr)).items()
    train_tokenizer.main(data=toy, teacher=teacher, out_dir=str(tmp_path), preset="sl",      # flags typed go before the preset
                         **{k: v for k, v in DISTIL.items() if k != "warmup_steps"}, max_steps=1)
    ckpt = torch.load(tmp_path / "tokenizer_iter2.pt", weights_only=True)
    assert ckpt["config"].items() >= dict(lr=5e-4, warmup_steps=32_000, max_steps=1, batch_seconds=20.0).items()
    assert ckpt["encoder"]["dropout"] == ckpt["encoder"]["attention_dropout"] == 0.1
    train_tokenizer.main(out_dir=str(tmp_path), resume=True, max_steps=2)                    # and stay in a resumed run
    assert torch.load(tmp_path / "tokenizer_iter2.pt", weights_only=True)["config"]["lr"] == 5e-4

def test_what_a_teacher_teaches(random_encoder, toy):
    torch.manual_seed(0)
    wav = torch.from_numpy(data.Pack(toy).audio(0)[None] / np.float32(32768))
    batch = dict(wav=wav, lengths=torch.tensor([48000]))
    states = random_encoder.features(wav, layer="all")[0]
    classifier = Classifier(random_encoder, ["a", "b", "c"]).eval()
    for teacher, layers, expect in ((random_encoder, "last", states[-1]), (random_encoder, "mean", (states[1] + states[2]) / 2),
                                    (classifier, "last", classifier.token_logits(wav)[0])):
        target = train_tokenizer.prepare(batch, Encoder(MICRO), teacher, layers)[2]
        assert torch.allclose(target, expect, atol=1e-5)

def test_the_tokenizer_hears_disturbed_clips_and_the_teacher_clean_ones(random_encoder, toy, teacher, tmp_path):
    """A share of them, 10 dB softer to louder, with themselves played backwards 0 to 20 dB below; padding aside, the same in any batch."""
    torch.manual_seed(0)
    lengths = torch.randint(2000, 3001, (400,))
    wav = torch.randn(400, 3000) * (torch.arange(3000) < lengths[:, None])
    chance = torch.rand(400, 3)
    heard, same = train_tokenizer.disturb(wav, lengths, chance, 0.25), chance[:, 0] >= 0.25
    assert torch.equal(heard[same], wav[same]) and 80 < (~same).sum() < 120
    for i in (~same).nonzero().flatten().tolist():
        x, (_, gain, snr) = wav[i, :lengths[i]], chance[i].tolist()
        expect = 10**((20 * gain - 10) / 20) * (x + 10**(-20 * snr / 20) * x.flip(0))
        assert torch.allclose(heard[i, :lengths[i]], expect, atol=1e-5)

    wav = torch.stack([torch.from_numpy(data.Pack(toy).audio(i) / np.float32(32768)) for i in range(2)])
    batch = dict(wav=wav, lengths=torch.tensor([48000, 48000]), noise=torch.rand(2, 144))
    clean, dirty = (train_tokenizer.prepare(batch, Encoder(MICRO), random_encoder, disturbed=share) for share in (0.0, 1.0))
    assert torch.equal(clean[2], dirty[2]) and torch.equal(clean[3], dirty[3])              # target, silence
    assert (clean[0] - dirty[0]).abs().mean() > 0.01
    with pytest.raises(common.UserError, match="--disturb 20.0: a share"):
        train_tokenizer.main(data=toy, disturb=20.0)
    heads = []
    for share in (0.0, 1.0):                                # the flag reaches the training
        train_tokenizer.main(data=toy, teacher=teacher, out_dir=str(tmp_path / str(share)), disturb=share, **{**DISTIL, "max_steps": 1})
        heads.append(torch.load(tmp_path / str(share) / "tokenizer_iter2.pt", weights_only=True)["optimizer"]["state"][0]["exp_avg"])
    assert not torch.allclose(heads[0], heads[1])

def test_classifiers_have_no_layers_to_choose_from(toy, tmp_path, random_encoder):
    model = Classifier(random_encoder, ["a", "b"])
    torch.save(dict(kind="classifier", encoder=dataclasses.asdict(MICRO), labels=model.labels, multilabel=False,
                    model=model.state_dict()), tmp_path / "c.pt")
    with pytest.raises(common.UserError, match="--teacher_layers mean is for pre-trained teachers"):
        train_tokenizer.main(data=toy, teacher=str(tmp_path / "c.pt"), out_dir=str(tmp_path), teacher_layers="mean", **DISTIL)

def test_validation_and_a_loud_warning_on_collapse(toy, teacher, tmp_path, capsys):
    run = lambda **flags: train_tokenizer.main(data=toy, teacher=teacher, out_dir=str(tmp_path), eval_every=4, **{**DISTIL, **flags})
    result = run(max_steps=4)
    assert "collaps" not in capsys.readouterr().out
    assert (result["valid_codes_used"] + result["valid_dead_codes"] == 64
            and 1 <= result["valid_perplexity"] <= result["valid_codes_used"])
    lines = [json.loads(line) for line in open(tmp_path / "tokenizer_iter2.jsonl")]
    assert all({"cosine", "commitment", "codes_used", "dead_codes", "perplexity"} <= line.keys() for line in lines if "cosine" in line)
    run(max_steps=20, lr=1.0, revive=0.0)                   # absurd, and told within the first lines
    said = capsys.readouterr().out
    assert "WARNING: the codebook is collapsing" in said and "--lr" in said
    assert int(re.search(r"step (\d+) .*\n.*WARNING", said)[1]) <= 12

def test_a_small_tokenizer_labels_for_a_larger_model(ragged, teacher, tmp_path, monkeypatch):
    train_tokenizer.main(data=ragged, teacher=teacher, out_dir=str(tmp_path / "small"), max_steps=2, **DISTIL)
    monkeypatch.setitem(PRESETS, "wide", dataclasses.replace(MICRO, layers=3, dim=64, ffn=128, heads=4))
    labels = str(tmp_path / "small/tokenizer_iter2.pt")
    result = train_mam.main(data=ragged, out_dir=str(tmp_path / "wide"), model="wide", tokenizer=labels, max_steps=3,
                            batch_seconds=20.0, predictor_blocks=1, device="cpu")
    assert result["step"] == 3 and np.isfinite(result["valid_loss"]) and load(tmp_path / "wide/mam_iter1.pt").cfg.dim == 64
    assert not (tmp_path / "wide/tokenizer_iter1.pt").exists()              # no random projection was made
    pack = data.Pack(ragged)
    wav, lengths = data.pad_batch([pack.audio(i) / np.float32(32768) for i in range(24)])
    # the labels are its codes, -1 is none
    assert 1 < result["codes_used"] < len(load_tokenizer(labels).encode(wav, lengths).unique())

@pytest.mark.slow
def test_the_recipe_of_all_iterations_goes_on_where_it_stopped(ragged, tmp_path):
    small = "--batch_seconds 8 --max_steps 2 --warmup_steps 1 --device cpu"
    env = os.environ | dict(OMP_NUM_THREADS="1", OUT=str(tmp_path), MAM=f"{small} --predictor_blocks 1",
                            TOKENIZER=f"{small} --codes 32 --code_dim 8", FINETUNE=small,
                            PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    run = lambda **more: subprocess.run(["runs/iterations.sh", ragged, ragged, "2"], cwd=ROOT, env=env | more,
                                        capture_output=True, text=True, timeout=600)
    broken = run(FINETUNE="--max_steps 0")
    assert broken.returncode and "--max_steps 0: has to be above 0" in broken.stderr and (tmp_path / "mam_iter3.pt").exists()
    ckpt = torch.load(tmp_path / "mam_iter3.pt", weights_only=True)         # as if interrupted after the first of two steps
    torch.save(ckpt | dict(step=1), tmp_path / "mam_iter3.pt")
    first = os.path.getmtime(tmp_path / "mam_iter2.pt")
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is finished") == 5 and "mam_iter3.pt" not in re.findall(r"(\S+) is finished", done.stdout)
    assert re.findall(r"^\+ python (\S+) .*--resume", done.stdout, re.M) == ["train_mam.py"]
    assert os.path.getmtime(tmp_path / "mam_iter2.pt") == first
    for name in ("mam_iter3.pt", "plus/mam_iter3.pt", *(f"finetune_{name}_fold2.pt" for name in ("scratch", "mam_iter2", "mam_iter3plus"))):
        assert torch.load(tmp_path / name, weights_only=True)["step"] == 2
    assert torch.load(tmp_path / "plus/tokenizer_iter3.pt", weights_only=True)["tokenizer"]["target_width"] == 2      # class logits
    report = json.loads((tmp_path / "report.json").read_text())["tokenizers"]
    assert len(report) == 6 and set(re.findall(r"frozen probe of (\S+)", done.stdout)) == {"scratch", *(
        f"{tmp_path}/{name}.pt" for name in ("mam_iter1", "mam_iter2", "mam_iter3", "plus/mam_iter3"))}
    assert [done.stdout.count(f"{ragged}{kind} fold 2: accuracy") for kind in (" linear", "")] == [5, 5]     # the teacher once
