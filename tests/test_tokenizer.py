"""Both tokenizers, the codebook, and how a teacher is distilled into codes."""
import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import start_processes

import data
import tokenizer
import train_mam
import train_tokenizer
from audio import fbank, patchify, valid_tokens
from common import CheckpointError, UserError
from conftest import MICRO, ROOT
from model import Classifier, Encoder, load, load_official
from tokenizer import (Codebook, RandomProjectionTokenizer, SelfDistilledTokenizer, code_use, count_codes,
                       export_official_tokenizer, load_tokenizer, whitening)

def unit_vectors(*shape):
    return F.normalize(torch.randn(shape), dim=-1)

@pytest.fixture
def distilled():
    torch.manual_seed(0)
    made = SelfDistilledTokenizer(Encoder(MICRO), n_codes=32, code_dim=8, estimator_blocks=1, target_width=32)
    made.codebook.start_(unit_vectors(500, 8))
    return made.eval()

@pytest.fixture
def projection():
    torch.manual_seed(0)
    return fitted(0.1 * torch.randn(8, 16000), 16000, n_codes=64)

def fitted(wav, samples, **options):
    return RandomProjectionTokenizer(**options).fit_([(wav, torch.full((len(wav),), samples))])

def state_of(module):
    return torch.cat([value.flatten() for value in module.state_dict().values()])

# ---- files

@pytest.mark.parametrize("case", ["single_1s", "padded_1s"])
def test_codes_equal_the_official_ones(golden, official, case):
    released, expect = load_tokenizer(official("tokenizer")), golden["tokenizer"]["expected"][case]["labels"]
    wav, mask = golden["inputs"][case]["wav"], golden["inputs"][case]["mask"]
    lengths = None if mask is None else (~mask).sum(1)
    valid = None if mask is None else valid_tokens(lengths, wav.shape[1], "official")
    features = golden["encoder"]["expected"][case]["fbank"] * (2 * 6.55582) + 15.41663
    assert torch.equal(released.codes(features, valid), expect)
    codes = released.encode(wav, lengths, padding="official")
    assert torch.equal(codes[codes >= 0], expect[codes >= 0])

def test_export_gives_back_the_official_file(official, tmp_path):
    before = torch.load(official("tokenizer"), weights_only=True)
    export_official_tokenizer(load_tokenizer(official("tokenizer")), tmp_path / "back.pt")
    after = torch.load(tmp_path / "back.pt", weights_only=True)
    assert before["cfg"] == after["cfg"]
    assert before["model"].keys() == after["model"].keys()
    unread = ("quantize.embedding.embed_avg", "quantize.embedding.cluster_size")    # by the official code
    for name, value in before["model"].items():
        assert name in unread or torch.equal(value, after["model"][name]), name

def test_files_of_the_wrong_kind_are_named_as_what_they_are(official):
    for read, kind, message in ((load_tokenizer, "encoder", "is an encoder, not a tokenizer"),
                                (load_tokenizer, "finetuned", "is a fine-tuned classifier"),
                                (load_official, "tokenizer", "is a tokenizer")):
        with pytest.raises(CheckpointError, match=message):
            read(official(kind))

def test_our_files_also_those_whose_stacks_had_no_names(distilled, projection, tmp_path):
    for made in (distilled, projection):
        for no_names in ("", r"(transformer|estimator)\."):
            state = made.state()
            state["model"] = {re.sub(no_names, "", name): value for name, value in state["model"].items()}
            torch.save(state, tmp_path / "tokenizer.pt")
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
        revived = codebook.revive_(z, everything, threshold=0.1)
        assert revived == (step == 230)                                     # 0.99^229 > 0.1 > 0.99^230
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
    before = state_of(masked)
    assert masked.revive_(z, torch.zeros(60, dtype=torch.bool), threshold=0.5) == 0
    assert torch.equal(state_of(masked), before)
    assert masked.revive_(z, use, threshold=0.5) == 15
    assert (masked.weight[1:] @ z[use].T).max(1).values.min() > 0.999

def codebook_steps(z, use):
    codebook = Codebook(16, 8)
    codebook.start_(z, per_step=60, centres=torch.arange(16))
    for _ in range(3):
        codebook.update_(z, codebook(z)[1], use)
    followed = state_of(codebook)
    codebook.cluster_size[::2] = 0
    codebook.revive_(z, use, threshold=0.5)
    return followed, state_of(codebook)

def half_of_the_steps(rank, z, use, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(codebook_steps(z.chunk(2)[rank], use.chunk(2)[rank]), folder / f"{rank}.pt")
    dist.destroy_process_group()

def test_the_codebook_is_the_same_on_all_ranks(tmp_path):
    torch.manual_seed(0)
    z, use = unit_vectors(60, 8), torch.rand(60) < 0.7
    start_processes(half_of_the_steps, (z, use, tmp_path), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.allclose(first[0], codebook_steps(z, use)[0], atol=1e-6)
    assert torch.equal(torch.stack(first), torch.stack(second))

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
        self.register_buffer("powers", 2**torch.arange(dim))

    def forward(self, z):
        signs = torch.where(z > 0, 1.0, -1.0)
        codes = ((z > 0) * self.powers).sum(-1)
        return z + (signs - z).detach(), codes, (z - signs).square().sum(-1)

    def start_(self, *args, **kwargs):
        return 0

    update_ = revive_ = start_              # nothing to start, to follow, to revive

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

@pytest.mark.parametrize("smooth", [True, False])
def test_projection_codes_equal_a_naive_search(toy, smooth):
    wav = sounds_of(toy, 20)
    made = fitted(wav, 48000, smooth=smooth)
    patches, codes = patchify((fbank(wav[:1]) - made.bin_mean) / made.bin_std)[0], made.encode(wav[:1])[0]
    for t in range(0, 48, 7):
        z = (patches[t] @ made.filters - made.mean) @ made.whiten
        assert codes[t] == (z / z.norm() - made.codebook).norm(dim=-1).argmin()

def test_projections_are_white_and_a_function_of_their_seed(toy):
    wav, lengths = sounds_of(toy, 40), torch.full((40,), 48000)
    chance, made = torch.get_rng_state(), RandomProjectionTokenizer(seed=3)
    assert torch.equal(made.filters, RandomProjectionTokenizer(seed=3).filters)
    assert torch.equal(torch.get_rng_state(), chance)
    made.fit_(list(zip(wav.chunk(2), lengths.chunk(2))))
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
    """The path of a checkpoint of a pre-trained encoder."""
    model = {f"encoder.{name}": value for name, value in random_encoder.state_dict().items()}
    torch.save(dict(kind="mam", encoder=dataclasses.asdict(MICRO), model=model), tmp_path / "teacher.pt")
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

    # an untrained tokenizer begins with it, as far as the tanh is straight
    made = SelfDistilledTokenizer(Encoder(MICRO), n_codes=48, code_dim=32, estimator_blocks=0)
    made.whiten_(x)
    assert (made.quantize_layer(x) - (x - mean) @ matrix).abs().mean() < 0.1

def test_what_a_teacher_teaches(random_encoder, toy):
    batch, cfg = batch_of(toy, 2), train_tokenizer.Config(dtype="float32")
    _, first, last = random_encoder.features(batch["wav"], layer="all")[0]
    classifier = Classifier(random_encoder, ["a", "b", "c"]).eval()
    for teacher, cfg.teacher_layers, expect in (
            (random_encoder, "last", last), (random_encoder, "mean", (first + last) / 2),
            (classifier, "last", classifier.head(last))):
        made = SelfDistilledTokenizer(Encoder(MICRO), 16, 8, 1, teacher.teach_width)
        assert torch.allclose(train_tokenizer.prepare(batch, made, teacher, cfg)[1], expect, atol=1e-5)

def test_targets_and_losses_are_float32_also_in_mixed_precision(random_encoder, distilled, toy):
    distilled.target_map.copy_(torch.randn(32, 32))
    batch, cfg = batch_of(toy, 2), train_tokenizer.Config(dtype="bfloat16")
    inputs, target, _ = train_tokenizer.prepare(batch, distilled, random_encoder, cfg)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        taught = random_encoder.teach(fbank(batch["wav"]), None)
        predicted = distilled(**inputs)[0]
        sums = train_tokenizer.losses(distilled, inputs, target, batch["valid"], beta=0.0)[0]
    assert torch.allclose(target, taught.float() @ distilled.target_map, atol=1e-4)
    expect = (1 - F.cosine_similarity(predicted.double(), target.double(), dim=-1)).sum()
    assert sums["loss"].item() == pytest.approx(expect.item(), rel=2e-6)

@pytest.mark.parametrize("targets", ["whiten", "centre", "raw"])
def test_targets_of_distillation(targets, toy, teacher, tmp_path):
    distil(toy, teacher, tmp_path, targets=targets)
    made, encoder = load_tokenizer(tmp_path / "tokenizer_iter2.pt"), load(teacher)
    target = made.target(encoder.features(sounds_of(toy, 80))[0]).detach().flatten(0, 1)
    assert (target.mean(0).abs().max() < 0.2) == (targets != "raw")
    spread = torch.cov(target.T).diagonal()
    assert ((spread[spread > 0.1] - 1).abs().max() < 0.2) == (targets == "whiten")
    other = "raw" if targets == "centre" else "centre"
    with pytest.raises(UserError, match=f"was begun with other --targets than {other}"):
        train_tokenizer.main(out_dir=str(tmp_path), resume=True, targets=other, max_steps=2)

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

def test_the_tokenizer_hears_disturbed_clips_and_the_teacher_clean_ones(
        random_encoder, distilled, toy, teacher, tmp_path, monkeypatch):
    batch, cfg = batch_of(toy, 2), train_tokenizer.Config()
    (quiet, target, use), (noisy, same_target, same_use) = (
        train_tokenizer.prepare(batch, distilled, random_encoder, cfg, share) for share in (0.0, 1.0))
    assert (quiet["patches"] - noisy["patches"]).abs().mean() > 0.01
    assert torch.equal(target, same_target)
    assert torch.equal(use, same_use)

    shares, disturb = set(), train_tokenizer.disturb            # and the flag reaches the training
    monkeypatch.setattr(train_tokenizer, "disturb", lambda *given: shares.add(given[-1]) or disturb(*given))
    distil(toy, teacher, tmp_path, disturb=0.5)
    assert shares == {0.5}

def test_flags_that_make_no_sense_are_refused(toy, tmp_path, random_encoder):
    torch.save(dict(kind="classifier", encoder=dataclasses.asdict(MICRO), labels=["a"], multilabel=False,
                    model=Classifier(random_encoder, ["a"]).state_dict()), tmp_path / "c.pt")
    for flag, value, message in (("disturb", 20.0, "20.0: a share"),
                                 ("teacher_layers", "mean", "mean is for pre-trained teachers")):
        with pytest.raises(UserError, match=f"--{flag} {message}"):
            distil(toy, str(tmp_path / "c.pt"), tmp_path, **{flag: value})

def test_validation_and_a_loud_warning_on_collapse(toy, teacher, tmp_path, capsys):
    result = distil(toy, teacher, tmp_path, max_steps=4)
    assert result["valid_codes_used"] + result["valid_dead_codes"] == 64
    assert 1 <= result["valid_perplexity"] <= result["valid_codes_used"]
    assert "collaps" not in capsys.readouterr().out
    distil(toy, teacher, tmp_path, max_steps=12, warmup_steps=2, lr=1.0, revive=0.0)    # absurd
    assert re.search(r"WARNING: the codebook is collapsing.*--lr", capsys.readouterr().out)

def test_a_small_tokenizer_labels_for_a_larger_model(ragged, teacher, tmp_path):
    distil(ragged, teacher, tmp_path, preset="sl")
    labels = str(tmp_path / "tokenizer_iter2.pt")
    assert load_tokenizer(labels).encoder.cfg.dropout == 0.1                # as the paper's table says
    result = train_mam.main(data=ragged, tokenizer=labels, out_dir=str(tmp_path / "tiny"), model="tiny",
                            batch_seconds=20.0, max_steps=1, device="cpu")
    assert np.isfinite(result["valid_loss"])
    assert 1 < result["codes_used"] <= 64
    assert not (tmp_path / "tiny/tokenizer_iter1.pt").exists()              # no random projection was made
