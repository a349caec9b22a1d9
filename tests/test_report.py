"""The report on tokenizers: disturbances, measures against their definitions, the command, the figure."""
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from audio import fbank, is_silent, patchify
from common import UserError
from conftest import row_of
from tokenizer import RandomProjectionTokenizer
from tools import report

def sounds_of(path, **flags):
    pack = data.Pack(path)
    return report.Sounds(report.Config(**flags), pack, np.arange(len(pack)))

@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The path of a pack of 12 clips in two folds: a second of noise, and digital silence after it."""
    def read(row):
        noise = np.random.default_rng(row["n"]).standard_normal(16000)
        return np.pad(0.1 * noise, (0, 16000 + 3200 * row["n"])).astype(np.float32)
    rows = [row_of("", "ab"[n % 2], "1122"[n % 4], n=n) for n in range(12)]
    return str(data.write_pack(tmp_path_factory.mktemp("packs") / "padded", rows, read).path)

def test_a_room_is_a_convolution_that_is_as_loud():
    chance = np.random.default_rng(0)
    x, room = chance.standard_normal(3000), report.impulse_response(chance)
    expected = np.convolve(x, room)[:3000]
    expected *= np.linalg.norm(x) / np.linalg.norm(expected)
    assert np.allclose(report.reverberate(x, room), expected)

def test_every_seed_and_draw_disturbs_in_its_own_way(padded):
    made = [sounds_of(padded, seed=seed).disturbed(3, "noise10", draw) for seed in (0, 1) for draw in (0, 1)]
    assert len(torch.stack(made).unique(dim=0)) == 4

def test_given_rooms_and_noises_are_used_at_the_level_asked_for(padded, write_wav):
    room = np.zeros((2000, 2))
    room[700, 0], room[900, 1] = 0.5, 0.5                           # averaged, the channels would be an echo
    hum = np.sin(np.arange(100000) * 2 * np.pi * 1000 / 16000)
    sounds = sounds_of(padded, rirs=write_wav("rooms/a.wav", room, subtype="FLOAT").parent,
                       noises=write_wav("noises/hum.wav", hum).parent)
    clean = sounds.disturbed(0, "clean", 0)
    assert torch.allclose(sounds.disturbed(0, "reverb", 0), clean, atol=1e-6)
    added = sounds.disturbed(0, "noise10", 0) - clean
    power = torch.fft.rfft(added).abs()**2
    assert power[1990:2010].sum() > 0.999 * power.sum()
    sounding = clean[clean != 0]                                    # the rest is padding
    assert 10 * torch.log10(sounding.square().mean() / added.square().mean()) == pytest.approx(10, abs=0.01)

def test_agreement_and_kappa_equal_their_definition():
    z, w = torch.randint(-1, 7, (2, 12, 40), generator=torch.Generator().manual_seed(0))
    w[:, ::2] = z[:, ::2]
    weights = torch.tensor([[1.0] * 12, [0.0, 2.0, 1.0] * 4]).double()
    for times, agreement, kappa in zip(weights, *report.agreement_kappa(z, w, 7, weights)):
        clips = torch.arange(12).repeat_interleave(times.long())
        pairs = zip(z[clips].flatten().tolist(), w[clips].flatten().tolist())
        first, second = zip(*[pair for pair in pairs if min(pair) >= 0])
        same = np.mean(np.equal(first, second))
        by_chance = sum(first.count(k) * second.count(k) for k in range(7)) / len(first)**2
        assert agreement.item() == pytest.approx(same)
        assert kappa.item() == pytest.approx((same - by_chance) / (1 - by_chance))

def test_purity_pnmi_and_retrieval_in_closed_form():
    table = torch.tensor([[6.0, 0, 1], [2, 4, 1]]).double()         # two classes, three codes
    left = 8 / 14 * -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + 2 / 14 * math.log(2)
    assert report.purity(table) == pytest.approx((6 + 4 + 1) / 14)
    assert report.pnmi(table) == pytest.approx(1 - left / math.log(2))
    clean = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    disturbed = 5 * clean + torch.tensor([[0.1, 0], [6, 0], [0, 1]])    # the second looks like the first
    assert report.retrieval(disturbed[:, None], clean, torch.arange(3)) == pytest.approx(2 / 3)

def test_codes_that_know_the_clip_but_not_its_class_do_not_pass_for_meaning():
    clip, weights = torch.arange(60), torch.ones(1, 60).double()
    for codes, mean_something in ((clip % 6, True), (clip, False)):
        found = report.class_measures(codes.repeat(20, 1).T, F.one_hot(clip % 6).bool(), 64, weights, seed=0)
        assert found["PNMI"] == pytest.approx(1)
        assert found["PNMI, shuffled"] < 0.6
        if report.expected_mutual_information:          # where scikit-learn is installed
            assert (found["AMI"].item() > found["AMI, clips shuffled"] + 0.5) == mean_something

def test_kmeans_codes_are_the_nearest_centroids_and_those_the_means_of_their_patches(toy):
    wav = torch.stack([data.Pack(toy).wav(i) for i in range(10)])
    tokenizer = report.KMeansTokenizer().fit_([(wav, None)], 32, iterations=100)
    x = (patchify(fbank(wav)) - tokenizer.mean) / tokenizer.std
    codes = (x[:, :, None] - tokenizer.centroids).square().sum(-1).argmin(-1)
    assert torch.equal(tokenizer.encode(wav), codes)
    for code in codes.unique():
        assert torch.allclose(tokenizer.centroids[code], x[codes == code].mean(0), atol=1e-4)

def test_silence_is_left_out_of_codes_and_of_means(padded):
    sounds, tokenizer = sounds_of(padded), RandomProjectionTokenizer(64)
    tokenizer.fit_([(sounds.pack.wav(1)[None], torch.tensor([35200]))])
    codes, means = report.encode(sounds, {"random": tokenizer}, range(12), ["noise0"], 1, torch.device("cpu"))
    for clip, (clean, _), (mean, _) in zip(range(12), codes["random"], means["random"]):
        wav = sounds.pack.wav(clip)[None]
        alone = torch.where(is_silent(fbank(wav)), -1, tokenizer.encode(wav))[0]
        by_hand = [tokenizer.codebook[alone[band:56:8]].mean(0) for band in range(8)]
        assert torch.equal(clean, F.pad(alone, (0, len(clean) - len(alone)), value=-1))
        assert torch.allclose(mean, torch.cat(by_hand), atol=1e-6)

def test_the_command_writes_and_prints_what_it_found(padded, official, tmp_path, capsys):
    report.main([str(official("tokenizer")), "random", "kmeans", "--data", padded, "--split", "2",
                 "--bootstraps", "20", "--json", str(tmp_path / "new/r.json"), "--device", "cpu"])
    result = json.loads((tmp_path / "new/r.json").read_text())
    assert list(result["tokenizers"]) == ["tokenizer", "random", "kmeans", "log-mel"]
    assert (result["clips"], result["patches"]) == (6, 6 * 56)
    first, random, kmeans, _ = result["tokenizers"].values()        # all have as many codes as the file
    assert len({found["codes_used"] + found["dead_codes"] for found in (first, random, kmeans)}) == 1
    assert random["kappa, gain"][0] > 0.2 > random["kappa, unrelated"][0]
    assert f" {random['kappa, gain'][0]:.3f} ±" in capsys.readouterr().out

def test_a_measure_does_not_depend_on_its_company_and_needs_no_labels(tmp_path):
    noise = np.random.default_rng(0).standard_normal((4, 8000)).astype(np.float32)
    data.write_pack(tmp_path / "p", list(map(row_of, range(4))), lambda row: 0.1 * noise[int(row["path"])])
    flags = ["--data", str(tmp_path / "p"), "--bootstraps", "5", "--device", "cpu", "--conditions"]
    alone = report.main(["random", *flags, "gain"])["tokenizers"]["random"]
    among = report.main(["random-plain", "random", *flags, "reverb,gain"])["tokenizers"]["random"]
    assert alone == {key: among[key] for key in alone}

@pytest.mark.parametrize("flag, value, message", [
    ("--conditions", "echo", "'echo' is no condition; there are reverb, gain, noise<dB>"),
    ("--split", "7", "has the splits 1, 2, not 7"), ("--noises", "nowhere", "nowhere: no such folder")])
def test_mistakes_are_explained(padded, flag, value, message):
    with pytest.raises(UserError, match=message):
        report.main(["random", "--data", padded, flag, value])

def test_the_figure_shows_ten_classes_or_says_what_to_install(toy, tmp_path, monkeypatch):
    command = ["random", "--data", toy, "--split", "test", "--bootstraps", "2", "--conditions", "noise10",
               "--figure_copies", "3", "--figure", str(tmp_path / "new/figure.png")]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install matplotlib"):
        patch.setitem(sys.modules, "matplotlib", None)
        report.main(command)
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    report.main(command)
    assert (tmp_path / "new/figure.png").stat().st_size > 10_000
