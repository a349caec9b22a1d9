"""Both tokenizers, the codebook, and how a teacher is distilled into codes."""
import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import tokenizer
import train_tokenizer
from audio import fbank, patchify
from common import CheckpointError, UserError
from conftest import MICRO, ROOT, save_classifier
from model import Classifier, Encoder, export_official, load
from tokenizer import (Codebook, RandomProjectionTokenizer, SelfDistilledTokenizer, code_use, count_codes,
                       export_official_tokenizer, load_tokenizer, whitening)

def unit_vectors(*shape):
    return F.normalize(torch.randn(shape), dim=-1)

@pytest.fixture
def projection():
    torch.manual_seed(0)
    return fitted(0.1 * torch.randn(8, 16000), 16000, n_codes=64)

def fitted(wav, samples, **options):
    batches = [(half, torch.full((len(half),), samples)) for half in wav.chunk(2)]
    return RandomProjectionTokenizer(**options).fit_(batches)

def state_of(module):
    return torch.cat([value.flatten() for value in module.state_dict().values()])

# ---- files

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_codes_equal_the_official_ones(golden, official, case):
    wav, mask = golden["inputs"][case]["wav"], golden["inputs"][case]["mask"]
    lengths = None if mask is None else (~mask).sum(1)
    codes = load_tokenizer(official("tokenizer")).encode(wav, lengths, padding="official")
    valid = codes >= 0
    assert valid.any(1).all()
    assert torch.equal(codes[valid], golden["tokenizer"]["expected"][case]["labels"][valid])

def test_export_gives_back_the_official_file(official, tmp_path):
    released, back = official("tokenizer"), tmp_path / "back.pt"
    export_official_tokenizer(load_tokenizer(released), back)
    before, after = (torch.load(path, weights_only=True) for path in (released, back))
    assert before["cfg"] == after["cfg"]
    for name in ("embed_avg", "cluster_size"):      # the official code does not read them
        del before["model"][f"quantize.embedding.{name}"], after["model"][f"quantize.embedding.{name}"]
    torch.testing.assert_close(after["model"], before["model"], rtol=0, atol=0)

def test_a_file_of_the_wrong_kind_is_named_as_what_it_is(official, projection, tmp_path):
    for kind, message in (("finetuned", "a fine-tuned classifier"), ("encoder", "an encoder")):
        with pytest.raises(CheckpointError, match=f"{kind}.pt: .* {message}, not a tokenizer"):
            load_tokenizer(official(kind))
    torch.save(projection.state(), tmp_path / "p.pt")
    for path in (official("tokenizer"), tmp_path / "p.pt"):
        with pytest.raises(CheckpointError, match=f"{path}: this file is a tokenizer.*load_tokenizer"):
            load(path)

@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod.", "model.tokenizer."])
def test_tokenizers_are_found_below_any_names_and_in_any_nest(distilled, projection, prefix, tmp_path):
    path, wav = tmp_path / "x.pt", 0.1 * torch.randn(8, 16000)
    for made in (distilled, projection, fitted(wav, 16000, n_codes=64, projection="plain")):
        state = {prefix + name: value for name, value in made.state()["model"].items()}
        for file in (made.state() | dict(model=state), {"state_dict": state, "epoch": 3}):
            torch.save(file, path)
            back = load_tokenizer(path, cfg=dataclasses.asdict(MICRO))
            if "seed" in made.config:
                back.config["seed"] = made.config["seed"]                   # weights do not show it
            assert back.id() == made.id()                                   # a hash of all that it is

def test_tokenizers_of_espnet_and_statistics_of_the_filter_bank(distilled, tmp_path, capsys):
    path, wav = tmp_path / "x.pt", 0.1 * torch.randn(2, 16000)
    for statistics in ({}, dict(fbank_mean=14.6, fbank_std=5.625)):
        distilled.encoder.cfg = dataclasses.replace(MICRO, **statistics)
        for espnet in (False, True):
            export_official_tokenizer(distilled, path, espnet=espnet)
            assert torch.equal(load_tokenizer(path).encode(wav), distilled.encode(wav))
            said = capsys.readouterr().err
            assert ("for ESPnet's say fbank=(15.29130, 5.90532)" in said) == (espnet and not statistics)
    assert load_tokenizer(path, fbank=(1.0, 2.0)).encoder.cfg.fbank_std == 2.0

@pytest.mark.parametrize("change, message", [
    (dict(n_codes=10**9), "n_codes is 1000000000 by the configuration, 32 by the weights"),
    (dict(estimator_blocks=10**9), "estimator_blocks is 1000000000 by"),
    (dict(code_dim=7), "code_dim is 7 by"),
    (dict(target_width=33), "target_width is 33 by"), (dict(new=1), "'new'")])
def test_an_edited_tokenizer_is_named_before_memory_is_asked_for(distilled, tmp_path, change, message):
    state = distilled.state()
    torch.save(state | dict(tokenizer=state["tokenizer"] | change), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'x.pt'}: .*{message}"):
        load_tokenizer(tmp_path / "x.pt")

def test_a_codebook_that_was_never_made_is_refused(official, tmp_path):
    ckpt = torch.load(official("tokenizer"), weights_only=True)
    ckpt["model"]["quantize.embedding.initted"] = torch.zeros(1)
    torch.save(ckpt, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="its codebook was never initialised"):
        load_tokenizer(tmp_path / "x.pt")

def test_our_files_come_back_as_they_were(distilled, projection, tmp_path):
    for made in (distilled, projection):
        torch.save(made.state(), tmp_path / "tokenizer.pt")
        assert load_tokenizer(tmp_path / "tokenizer.pt").id() == made.id()      # a hash of all that it is

# ---- codebook

def test_codebook_steps_equal_the_official_ones():
    golden = torch.load(ROOT / "tests/golden_quantizer.pt", weights_only=True)
    codebook = Codebook(24, 8)
    codebook.start_(golden["steps"][0]["z"].flatten(0, 1), centres=golden["kmeans_first_perm"])
    for i, step in enumerate(golden["steps"]):
        if i:       # a dead code is planted between two of the steps
            codebook.weight.copy_(step["state_before"]["embedding.weight"])
        vectors, codes, commitment = codebook(step["z"])
        assert torch.equal(codes.flatten(), step["idx"])
        assert torch.allclose(vectors, step["z_q"], atol=1e-6)
        assert torch.allclose(commitment.mean() / 8, step["loss"], atol=1e-7)       # theirs: over width, too
        if step["mode"] == "train":
            codebook.update_(step["z"].flatten(0, 1), codes.flatten(), step["idx"] >= 0)
            assert torch.allclose(codebook.cluster_size, step["state_after"]["cluster_size"], atol=1e-5)
        assert torch.allclose(codebook.weight, step["state_after"]["embedding.weight"], atol=1e-6)

def test_a_code_that_nothing_chooses_is_put_to_use_and_stays():
    torch.manual_seed(0)
    codebook, z, everything = Codebook(4, 8), unit_vectors(200, 8), torch.ones(200, dtype=torch.bool)
    codebook.start_(z, per_step=200)
    for step in range(1, 251):
        likeness = z @ codebook.weight.T
        if step <= 230:
            likeness[:, 2] = -9
        codebook.update_(z, likeness.argmax(1), everything)
        average = codebook.cluster_size.mean()
        revived = codebook.revive_(z, everything, threshold=0.1)
        assert revived == (step == 230)                                     # 0.99^229 > 0.1 > 0.99^230
        if revived:                 # it counts as used like others, so that the next step leaves it alone
            assert codebook.cluster_size[2] == average
            assert codebook.revive_(z, everything, threshold=0.1) == 0
    assert (codebook(z)[1] == 2).any()

def test_padding_and_silence_do_not_move_the_codebook():
    torch.manual_seed(0)
    start, z, use = unit_vectors(16, 8), unit_vectors(60, 8), torch.arange(60) % 3 == 0
    masked, only = Codebook(16, 8), Codebook(16, 8)
    for codebook, rows in ((masked, slice(None)), (only, use)):
        codebook.start_(start, centres=torch.arange(16), iterations=0)
        codebook.update_(z[rows], codebook(z[rows])[1], use[rows])
    assert torch.allclose(state_of(masked), state_of(only))

    # nor do codes that start anew land there, or anywhere in a step of nothing but silence
    masked.cluster_size.copy_(torch.tensor([20.0] + 15 * [1e-6]))
    assert masked.revive_(z, torch.zeros(60, dtype=torch.bool), threshold=0.5) == 0
    assert masked.revive_(z, use, threshold=0.5) == 15
    assert (masked.weight[1:] @ z[use].T).max(1).values.min() > 0.999

def test_gradients_go_straight_through_the_codes_and_change_none(distilled):
    seen, before = [], state_of(distilled)
    distilled.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    predicted, _, codes, _ = distilled.train()(torch.randn(1, 16, 256))
    assert torch.allclose(seen[0], distilled.vectors()[codes], atol=1e-6)   # the estimator is fed codes
    predicted.square().sum().backward()
    for parameter in distilled.parameters():                            # and the encoder learns through
        assert parameter.grad.any()
    assert torch.equal(state_of(distilled), before)

class Signs(torch.nn.Module):
    """Another quantizer: the signs of a few numbers (lookup-free quantization, Yu et al. 2023)."""
    def __init__(self, n_codes, dim):
        super().__init__()
    def forward(self, z):
        signs = torch.where(z > 0, 1.0, -1.0)
        codes = ((z > 0) * 2**torch.arange(z.shape[-1])).sum(-1)
        return z + (signs - z).detach(), codes, (z - signs).square().sum(-1)
    def start_(self, *args, **kwargs):      # there is nothing to start, to follow, to revive
        return 0
    update_ = revive_ = start_

def test_another_quantizer_is_one_class(toy, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "Codebook", Signs)
    assert distil(toy, teacher, tmp_path, codes=64, code_dim=6)["valid_codes_used"] > 1
    made, wav = load_tokenizer(tmp_path / "tokenizer_iter2.pt"), sounds_of(toy, 1)
    signs = made.before_codebook(*made.encoder.patches(wav)) > 0
    assert torch.equal(made.encode(wav), (signs * 2**torch.arange(6)).sum(-1))

# ---- codes of sounds

def sounds_of(pack, count):
    return torch.stack([data.Pack(pack).wav(i) for i in range(count)])

@pytest.mark.parametrize("kind", ["distilled", "projection"])
def test_codes_depend_on_the_clip_alone(kind, request):
    """In any batch, with any padding, whatever was encoded before."""
    made, lengths = request.getfixturevalue(kind), torch.tensor([16000, 2800, 9000, 12345, 1000])
    clips, before, chance = [0.1 * torch.randn(n) for n in lengths], state_of(made), torch.get_rng_state()
    alone = [made.encode(clip[None])[0] for clip in clips]
    assert min(codes.min() for codes in alone) >= 0
    for order, n, junk in (([0, 1, 2, 3, 4], 16000, 0.0), ([4, 2, 0], 20000, 0.0), ([3, 3, 1], 12777, 9.0)):
        wav = torch.stack([F.pad(clips[i], (0, n - len(clips[i])), value=junk) for i in order])
        for codes, i in zip(made.encode(wav, lengths[order]), order):
            assert torch.equal(codes, F.pad(alone[i], (0, len(codes) - len(alone[i])), value=-1))
    assert torch.equal(state_of(made), before)
    assert torch.equal(torch.get_rng_state(), chance)

@pytest.mark.parametrize("projection, dim", [("smooth", 8), ("plain", 256)])
def test_projection_codes_equal_a_naive_search(toy, projection, dim):
    wav = sounds_of(toy, 20)
    made = fitted(wav, 48000, projection=projection)
    assert made.codebook.shape == (1024, dim)
    patches, codes = patchify((fbank(wav[:1]) - made.bin_mean) / made.bin_std)[0], made.encode(wav[:1])[0]
    for t in range(0, 48, 7):
        z = (patches[t] @ made.filters - made.mean) @ made.whiten
        z = z / z.norm() if projection == "smooth" else z               # equation 1 normalises nothing
        assert codes[t] == (z - made.codebook).norm(dim=-1).argmin()

def test_a_plain_projection_uses_its_codes(toy):
    wav = sounds_of(toy, 40)
    made = fitted(wav, 48000, projection="plain")
    assert len(made.encode(wav).unique()) > 300
    features = fbank(wav)
    normalised = (features - made.bin_mean) / made.bin_std      # as for an encoder
    assert (normalised.mean().item(), normalised.std().item()) == pytest.approx((0, 0.5), abs=0.01)

def test_a_smooth_projection_standardises_each_mel_bin():
    """On sound whose bins differ in spread; whitening would hide it if they were standardised as one."""
    torch.manual_seed(0)
    wav = 0.01 * torch.randn(4, 32400).cumsum(1)
    frames = fbank(wav)[:, :192].flatten(0, 1).double()                     # of 12 rows
    made = fitted(wav, 32400)
    assert torch.allclose(made.bin_mean.double(), frames.mean(0), rtol=1e-3)
    assert torch.allclose(made.bin_std.double(), frames.std(0).clamp(min=0.1), rtol=1e-3)

def test_projections_are_white_and_a_function_of_their_seed(toy):
    wav = sounds_of(toy, 40)
    made = fitted(wav, 48000, seed=3)
    assert torch.equal(made.filters, RandomProjectionTokenizer(seed=3).filters)
    z = (made.project(fbank(wav)) - made.mean) @ made.whiten
    assert torch.allclose(torch.cov(z.flatten(0, 1).T), torch.eye(8), atol=1e-3)
    assert z.mean((0, 1)).abs().max() < 1e-3
    assert len(made.encode(wav).unique()) > 700

def test_silence_and_padding_do_not_count_in_the_statistics(toy):
    wav = sounds_of(toy, 20)[:, :16000]
    plain, padded = fitted(wav, 16000), fitted(F.pad(wav, (0, 8000), value=0.3), 16000)
    assert torch.allclose(state_of(plain), state_of(padded), atol=1e-4)
    ending = F.pad(wav, (0, 12000))         # six rows are sound, the seventh in part, the rest is silence
    assert torch.allclose(fitted(ending, 28000).bin_mean, fbank(ending)[:, :112].mean((0, 1)), atol=1e-4)
    with pytest.raises(UserError, match="digital silence"):
        fitted(torch.zeros(2, 16000), 16000)

def test_use_of_codes_in_closed_form():
    codes = torch.tensor([[0, 2] + 6 * [-1] + [1, 2] + 6 * [-1]])       # two rows of which two bands sound
    counts = count_codes(codes, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 0, 2, 0]] + 6 * [[0, 0, 0, 0]]
    use = code_use(counts)
    assert use["codes_used"] == 3
    assert use["perplexity"] == pytest.approx(np.exp(1.5 * np.log(2)))
    assert use["entropy_given_band"] == pytest.approx(0.5 * np.log(2))

# ---- distillation

@pytest.fixture
def teacher(tmp_path, random_encoder):
    """The path of a pre-trained encoder."""
    export_official(random_encoder, tmp_path / "teacher.pt")
    return str(tmp_path / "teacher.pt")

def distil(pack, teacher, out, **flags):
    small = dict(codes=64, code_dim=16, estimator_blocks=1, batch_seconds=20.0, max_steps=1, log_every=2)
    return train_tokenizer.main(data=pack, teacher=teacher, out_dir=str(out), device="cpu", **small | flags)

def batch_of(pack, count):
    batch = dict(wav=32768 * sounds_of(pack, count), lengths=torch.full((count,), 48000))
    return data.to_device(batch | dict(noise=torch.rand(count, 144)), torch.device("cpu"))

def test_whitening_keeps_the_large_components():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    x = torch.randn(5000, 32) @ (torch.tensor([9.0, 4, 2, 1] + 28 * [0.01])[:, None] * rotation) + 7
    for least, kept in ((1, 2), (32, 32)):                                  # 81 + 16 of 102: two suffice
        mean, matrix = whitening(x, share=0.95, least=least)
        expect = torch.diag((torch.arange(32) < kept).float())
        assert torch.allclose(torch.cov(((x - mean) @ matrix).T), expect, atol=1e-2)

def test_a_quantize_layer_that_starts_white_hardly_bends(distilled):
    torch.manual_seed(0)
    x = torch.randn(5000, 32) @ torch.randn(32, 32) + 5
    distilled.whiten_(x)
    mean, matrix = whitening(x)
    due, z = ((x - mean) @ matrix)[:, :8], distilled.quantize_layer(x)
    small = due.abs() < 1
    assert (z - due)[small].abs().max() < 0.04                  # tanh(0.3) / 0.3 = 0.971

def test_a_padded_clip_has_the_predictions_it_has_alone(distilled):
    patches, valid = torch.randn(2, 48, 256), torch.arange(48) < torch.tensor([[48], [24]])
    predicted, alone = distilled(patches, valid)[0][1, :24], distilled(patches[1:, :24])[0][0]
    assert torch.allclose(predicted, alone, atol=1e-5)

def test_the_tokenizer_hears_by_its_own_statistics_and_the_teacher_by_its_own(random_encoder, distilled, toy):
    wav, lengths = sounds_of(toy, 2), torch.tensor([48000, 20000])
    wav[1, 20000:] = 0
    batch = data.to_device(dict(wav=32768 * wav, lengths=lengths), torch.device("cpu"))
    distilled.encoder.cfg = dataclasses.replace(MICRO, fbank_mean=9.0, fbank_std=2.0)
    cfg = train_tokenizer.Config(dtype="float32")
    inputs, target, _ = train_tokenizer.prepare(batch, distilled, random_encoder, cfg)
    assert torch.equal(inputs["patches"], distilled.encoder.patches(wav)[0])
    for clip, n, taught in zip(wav, lengths, target):           # as alone, without padding
        due = random_encoder.features(clip[None, :n])[0][0]
        assert torch.allclose(taught[:len(due)], due, atol=1e-5)

def test_what_a_teacher_teaches(random_encoder, toy):
    batch, cfg = batch_of(toy, 2), train_tokenizer.Config(dtype="float32")
    _, first, last = random_encoder.features(batch["wav"], layer="all")[0]
    classifier = Classifier(random_encoder, ["a", "b", "c"]).eval()
    for teacher, cfg.teacher_layers, expect in (
            (random_encoder, "last", last), (random_encoder, "mean", (first + last) / 2),
            (classifier, "last", classifier.head(last))):
        made = SelfDistilledTokenizer(Encoder(MICRO), 16, 8, 1, teacher.teach_width)
        made.target_mean.normal_()
        made.target_map.normal_()
        target = train_tokenizer.prepare(batch, made, teacher, cfg)[1]
        assert torch.allclose(target, (expect - made.target_mean) @ made.target_map, atol=1e-4)

def test_the_loss_of_distillation_in_closed_form(distilled):
    torch.manual_seed(0)
    valid = torch.arange(48) < torch.tensor([[48], [24]])
    inputs, target = dict(patches=torch.randn(2, 48, 256), valid=valid), torch.randn(2, 48, 32) + 1
    with torch.no_grad():
        sums = train_tokenizer.losses(distilled, inputs, target, valid, beta=0.5)[0]
        predicted, vectors = distilled(**inputs)[0], distilled.before_codebook(**inputs)
    cosine = commitment = 0.0
    for x, y, z in zip(predicted[valid], target[valid], vectors[valid]):
        cosine += (x @ y / x.norm() / y.norm()).item()
        commitment += (z / z.norm() - distilled.vectors()).square().sum(1).min().item()
    due = dict(cosine=cosine, commitment=commitment, loss=72 - cosine + 0.5 * commitment, count=72)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(due, rel=1e-4)

@pytest.mark.parametrize("dtype, share", [(torch.half, 0.95), (torch.bfloat16, 0.9), (torch.double, 0.99)])
def test_a_tokenizer_of_another_precision_gives_nearly_the_same_codes(distilled, projection, dtype, share):
    wav, lengths = 0.1 * torch.randn(4, 48000), torch.tensor([48000, 20000, 48000, 48000])
    for made in (distilled, projection):
        codes, before = made.encode(wav, lengths), made.id()
        assert (made.to(dtype).encode(wav, lengths) == codes).float().mean() > share
        assert (made.id() == before) == (dtype == torch.double)

def test_codes_are_looked_up_in_float32_also_in_mixed_precision(projection):
    torch.manual_seed(0)
    codebook, z, features = Codebook(500, 8), torch.randn(4, 1000, 8), torch.randn(4, 160, 128)
    codebook.start_(unit_vectors(500, 8), iterations=0)
    plain = codebook(z), projection.codes(features)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = codebook(z), projection.codes(features)
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)

def test_targets_and_losses_are_float32_also_in_mixed_precision(random_encoder, distilled, toy):
    batch, cfg = batch_of(toy, 2), train_tokenizer.Config(dtype="bfloat16")
    inputs, target, _ = train_tokenizer.prepare(batch, distilled, random_encoder, cfg)
    assert target.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predicted = distilled(**inputs)[0]
        sums = train_tokenizer.losses(distilled, inputs, target, batch["valid"], beta=0.0)[0]
    expect = (1 - F.cosine_similarity(predicted.double(), target.double(), dim=-1)).sum()
    assert sums["loss"].item() == pytest.approx(expect.item(), rel=2e-6)

@pytest.mark.parametrize("targets, other", [("whiten", "raw"), ("centre", "raw"), ("raw", "centre")])
def test_targets_of_distillation(targets, other, toy, teacher, tmp_path):
    distil(toy, teacher, tmp_path, targets=targets)
    made, encoder = load_tokenizer(tmp_path / "tokenizer_iter2.pt"), load(teacher)
    target = made.target(encoder.features(sounds_of(toy, 80))[0]).detach().flatten(0, 1)
    assert (target.mean(0).abs().max() < 0.2) == (targets != "raw")
    spread = torch.cov(target.T).diagonal()
    assert ((spread[spread > 0.1] - 1).abs().max() < 0.2) == (targets == "whiten")
    with pytest.raises(UserError, match="begun with another --targets"):
        train_tokenizer.main(out_dir=str(tmp_path), resume=True, targets=other, max_steps=2)

def test_distillation_goes_on_with_the_same_teacher_only(toy, random_encoder, tmp_path):
    path = tmp_path / "teacher.pt"
    for scale in (1, 0.9):
        state = {name: scale * weight for name, weight in random_encoder.state_dict().items()}
        torch.save(dict(kind="encoder", encoder=dataclasses.asdict(random_encoder.cfg), model=state), path)
        if scale == 1:
            distil(toy, str(path), tmp_path)
            distil(toy, str(path), tmp_path, resume=True, max_steps=2)
    with pytest.raises(UserError, match="iter2.pt was begun with another teacher than .*teacher.pt"):
        distil(toy, str(path), tmp_path, resume=True, max_steps=3)

def test_disturbed_clips_are_louder_or_softer_and_mixed_with_themselves_backwards():
    torch.manual_seed(0)
    lengths, chance = torch.randint(2000, 3001, (400,)), torch.rand(400, 3)
    wav = torch.randn(400, 3000) * (torch.arange(3000) < lengths[:, None])
    heard = train_tokenizer.disturb(wav, lengths, chance, share=0.25)
    for clip, disturbed, n, (which, gain, snr) in zip(wav, heard, lengths, chance.tolist()):
        expect = clip[:n]
        if which < 0.25:
            expect = 10**((20 * gain - 10) / 20) * (clip[:n] + 10**(-20 * snr / 20) * clip[:n].flip(0))
        assert torch.allclose(disturbed[:n], expect, atol=1e-5)

def test_the_teacher_hears_clean_what_is_disturbed(random_encoder, distilled, toy, teacher, tmp_path):
    batch, cfg = batch_of(toy, 2), train_tokenizer.Config()
    clean = train_tokenizer.prepare(batch, distilled, random_encoder, cfg)
    noisy = train_tokenizer.prepare(batch, distilled, random_encoder, cfg, disturbed=1.0)
    assert (clean[0]["patches"] - noisy[0]["patches"]).abs().mean() > 0.01
    assert torch.equal(clean[1], noisy[1])
    assert distil(toy, teacher, tmp_path, disturb=1.0) != distil(toy, teacher, tmp_path)     # the flag counts

    # validation is clean: hardly anything is learned here
    still = dict(lr=1e-12, decay=0.999999, revive=0.0, dtype="float32")
    noisy, clean = [distil(toy, teacher, tmp_path, disturb=share, **still) for share in (1.0, 0.0)]
    assert noisy["valid_commitment"] == pytest.approx(clean["valid_commitment"], rel=1e-3)

def test_flags_that_make_no_sense_are_refused(toy, teacher, tmp_path, random_encoder):
    with pytest.raises(UserError, match="--disturb 20.0: a share"):
        distil(toy, teacher, tmp_path, disturb=20.0)
    save_classifier(random_encoder, tmp_path / "c.pt", ["a"])
    with pytest.raises(UserError, match="--teacher_layers mean is for pre-trained teachers"):
        distil(toy, str(tmp_path / "c.pt"), tmp_path, teacher_layers="mean")

def test_validation_and_a_loud_warning_on_collapse(toy, teacher, tmp_path, capsys):
    result = distil(toy, teacher, tmp_path, preset="sl", max_steps=4)
    assert load_tokenizer(tmp_path / "tokenizer_iter2.pt").encoder.cfg.dropout == 0.1   # the paper's value
    assert result["valid_codes_used"] + result["valid_dead_codes"] == 64
    assert "collaps" not in capsys.readouterr().out
    distil(toy, teacher, tmp_path, max_steps=12, warmup_steps=2, lr=1.0, revive=0.0)        # absurd
    assert re.search(r"WARNING: the codebook is collapsing.*--lr", capsys.readouterr().out)
