"""The report on tokenizers: disturbances, measures against their definitions, the command, the figure."""
import itertools
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
from tokenizer import RandomProjectionTokenizer
from tools import report

def sounds_of(path, **flags):
    pack = data.Pack(path)
    return report.Sounds(report.Config(**flags), pack, np.arange(len(pack)))

def test_a_room_is_a_convolution_in_place_and_as_loud():
    chance = np.random.default_rng(0)
    x, room = chance.standard_normal(3000), report.impulse_response(chance)
    expected = np.convolve(x, room)[:3000]
    expected *= np.linalg.norm(x) / np.linalg.norm(expected)
    assert np.allclose(report.reverberate(x, room), expected)
    assert np.allclose(report.reverberate(x, np.pad(room, (640, 0))), expected)     # 40 ms of pre-delay

@pytest.mark.parametrize("snr", [20, 0])
def test_noise_has_the_level_asked_for_over_what_sounds(snr):
    sound, noise = np.random.default_rng(0).standard_normal((2, 8000))
    x = np.pad(sound, (0, 8000))                                    # half is padding
    added = report.add_noise(x, 3 * noise[:1000], snr) - x
    assert 10 * np.log10((sound**2).mean() / (added**2).mean()) == pytest.approx(snr)

def test_disturbances_are_a_function_of_clip_condition_draw_and_seed(toy):
    sounds, again = sounds_of(toy), sounds_of(toy)
    first = sounds.disturbed(3, "reverb+noise10", 1)
    again.disturbed(5, "noise0", 0)                                 # in whatever order
    assert torch.equal(first, again.disturbed(3, "reverb+noise10", 1))
    for other in sounds.disturbed(3, "reverb+noise10", 2), sounds_of(toy, seed=1).disturbed(3, "noise10", 1):
        assert not torch.allclose(first, other)
    assert torch.equal(sounds.disturbed(3, "gain", 0), sounds.disturbed(3, "clean", 0) / 2)

def test_given_rooms_and_noises_are_used(toy, write_wav):
    room = np.zeros((2000, 2))
    room[700, 0], room[900, 1] = 0.5, 0.5                           # averaged, the channels would be an echo
    hum = np.sin(np.arange(100000) * 2 * np.pi * 1000 / 16000)
    sounds = sounds_of(toy, rirs=write_wav("rooms/a.wav", room, subtype="FLOAT").parent,
                       noises=write_wav("noises/hum.wav", hum).parent)
    clean = sounds.disturbed(0, "clean", 0)
    assert torch.allclose(sounds.disturbed(0, "reverb", 0), clean, atol=1e-6)
    power = torch.fft.rfft(sounds.disturbed(0, "noise10", 0) - clean).abs()**2
    assert power[2990:3010].sum() > 0.999 * power.sum()

def test_agreement_and_kappa_equal_their_definition():
    z, w = torch.randint(-1, 7, (2, 12, 40), generator=torch.Generator().manual_seed(0))
    w[:, ::2] = z[:, ::2]
    weights = torch.tensor([[1.0] * 12, [0.0, 2.0, 1.0] * 4]).double()
    for times, agreement, kappa in zip(weights, *report.agreement_kappa(z, w, 7, weights)):
        pairs = []
        for i in range(12):
            coded = [(a, b) for a, b in zip(z[i].tolist(), w[i].tolist()) if min(a, b) >= 0]
            pairs += coded * int(times[i])
        first, second = zip(*pairs)
        same = np.mean(np.equal(first, second))
        by_chance = sum(first.count(k) * second.count(k) for k in range(7)) / len(pairs)**2
        assert agreement.item() == pytest.approx(same)
        assert kappa.item() == pytest.approx((same - by_chance) / (1 - by_chance))

def test_expected_mutual_information_equals_the_sum_over_all_overlaps():
    first, second, expected = [3, 0, 5, 2], [4, 1, 5], 0.0
    for a, b, n in itertools.product(first, second, range(1, 6)):
        if max(0, a + b - 10) <= n <= min(a, b):
            chance = math.comb(b, n) * math.comb(10 - b, a - n) / math.comb(10, a)
            expected += chance * n / 10 * math.log(10 * n / (a * b))
    found = report.expected_mutual_information(torch.tensor(first).double(), torch.tensor(second).double())
    assert found.item() == pytest.approx(expected, abs=1e-12)

def test_purity_and_pnmi_in_closed_form():
    table = torch.tensor([[6.0, 0, 1], [2, 4, 1]]).double()         # two classes, three codes
    left = 8 / 14 * -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + 2 / 14 * math.log(2)
    assert report.purity(table) == pytest.approx((6 + 4 + 1) / 14)
    assert report.pnmi(table) == pytest.approx(1 - left / math.log(2))

def test_codes_that_know_the_clip_but_not_its_class_do_not_pass_for_meaning():
    codes = torch.from_numpy(np.random.default_rng(0).permutation(60)).repeat(20, 1).T
    targets = F.one_hot(torch.arange(60) % 6).bool()
    found = report.class_measures(codes, targets, 64, torch.ones(1, 60).double(), seed=0)
    assert found["PNMI"] == pytest.approx(1)
    assert found["PNMI, shuffled"] < 0.6
    assert found["AMI"].item() == pytest.approx(found["AMI, clips shuffled"])

def test_retrieval_counts_the_clips_that_find_themselves():
    clean = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    disturbed = 5 * clean + torch.tensor([[0.1, 0], [6, 0], [0, 1]])
    assert report.retrieval(disturbed[:, None], clean, torch.arange(3)) == pytest.approx(2 / 3)

def test_kmeans_finds_the_nearest_centroid_and_better_ones_than_it_starts_from(toy):
    wavs = [data.Pack(toy).wav(i)[None] for i in range(10)]
    def squared_distances(tokenizer):
        x = (patchify(fbank(torch.cat(wavs))) - tokenizer.mean) / tokenizer.std
        return (x[:, :, None] - tokenizer.centroids).square().sum(-1)
    start, tokenizer = (report.KMeansTokenizer().fit_([(wav, None) for wav in wavs], 32, n) for n in (0, 15))
    distances = squared_distances(tokenizer)
    assert torch.equal(tokenizer.encode(torch.cat(wavs)), distances.argmin(-1))
    assert distances.amin(-1).mean() < 0.95 * squared_distances(start).amin(-1).mean()

@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A pack of 12 clips in two folds: a second of noise or of a tone, and digital silence after it."""
    def read(row):
        chance = np.random.default_rng(row["n"])
        x = 0.01 * chance.standard_normal(16000)
        x += np.sin(np.arange(16000) * chance.uniform(0.1, 0.5)) if row["n"] % 2 else 9 * x
        return np.pad(0.1 * x, (0, 16000 + 3200 * row["n"])).astype(np.float32)
    rows = [dict(path="", labels=["ab"[n % 2]], split="1122"[n % 4], group="", n=n) for n in range(12)]
    return str(data.write_pack(tmp_path_factory.mktemp("packs") / "padded", rows, read).path)

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
    sizes = {found["codes_used"] + found["dead_codes"] for found in (first, random, kmeans)}
    assert len(sizes) == 1
    assert random["kappa, noise20"][0] > random["kappa, noise0"][0]
    assert random["kappa, gain"][0] > 0.2 > random["kappa, unrelated"][0]
    value, low, high = random["agreement, reverb"]
    assert 0 <= low <= value <= high <= 1
    shown = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert shown["perplexity"][1] == f"{random['perplexity']:.3f}"
    assert shown["kappa, gain"][2] == f"{random['kappa, gain'][0]:.3f}"

def test_a_measure_does_not_depend_on_its_company_and_needs_no_labels(tmp_path):
    rows = [dict(path=str(i), labels=[], split="", group="") for i in range(4)]
    noise = np.random.default_rng(0).standard_normal((4, 8000)).astype(np.float32)
    data.write_pack(tmp_path / "p", rows, lambda row: 0.1 * noise[int(row["path"])])
    flags = ["--data", str(tmp_path / "p"), "--bootstraps", "5", "--device", "cpu", "--conditions"]
    alone = report.main(["random", *flags, "gain"])["tokenizers"]["random"]
    among = report.main(["random-plain", "random", *flags, "reverb,gain"])["tokenizers"]["random"]
    assert "AMI" not in alone
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
    with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install matplotlib scikit-learn"):
        patch.setitem(sys.modules, "matplotlib", None)
        report.main(command)
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    scores = report.main(command)["figure"]
    pixels = image.imread(tmp_path / "new/figure.png")
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 10       # colours
    assert list(scores) == ["log-mel", "random"]
    assert all(0 <= found["retrieval"] <= 1 for found in scores.values())
