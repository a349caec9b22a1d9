"""What has to hold on a GPU: with one, all checks; without, that they run and that nothing mixes devices."""
import pytest
import torch

import evaluate
import model
from audio import num_tokens, valid_tokens
from conftest import MICRO
from model import Classifier, Encoder, MaskedAudioModel
from tokenizer import Codebook, RandomProjectionTokenizer, SelfDistilledTokenizer
from tools import gpu_check
from train_mam import prepare

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_check_passes_on_the_card(tmp_path):
    rows = gpu_check.main(model="tiny", clips=4, device="cuda", out=str(tmp_path / "check.jsonl"))
    assert not [(name, detail) for name, passed, detail in rows if not passed]

@pytest.mark.slow
def test_every_check_runs_on_a_cpu(tmp_path):
    flags = dict(model="micro", clips=1, compile=False, device="cpu")
    rows = gpu_check.main(out=str(tmp_path / "check.jsonl"), **flags)
    assert not [(name, detail) for name, passed, detail in rows if passed is False]
    assert len((tmp_path / "check.jsonl").read_text().splitlines()) == len(rows) + 1
    assert [name for name, passed, _ in rows if passed is None] == ["no step waits"]

def test_a_check_that_breaks_is_a_row_and_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(cfg, device):
        yield "works", True, dict(value=1.0)
        raise RuntimeError("out of memory")
    monkeypatch.setattr(gpu_check, "CHECKS", [broken, gpu_check.front_end])
    rows = gpu_check.main(device="cpu", out=str(tmp_path / "check.jsonl"))
    assert [(name, passed) for name, passed, _ in rows] == [("works", True), ("broken", False), ("fbank", True)]
    assert "3 rows, 1 FAILED: broken" in capsys.readouterr().out

@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch")
def test_nothing_mixes_devices(monkeypatch):
    """Tensors that say they are on a card, and hold nothing: a build for CUDA is enough, no card is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    monkeypatch.setattr(model, "CONVOLUTION", "direct")         # auto would time both ways
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        wav, lengths = torch.zeros(2, 40960), torch.tensor([40960, 20000])
        encoder = Encoder(MICRO)
        assert encoder.features(wav, lengths)[0].device.type == "cuda"
        assert Classifier(encoder, ["a", "b"]).eval().predict(wav, lengths).device.type == "cuda"
        valid = valid_tokens(lengths, 40960)
        batch = dict(wav=wav, valid=valid, mask=valid, noise=torch.rand(2, num_tokens(40960)))
        inputs, targets = prepare(batch, encoder, RandomProjectionTokenizer(), 0.75)
        assert MaskedAudioModel(encoder, 1024, 1, 32)(**inputs).device.type == "cuda"
        distilled = SelfDistilledTokenizer(encoder, 32, 8, 1, target_width=32)
        assert distilled(inputs["patches"])[0].device.type == "cuda"
        codebook = Codebook(16, 8)
        z, use = torch.randn(100, 8), torch.ones(100, dtype=torch.bool)
        codebook.start_(z, centres=torch.arange(16))
        codebook.update_(z, codebook(z)[1], use)
        assert codebook.revive_(z, use, 0.1).device.type == "cuda"
        x, y = torch.randn(40, 6), torch.eye(4).repeat(10, 1).bool()
        assert evaluate.knn_probe(x, y, x).device.type == "cuda"
