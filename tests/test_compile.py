"""--compile as runs/ ship it: under DDP, with more parameters than a bucket holds, at the lengths that occur.

Run by torchrun, this file is one of two ranks: see on_ranks.
"""
import copy
import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

import common
import train_mam
from audio import BANDS, rows_in
from conftest import MICRO
from data import Sounds, split_batch, to_device
from model import Encoder, MaskedAudioModel, random_mask, recompute_blocks
from test_train import torchrun
from tokenizer import RandomProjectionTokenizer

# batches and lengths of each rank, step by step: they meet new ones at different times
SHAPES = [[(2, 64), (2, 64), (3, 48), (4, 32), (2, 96)], [(2, 64), (3, 40), (3, 40), (2, 72), (5, 32)]]

def count_graphs():
    """Compile by "aot_eager", which takes seconds where "inductor" takes minutes.

    Returns a list that grows by one with each graph that is compiled.
    """
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    return graphs

def inputs_of(B, T, padded):
    valid = torch.arange(T) < torch.randint(T // 2 if padded else T, T + 1, (B, 1))
    return torch.randn(B, T, 256), valid if padded else None, *random_mask(torch.rand(B, T), valid, 0.75)

def gradient(model, called, inputs):
    model.zero_grad()
    called(*inputs).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

def on_ranks(out, recompute):
    """Write how many graphs there are after each kind of batch, and how far gradients are from plain ones."""
    common.setup("cpu")
    graphs, shapes = count_graphs(), SHAPES[common.rank()]
    cfg = dataclasses.replace(MICRO, layers=1, dim=768, ffn=4096)
    model = MaskedAudioModel(Encoder(cfg), 64, 1, 32)
    plain = copy.deepcopy(model)
    recompute_blocks(model, recompute)
    compiled, uncompiled = common.wrap(model, compile=True), common.wrap(plain)

    kinds = dict(padded=shapes, full=shapes, alone=[(1, 64), (1, 96)])
    if recompute:
        kinds = dict(padded=shapes)
    written = dict(millions=common.millions(model), errors=[])
    for kind, batches in kinds.items():
        for B, T in batches:
            inputs = inputs_of(B, T, kind == "padded")
            ours, expect = gradient(model, compiled, inputs), gradient(plain, uncompiled, inputs)
            written["errors"].append(float((ours - expect).norm() / expect.norm()))
        written[kind] = len(graphs)

    model.eval()
    with torch.no_grad():
        for kind in {"padded", "full"} & set(kinds):
            for B, T in shapes:
                model(*inputs_of(B, T, kind == "padded"))
    written |= dict(evaluated=len(graphs), breaks=len(counters["graph_break"]))
    (out / f"{common.rank()}.json").write_text(json.dumps(written))

@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["", "recompute"])
def test_two_ranks_compile_few_graphs_for_all_lengths_and_get_plain_gradients(recompute, tmp_path):
    process = torchrun(2, __file__, tmp_path, recompute)
    output, error = process.communicate(timeout=600)
    assert process.returncode == 0, output + error
    assert "recompile_limit" not in error               # beyond it nothing is compiled any more
    for rank in range(2):
        written = json.loads((tmp_path / f"{rank}.json").read_text())
        assert written["millions"] * 4 > 25             # MB, DDP's bucket
        assert written["padded"] <= 2                   # the first shape, and all others
        assert written.get("full", 0) <= 4
        assert written.get("alone", 0) <= 6             # a batch of one clip is a kind of its own
        assert written["evaluated"] <= (4 if recompute else 10)
        assert not written["breaks"]
        assert max(written["errors"]) < 1e-5

@pytest.mark.parametrize("crop_seconds", [0.0, 1.0])
def test_lengths_rounded_up_are_few_and_change_no_loss(crop_seconds, ragged):
    tokenizer, lengths, losses = RandomProjectionTokenizer(n_codes=50), set(), []
    torch.manual_seed(0)
    model = MaskedAudioModel(Encoder(MICRO), 50, 1, 32)
    for round_rows in (1, 4):
        sounds = Sounds(ragged, crop_seconds, batch_seconds=9.0, workers=0)
        sounds.clips.round_rows = round_rows
        sums = []
        for batch in itertools.islice(sounds.batches(), 4):
            for part in split_batch(batch, 4.0, round_rows):
                assert part["wav"].numel() <= 4 * 16000
                part = to_device(part, torch.device("cpu"))
                inputs, targets = train_mam.prepare(part, model.encoder, tokenizer, 0.75)
                sums.append(train_mam.losses(model, inputs, targets)["loss"])
                if round_rows == 4:
                    lengths.add(part["noise"].shape[1] // BANDS)
        losses.append(torch.stack(sums).sum().item())
    longest = rows_in(int(sounds.clips.samples.max()))
    assert lengths <= {4, 8, 12, longest}
    assert max(lengths) == longest                      # never beyond the longest clip
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

if __name__ == "__main__":
    out, recompute = sys.argv[1:]
    on_ranks(Path(out), bool(recompute))
    common.leave()
