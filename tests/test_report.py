"""The report: disturbances, measures against naive ones and scikit-learn's, the command as typed, the figure."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import report
from common import UserError
from conftest import MICRO, ROOT
from model import Encoder, fbank, patchify
from tokenizer import RandomProjectionTokenizer, SelfDistilledTokenizer, is_silent, tokenizer_state

# ---- disturbances

def test_a_room_is_a_convolution_in_place_and_as_loud():
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal(3000), report.impulse_response(rng)
    expect = np.convolve(x, h)[:3000]
    expect *= np.sqrt((x**2).sum() / (expect**2).sum())
    assert np.allclose(report.reverberate(x, h), expect)
    late = np.concatenate([np.zeros(640), h])               # 40 ms of pre-delay change nothing but what the end hears
    assert np.allclose(report.reverberate(x, late), expect)

def test_made_rooms_decay_and_ring_as_said():
    for seed in range(5):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        h, decay, direct = report.impulse_response(rng), same.uniform(0.2, 0.8), same.uniform(-5, 10)
        assert -10 * np.log10((h[1:]**2).sum()) == pytest.approx(direct) and np.abs(h).argmax() == 0
        level = lambda share: 10 * np.log10((h[int(len(h) * share):int(len(h) * (share + 0.1))]**2).mean())
        assert level(0.1) - level(0.8) == pytest.approx(60 * 0.7, abs=3) and len(h) == int(decay * 16000)

@pytest.mark.parametrize("snr", [20, 0])
def test_noise_has_the_level_asked_for_over_what_sounds(snr):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(8000), np.zeros(8000)])         # half is padding
    added = report.add_noise(x, 3 * rng.standard_normal(1000), snr) - x
    assert 10 * np.log10((x[:8000]**2).mean() / (added**2).mean()) == pytest.approx(snr)

def sources(pack, **more):
    pack = data.Pack(pack)
    return report.Sources(pack, pack.table()[0], np.arange(len(pack)), **more)

def test_disturbances_are_a_function_of_clip_condition_and_draw(toy):
    a, b = sources(toy), sources(toy)
    first = a.disturbed(3, "reverb+noise10", 1)
    b.disturbed(5, "noise0", 0)                                             # in whatever order
    assert np.array_equal(first, b.disturbed(3, "reverb+noise10", 1)) and len(first) == 48000
    for other in (a.disturbed(3, "reverb+noise10", 2), a.disturbed(3, "noise10", 1),
                  sources(toy, seed=1).disturbed(3, "reverb+noise10", 1)):
        assert not np.allclose(first, other)
    assert np.array_equal(a.disturbed(3, "gain", 0), a.disturbed(3, "clean", 0) / 2)

def test_noise_comes_from_other_classes(toy):
    s, rng = sources(toy), np.random.default_rng(0)
    assert all(s.labels[s.another(i, rng)] != s.labels[i] for i in range(80))

def test_given_rooms_and_noises_are_used(toy, write_wav):
    h = np.zeros((2000, 2))
    h[700, 0], h[900, 1] = 0.5, 0.5                                         # two channels: averaged, they would be an echo
    folder = write_wav("rooms/a.wav", h, subtype="FLOAT").parent
    s = sources(toy, rirs=folder)
    assert np.allclose(s.disturbed(0, "reverb", 0), s.disturbed(0, "clean", 0), atol=1e-6)
    hum = np.sin(np.arange(100000) * 2 * np.pi * 1000 / 16000)
    s = sources(toy, noises=write_wav("noises/hum.wav", hum).parent)
    added = s.disturbed(0, "noise10", 0).astype(float) - s.disturbed(0, "clean", 0)
    spectrum = np.abs(np.fft.rfft(added))
    assert spectrum.argmax() == 3000 and (spectrum[2990:3010]**2).sum() > 0.999 * (spectrum**2).sum()
    with pytest.raises(UserError, match="--rirs nowhere: no such folder"):
        sources(toy, rirs="nowhere")

# ---- measures

def planted(seed=0, clips=12, n=40, K=7):
    rng = np.random.default_rng(seed)
    z = rng.integers(-1, K, (clips, n))
    return z, np.where(rng.random(z.shape) < 0.5, z, rng.integers(-1, K, z.shape)), K

def test_agreement_and_kappa_equal_their_definition():
    z, w, K = planted()
    weights = np.array([np.ones(12), [0, 2, 1] * 4])
    for r, times in enumerate(weights):
        pairs = [(a, b) for i in range(12) for a, b in zip(z[i], w[i]) if a >= 0 and b >= 0 for _ in range(int(times[i]))]
        agreement = sum(a == b for a, b in pairs) / len(pairs)
        share = lambda side, k: sum(pair[side] == k for pair in pairs) / len(pairs)
        chance = sum(share(0, k) * share(1, k) for k in range(K))
        found = report.agreement_kappa(z, w, K, weights)
        assert found[0][r] == pytest.approx(agreement) and found[1][r] == pytest.approx((agreement - chance) / (1 - chance))
    same = np.zeros((3, 5), int)                                            # a collapsed codebook agrees and says nothing
    assert [x[0] for x in report.agreement_kappa(same, same, 4, np.ones((1, 3)))] == [1.0, 0.0]

def test_expected_mutual_information_equals_the_sum_over_all_tables():
    a, b = np.array([3, 0, 5, 2]), np.array([4, 1, 5])
    N, expect = 10, 0.0
    for x in a:
        for y in b:
            for n in range(max(1, x + y - N), min(x, y) + 1):
                p = math.comb(int(y), n) * math.comb(N - int(y), int(x) - n) / math.comb(N, int(x))
                expect += p * n / N * math.log(N * n / (x * y))
    assert report.expected_mutual_information(a, b) == pytest.approx(expect, abs=1e-12)

def test_mutual_information_equals_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes, K, N, bond in ((2, 3, 30, 0.5), (10, 64, 3000, 0.2), (50, 1024, 20000, 0.0)):
        y = rng.integers(0, classes, N)
        z = np.where(rng.random(N) < bond, y, (K * rng.random(N)**2).astype(int))         # uneven codes
        joint = np.zeros((classes, K))
        np.add.at(joint, (y, z), 1)
        assert report.ami(joint) == pytest.approx(metrics.adjusted_mutual_info_score(y, z), abs=1e-9)
        assert report.purity_pnmi(joint)[1] == pytest.approx(metrics.homogeneity_score(y, z), abs=1e-9)

def test_purity_closed_form():
    joint = np.array([[6.0, 0, 1], [2, 4, 1]])              # two classes, three codes
    purity, pnmi = report.purity_pnmi(joint)
    assert purity == pytest.approx((6 + 4 + 1) / 14)
    code, split = (lambda p: -sum(x * math.log(x) for x in p),
                   8 / 14 * -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + 2 / 14 * math.log(2))
    assert pnmi == pytest.approx(1 - split / code([0.5, 0.5]))

def test_small_samples_do_not_pass_for_meaning():
    """Codes that know the clip but not its class: PNMI is high, AMI too, but no higher than with the clips dealt out anew."""
    rng = np.random.default_rng(0)
    codes = np.repeat(rng.permutation(60)[:, None], 20, 1)[None]
    labels = [[i % 6] for i in range(60)]
    vectors = rng.standard_normal((1, 60, 8))
    found = report.measure(codes, vectors, np.eye(64), [("clean", 0)], np.roll(np.arange(60), 1), labels, np.ones((1, 60)), rng)
    assert found["PNMI"] == pytest.approx(1.0) and found["PNMI, shuffled"] < 0.6
    assert found["AMI"][0] == pytest.approx(found["AMI, clips shuffled"]) and found["codes_used"] == 60

def test_retrieval_counts_the_clips_that_find_themselves():
    clean = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert report.retrieval(5 * clean + [[0.1, 0], [6, 0], [0, 1]], clean, np.arange(3)) == pytest.approx(2 / 3)

def test_intervals_hold_the_estimate_and_shrink_with_clips():
    rng = np.random.default_rng(0)
    def width(C):
        z, w, K = planted(clips=C)
        weights = np.concatenate([np.ones((1, C)), rng.multinomial(C, [1 / C] * C, 300)])
        value, low, high = report.interval(report.agreement_kappa(z, w, K, weights)[1])
        assert low < value < high
        return high - low
    assert width(400) < 0.4 * width(25)                     # 1 / sqrt(16)

# ---- tokenizers

def test_kmeans_is_a_nearest_centroid(toy):
    pack = data.Pack(toy)
    wav = torch.from_numpy(np.stack([pack.audio(i) for i in range(20)]) / np.float32(32768))
    batches = [(wav, torch.full((20,), 48000))]
    tok = report.KMeansTokenizer(32).fit_(batches)
    x = (patchify(fbank(wav)) - tok.mean) / tok.std
    distance = (x[:, :, None] - tok.centroids).square().sum(-1)
    assert torch.equal(tok.encode(wav), distance.argmin(-1))
    start = report.KMeansTokenizer(32).fit_(batches, iterations=0)
    before = (x[:, :, None] - start.centroids).square().sum(-1).min(-1).values.mean()
    assert distance.min(-1).values.mean() < 0.95 * before and len(tok.encode(wav).unique()) > 24

@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A pack of 12 clips in two folds: a second of noise or of a tone, and digital silence after it."""
    path = tmp_path_factory.mktemp("packs") / "padded"
    def sound(row):
        rng, t = np.random.default_rng(row["n"]), np.arange(16000)
        x = (rng.standard_normal(16000) if row["labels"] == ["noise"]
             else np.sin(t * rng.uniform(0.1, 0.5)) + 0.01 * rng.standard_normal(16000))
        return np.concatenate([0.1 * x, np.zeros(16000 + 3200 * row["n"])]).astype(np.float32)
    rows = [dict(path=str(n), labels=["noise" if n % 2 else "tone"], split=str(n // 2 % 2 + 1), group="", n=n) for n in range(12)]
    data.write_pack(path, rows, sound)
    return str(path)

def test_silence_is_left_out_of_everything(padded):
    s, tok = sources(padded), RandomProjectionTokenizer(64)
    tok.fit_([(torch.from_numpy(s.disturbed(1, "clean", 0))[None], torch.tensor([35200]))])
    codes, vectors = report.encode({"random": tok}, s, np.arange(12), [("clean", 0), ("noise0", 0)], torch.device("cpu"))
    for i in range(12):
        wav = torch.from_numpy(s.disturbed(i, "clean", 0))[None]
        alone = torch.where(is_silent(fbank(wav)), -1, tok.encode(wav))[0].numpy()
        assert np.array_equal(codes["random"][0, i, :len(alone)], alone) and (codes["random"][0, i, len(alone):] == -1).all()
        assert np.array_equal(codes["random"][1, i] >= 0, codes["random"][0, i] >= 0) and (alone >= 0).sum() == 7 * 8
        mean = np.stack([tok.codebook[alone[band:56:8]].mean(0) for band in range(8)])
        assert np.allclose(vectors["random"][0, i].reshape(8, -1), mean, atol=1e-6)

# ---- the command

@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    torch.manual_seed(0)
    tok = SelfDistilledTokenizer(Encoder(MICRO), 32, 8, 0)
    tok.codebook.kmeans_start_(torch.nn.functional.normalize(torch.randn(500, 8), dim=-1))
    path = tmp_path_factory.mktemp("tok") / "tokenizer_iter2.pt"
    torch.save(tokenizer_state(tok), path)
    return str(path)

def test_the_command_as_typed(padded, distilled, tmp_path):
    command = [sys.executable, ROOT / "tokenizer.py", distilled, "random", "kmeans", "--data", padded, "--split", "2",
               "--json", tmp_path / "r.json", "--bootstraps", "20", "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert (list(result["tokenizers"]) == ["tokenizer_iter2", "random", "kmeans", "log-mel"]
            and result["clips"] == 6 and result["patches"] == 6 * 56)
    for name, found in list(result["tokenizers"].items())[:3]:
        assert found["codes_used"] + found["dead_codes"] == 32              # baselines have as many codes as the file
        for key in ("reverb", "noise20", "noise10", "noise0", "gain", "unrelated"):
            value, low, high = found[f"agreement, {key}"]
            assert 0 <= value <= 1 and low <= value <= high and found[f"kappa, {key}"][0] <= value
    random = result["tokenizers"]["random"]
    assert random["kappa, noise20"][0] > random["kappa, noise0"][0] and random["kappa, gain"][0] > 0.2 > random["kappa, unrelated"][0]
    shown = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines()}
    assert shown["perplexity"][1] == f"{random['perplexity']:.3f}" and shown["kappa, gain"][2] == f"{random['kappa, gain'][0]:.3f}"

def test_a_measure_does_not_depend_on_its_company(padded, distilled):
    flags = ["--data", padded, "--bootstraps", "5", "--device", "cpu"]
    alone = report.main([distilled, *flags, "--conditions", "noise10"])["tokenizers"]["tokenizer_iter2"]
    among = report.main(["random", distilled, *flags, "--conditions", "reverb,noise10,gain"])["tokenizers"]["tokenizer_iter2"]
    assert alone == {key: among[key] for key in alone}

def test_packs_without_labels(tmp_path, distilled, capsys):
    data.write_pack(tmp_path / "p", [dict(path=str(i), labels=[], split="", group="") for i in range(4)],
                    lambda row: 0.1 * np.random.default_rng(int(row["path"])).standard_normal(8000).astype(np.float32))
    found = report.main([distilled, "--data", str(tmp_path / "p"), "--bootstraps", "5",
                         "--conditions", "gain"])["tokenizers"]["tokenizer_iter2"]
    assert "AMI" not in found and found["kappa, gain"][0] > 0

@pytest.mark.parametrize("flags, message", [
    (["--conditions", "echo"], "'echo' is no condition; there are reverb, gain, noise<dB>"),
    (["--split", "7"], "has the splits 1, 2, not 7"), (["--noises", "nowhere"], "--noises nowhere: no such folder")])
def test_mistakes_are_explained(padded, flags, message):
    with pytest.raises(UserError, match=message):
        report.main(["random", "--data", padded, *flags])

# ---- the figure

def test_the_figure(toy, distilled, tmp_path):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    result = report.main(["random", distilled, "--data", toy, "--split", "test", "--bootstraps", "2", "--conditions", "noise10",
                          "--figure_copies", "3", "--figure", str(tmp_path / "f/figure.png")])["figure"]
    pixels = image.imread(tmp_path / "f/figure.png")
    # ten colours at least
    assert pixels.shape[1] > 1500 and len(np.unique((255 * pixels[..., :3]).astype(int).reshape(-1, 3), axis=0)) > 10
    assert list(result) == ["log-mel", "random", "tokenizer_iter2"]
    assert all(0 <= x["retrieval"] <= 1 and -1 <= x["silhouette"] <= 1 for x in result.values())

def test_without_matplotlib_the_figure_says_what_to_install(padded, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn", sys)
    with pytest.raises(UserError, match="pip install matplotlib scikit-learn"):
        report.main(["random", "--data", padded, "--figure", "x.png"])
    # only the figure needs it
    assert report.main(["random", "--data", padded, "--bootstraps", "2", "--conditions", ""])["clips"] == 12
