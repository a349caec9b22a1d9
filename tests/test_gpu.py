"""What has to hold on a GPU: with one, all checks; without, that they run and no script mixes devices."""
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

import audio
import common
import evaluate
import finetune
import model
import train_mam
import train_tokenizer
from tools import bench, gpu_check

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch")

# ---- gpu_check.py

def outcomes(path):
    """{check: outcome} of the rows in a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["check"]: row["outcome"] for row in rows if "check" in row}

@needs_card
def test_every_check_passes_on_the_card(tmp_path):
    gpu_check.main(model="tiny", clips=4, device="cuda", out=str(tmp_path / "check.jsonl"))

@pytest.mark.slow
def test_every_check_passes_on_a_cpu(tmp_path):
    out = tmp_path / "check.jsonl"
    gpu_check.main(model="micro", clips=1, compile=False, device="cpu", out=str(out))
    seen = outcomes(out)
    assert {"fbank", "mam learns", "resumed", "on 2 ranks", "micro tokenizer eager"} <= set(seen)
    not_on_a_cpu = {f"{name} does not wait" for name in bench.STEPS}
    assert seen == {name: "-" if name in not_on_a_cpu else "ok" for name in seen}

@pytest.fixture
def checks(monkeypatch, tmp_path):
    """checks(functions, **flags): the outcomes of other checks, and the exit status."""
    def run(*functions, **flags):
        monkeypatch.setattr(gpu_check, "CHECKS", functions)
        out, status = tmp_path / "check.jsonl", 0
        try:
            gpu_check.main(device="cpu", out=str(out), **flags)
        except SystemExit as stop:
            status = stop.code
        return outcomes(out), status
    return run

def fails():
    raise RuntimeError("out of memory")

def test_a_check_that_breaks_is_a_row_and_stops_no_other(checks, capsys):
    def several(cfg, device):
        yield "first", fails
        yield "second", lambda: (True, dict(value=1.0))
        fails()
    seen = dict(first="FAILED", second="ok", several="FAILED", fbank="ok")
    assert checks(several, gpu_check.front_end) == (seen, 1)
    assert "error RuntimeError('out of memory') (test_gpu.py:" in capsys.readouterr().out

def test_the_exit_status_is_0_if_nothing_failed(checks):
    assert checks(gpu_check.front_end) == (dict(fbank="ok"), 0)

def test_what_begins_too_late_is_left_out(checks):
    assert checks(gpu_check.front_end, minutes=1e-9) == (dict(fbank="-"), 0)

@pytest.mark.parametrize("fault", ["no gate", "nan in a gradient"])
def test_attention_that_is_wrong_is_found(checks, monkeypatch, fault):
    def faulty(q, k, v, gate, bias, key_bias):
        if model.ATTENTION == "fused" and fault == "no gate":
            gate = torch.ones_like(gate)
        if model.ATTENTION == "fused" and fault == "nan in a gradient":
            k.register_hook(lambda gradient: gradient * torch.nan)
        return attend(q, k, v, gate, bias, key_bias)

    attend = model.attend
    monkeypatch.setattr(model, "attend", faulty)
    monkeypatch.setattr(gpu_check, "SHAPES", [(24, True)])
    seen, status = checks(gpu_check.attention)
    assert status == 1
    for name, outcome in seen.items():
        assert outcome == ("FAILED" if "fused" in name else "ok")

# ---- whole scripts on a card that is not there

def on_card(x):
    return isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type == "cuda"

class PretendCard(FakeTensorMode):
    """Tensors on "cuda" have shapes and hold nothing, those of the CPU are real, and mixing them is an error.

    What comes back from the card is zeros, a single number 1; a mask that rows are chosen by is all true.
    """
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if not any(map(on_card, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            assert args[0].device == args[1][0].device
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        return super().__torch_dispatch__(func, types, args, kwargs)

def to(module, device):
    """Do module.to(device), which swaps tensors where it cannot do so with those that hold nothing."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(device)
                part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(device)
    return module

@pytest.fixture
def card(monkeypatch):
    """The device of a pretended card. There is no backward pass on it."""
    def load(*args, **kwargs):
        with unset_fake_temporarily():
            return torch_load(*args, **kwargs)

    def save(content, file):
        content = tree_map(lambda x: x.cpu() if isinstance(x, FakeTensor) else x, content)
        with unset_fake_temporarily():
            torch_save(content, file)

    device, torch_load, torch_save = torch.device("cuda"), torch.load, torch.save
    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(common, "setup", lambda *args: (0, 1, device))
    monkeypatch.setattr(common, "matrix_rate", lambda *args: 1.0)
    monkeypatch.setattr(model, "CONVOLUTION", "direct")         # auto would time both ways
    audio.constants_on.cache_clear()
    with PretendCard(allow_non_fake_inputs=True):
        yield device
    audio.constants_on.cache_clear()

@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_script_mixes_devices(card, toy, ragged, tmp_path, dtype):
    """A build of torch for CUDA is enough, no card is needed."""
    shared = dict(out_dir=str(tmp_path), dtype=dtype)
    training = shared | dict(batch_seconds=21.0, max_steps=2, log_every=1, eval_every=1, save_every=1)
    first, tuned = f"{tmp_path}/mam_iter1.pt", f"{tmp_path}/finetune_ragged_fold{{fold}}.pt"
    train_mam.main(model="micro", data=toy, **training)
    for targets in ("whiten", "centre"):
        shape = dict(codes=64, code_dim=16, estimator_blocks=1)
        train_tokenizer.main(data=toy, targets=targets, disturb=0.5, **shape, **training)
    train_mam.main(model="micro", data=toy, iter=2, probe=ragged, device_seconds=11.0, **training)
    train_mam.main(model="micro", data=toy, iter=2, resume=True, **training | dict(max_steps=3))
    finetune.main(data=ragged, init=first, mixup=0.5, spec_augment=0.2, layerdrop=0.1, **training)
    evaluate.main(data=ragged, init=first, probe="linear,mlp,knn", layers="all", **shared)
    evaluate.main(data=ragged, ensemble=tuned, **shared)

@needs_cuda_build
def test_the_pretended_card_knows_what_is_where(card):
    there = torch.zeros(3, 4, device=card)
    assert (there + 1).device.type == "cuda"
    assert there.cpu().tolist() == torch.zeros(3, 4).tolist()
    with pytest.raises(RuntimeError, match="on the same device.* cuda:0 and cpu"):
        there + torch.zeros(4)
