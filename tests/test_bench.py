"""The measuring itself: what is counted, and that nothing is timed that does something else."""
import contextlib
import json

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import bench
import common
import peers
from conftest import MICRO
from model import Classifier, Encoder, MaskedAudioModel, random_mask

def test_every_piece_is_timed_and_counted(tmp_path, capsys):
    results = bench.main(model="micro", clips=1, seconds=2.56, runs=2, device="cpu", out=str(tmp_path / "bench.json"),
                         only="fbank,patches,encoder,mam,mam2,mam2-live,tokenizer,finetune")
    lines = {line["piece"]: line for line in results}
    assert len(lines) == 9 and all(line["ms_min"] <= line["ms"] <= line["ms_max"] for line in results)
    assert lines["mam2-live"]["gflop"] > lines["mam2"]["gflop"] > 0 and lines["fbank"]["audio_seconds_per_second"] > 0
    assert lines["matrix"]["share_of_limit"] == pytest.approx(1)
    assert json.load(open(tmp_path / "bench.json"))["results"] == results
    assert "cached tokens save" in capsys.readouterr().out

@pytest.mark.parametrize("piece", ["fbank", "encoder", "mam", "mam2", "mam2-live", "tokenizer", "finetune"])
def test_no_step_waits_for_the_device(piece, monkeypatch):
    """On the device "meta" there are shapes and no numbers: asking it for one (.item(), nonzero, x[mask]) is an error. It does not
    see copies to the device that wait."""
    # unknown to it, as are fused kernels
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(common, "make_optimizer", lambda model, lr, decay: torch.optim.AdamW(model.parameters(), lr))
    cfg = bench.Config(clips=2, seconds=2.56, only=piece)
    bench.pieces_of("micro", cfg, torch.device("meta"))[0][piece]()

def test_arithmetic_is_counted_as_by_hand():
    D, T, L = MICRO.dim, 32, MICRO.layers
    encoder = Encoder(MICRO).eval()
    by_hand = 2 * T * (256 * 16 + 16 * D) + L * 2 * T * (4 * D * D + 2 * D * MICRO.ffn + 2 * T * D + 8 * D)    # gate: 8 numbers a head
    counted = common.flops_of(lambda: encoder(torch.randn(1, T, 256)))
    assert by_hand < counted * 1.15 and counted < by_hand * 2                   # and the position convolution, as a product of spectra

def test_memory_is_that_of_the_tensors_saved(tmp_path):
    plain, recompute = [line for line in bench.main(memory=True, model="micro", device="cpu", out=str(tmp_path / "b.json"))
                        if line["piece"] == "finetune memory"]
    D, T, H, F, L = MICRO.dim, 496, MICRO.heads, MICRO.ffn, MICRO.layers
    # of a block, in bytes: bf16 input, q k v, gate's queries, gate * bias, attention's output twice, MLP's input, inside twice;
    # float32 sums and norms
    block = T * (2 * (D + 3 * D + D + H * T + 2 * D + D + 2 * F) + 4 * 4 * D)
    assert plain["mb_per_second"] == pytest.approx(L * block / 10 / 1e6, rel=0.5)
    assert recompute["mb_per_second"] < 0.75 * plain["mb_per_second"]
    weights = sum(p.numel() for p in Classifier(Encoder(MICRO), ["a"] * 527).parameters())
    # bfloat16 copies of the weights, the position bias
    assert 16e-9 * weights < plain["fixed_gb"] < 22e-9 * weights + 1e-9 * (4 * H + 8) * T * T

def test_peers_that_are_unknown_or_missing_are_explained(monkeypatch, tmp_path):
    flags = dict(model="micro", clips=1, seconds=1.0, runs=1, only="encoder", device="cpu", out=str(tmp_path / "bench.json"))
    with pytest.raises(common.UserError, match="--peer fairseq: choose one of openbeats, espnet"):
        bench.main(peer="fairseq", **flags)
    def missing(*args):
        raise ModuleNotFoundError("No module named 'espnet2'")
    monkeypatch.setitem(peers.PEERS, "espnet", missing)
    with pytest.raises(common.UserError, match="No module named 'espnet2'; python peers.py says how to install it"):
        bench.main(peer="espnet", **flags)

@pytest.mark.slow
def test_compiling_breaks_nowhere_and_ends_after_two_lengths():
    """One graph for the first shape, one for all others: whole models in one piece each, whatever lengths come."""
    def mam(B, T):
        keep, masked = random_mask(torch.rand(B, T), torch.ones(B, T, dtype=torch.bool), 0.75)
        return torch.randn(B, T, 256), None, keep, masked
    def padded(B, T):
        return torch.randn(B, T, 256), torch.arange(T) < torch.tensor([[T]] * (B - 1) + [[T // 2]])
    def patchout(B, T):
        patches, valid = padded(B, T)
        return patches, valid, random_mask(torch.rand(B, T), valid, 0.6)[0]
    classifier = lambda: Classifier(Encoder(MICRO), ["a", "b", "c"])
    for model, make in ((MaskedAudioModel(Encoder(MICRO), 64, 2, 16), mam), (classifier(), padded), (classifier(), patchout)):
        torch._dynamo.reset()
        counters.clear()
        model.compile(backend="aot_eager")
        for n, (B, T) in enumerate([(4, 128), (4, 128), (3, 256), (5, 64), (6, 496), (7, 40), (2, 320)]):
            model(*make(B, T)).float().sum().backward()
            assert counters["stats"]["unique_graphs"] == (1 if n < 2 else 2) and not counters["graph_break"]
