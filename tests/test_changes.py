"""Diffs of changes/: small, said in three lines, applied to a copy where a child runs what they are about."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import train_mam
import train_tokenizer
from audio import BANDS, fbank, num_tokens
from conftest import MICRO, ROOT
from model import Block, Encoder, MaskedAudioModel, load, random_mask
from tokenizer import RandomProjectionTokenizer, load_tokenizer

CHANGES = {path.stem: path for path in sorted((ROOT / "changes").glob("*.diff"))}
TOOLS = dict(git=["git", "apply"], patch=["patch", "-s", "-F0", "-p1", "-i"])
TOOLS = {tool: command for tool, command in TOOLS.items() if shutil.which(tool)}
every_change = pytest.mark.parametrize("name", CHANGES)
needs_tools = pytest.mark.skipif(not TOOLS, reason="neither git nor patch")

def changed_copy(name, copy, tool):
    """Copy the code to a folder and apply a change to it there."""
    for source in [*ROOT.glob("*.py"), *ROOT.glob("recipes/*.py"), *ROOT.glob("tools/*.py")]:
        target = copy / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    # were the copy inside of a repository, git would take its paths for the repository's
    env = os.environ | dict(GIT_CEILING_DIRECTORIES=str(copy.resolve().parent))
    command = [*TOOLS[tool], str(CHANGES[name])]
    run = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

@every_change
def test_a_change_is_small_and_says_what_it_is(name):
    header, start, body = CHANGES[name].read_text().partition("diff --git ")
    assert [line.partition(": ")[0] for line in header.splitlines()] == ["Idea", "Paper", "See"]
    added = re.findall(r"^\+(?!\+\+ )(.*)", body, re.M)
    assert 1 <= len(added) <= 15
    assert max(map(len, header.splitlines() + added)) <= 110

@needs_tools
@every_change
def test_a_change_applies_by_git_and_by_patch_alike(name, tmp_path):
    files = re.findall(r"^\+\+\+ b/(\S+)", CHANGES[name].read_text(), re.M)
    changed = []
    for tool in TOOLS:
        changed_copy(name, tmp_path / tool, tool)
        changed.append([(tmp_path / tool / file).read_text() for file in files])
    assert all(texts == changed[0] for texts in changed)
    for file, text in zip(files, changed[0]):
        assert text != (ROOT / file).read_text()
        compile(text, file, "exec")

@pytest.mark.slow
@needs_tools
@every_change
def test_a_change_does_what_it_is_about(name, toy, ragged, tmp_path):
    copy = tmp_path / "copy"
    changed_copy(name, copy, next(iter(TOOLS)))
    for file in ("conftest.py", "test_changes.py"):
        shutil.copy(ROOT / "tests" / file, copy)
    command = f"import test_changes; test_changes.check_{name}({toy!r}, {ragged!r})"
    run = subprocess.run([sys.executable, "-c", command], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]

# ---- what the children do, in a copy: a few steps, then what the change is about

SHARED = dict(max_steps=4, batch_seconds=21.0, warmup_steps=2, log_every=2, device="cpu", dtype="float32")

def pretrain(pack, **flags):
    """Run a few steps; return the result and the trained encoder, as others would load it."""
    result = train_mam.main(data=pack, model="micro", **SHARED, **flags)
    assert result["step"] == 4 and math.isfinite(result["valid_loss"])
    return result, load(f"out/mam_iter{flags.get('iter', 1)}.pt")

def weights_of(path):
    return torch.load(path, weights_only=True)["model"]

def prepared(pack, codes=1024):
    """Return a model, what it takes of a batch of held-out clips, and the targets."""
    torch.manual_seed(0)
    sounds = data.Sounds(pack, 2.56, 21.0, 0, 0)
    batch = next(iter(sounds.held_out("cpu")))
    model = MaskedAudioModel(Encoder(MICRO), codes, 1, 32)
    inputs, targets = train_mam.prepare(batch, model.encoder, RandomProjectionTokenizer(), 0.75)
    return model, inputs | dict(valid=batch["valid"]), targets

def mask_of(pack):
    """Return which tokens of a batch are masked and which are valid: (B, rows, BANDS) bool each."""
    _, inputs, _ = prepared(pack)
    valid, masked = inputs["valid"], inputs["masked"]
    count = valid.sum(1)
    assert ((masked < valid.shape[1]).sum(1) == count - (0.25 * count.double()).round().clamp(min=1)).all()
    return grid_of(masked, valid), valid.unflatten(1, (-1, BANDS))

def grid_of(masked, valid):
    grid = torch.zeros(len(valid), valid.shape[1] + 1, dtype=torch.bool).scatter(1, masked, True)
    return grid[:, :-1].unflatten(1, (-1, BANDS))

def check_every_parameter_learns(pack):
    """As DistributedDataParallel wants it."""
    model, inputs, targets = prepared(pack)
    train_mam.losses(model, inputs, targets)["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

def check_padding_is_not_seen():
    torch.manual_seed(0)
    encoder, x = Encoder(MICRO).eval(), torch.randn(2, 40, 256)
    valid = torch.arange(40) < torch.tensor([[40], [24]])
    alone = encoder(x[1:, :24])
    assert torch.allclose(encoder(x, valid)[1:, :24], alone, atol=1e-5)

def check_reconstruct(toy, ragged):
    """A model that predicts nothing has the variance of patches, 1, for its loss."""
    pretrain(toy)
    model, inputs, targets = prepared(toy, codes=256)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    sums = train_mam.losses(model, inputs, targets)
    assert abs(sums["loss"] / sums["count"] - 1) < 0.01
    assert weights_of("out/mam_iter1.pt")["head.weight"].shape[0] == 256

def outside_blocks(masked, valid):
    """Count the masked tokens of each clip that lie in no masked block of 3 by 3 (cut at the edges)."""
    shut = (~masked & valid).float()
    centres = (F.max_pool2d(shut, 3, 1, 1) == 0) & valid
    blocks = F.max_pool2d(centres.float(), 3, 1, 1) > 0
    return (masked & ~blocks).sum((1, 2))

def check_block_masking(toy, ragged):
    """What is masked are blocks, but for one that is not wholly needed; single patches are none."""
    pretrain(toy)
    for pack in (toy, ragged):
        masked, valid = mask_of(pack)
        assert outside_blocks(masked, valid).max() < 9
    noise, all_valid = torch.rand(20, 128), torch.ones(20, 128, dtype=torch.bool)
    _, scattered = random_mask(noise, all_valid, 0.75)
    scattered = grid_of(scattered, all_valid)
    assert outside_blocks(scattered, all_valid.unflatten(1, (-1, BANDS))).float().mean() > 30

def check_time_masking(toy, ragged):
    """All bands of a row are masked or none, but for one row of which a part is needed."""
    pretrain(toy)
    for pack in (toy, ragged):
        masked, _ = mask_of(pack)
        assert (masked.any(2) & ~masked.all(2)).sum(1).max() <= 1

def check_focal(toy, ragged):
    """The loss is (1 - p)^2 of the cross-entropy, patch by patch, and both are logged."""
    result, _ = pretrain(toy)
    assert 0 < result["valid_loss"] < result["valid_cross_entropy"]
    model, inputs, targets = prepared(toy)
    sums = train_mam.losses(model, inputs, targets)
    wanted = targets >= 0
    p = model(**inputs).softmax(-1)[wanted].gather(1, targets[wanted][:, None])
    assert torch.allclose(sums["loss"], ((1 - p) ** 2 * -p.log()).sum())
    assert torch.allclose(sums["cross_entropy"], -p.log().sum())

def check_mel64(toy, ragged):
    """Half the bands, a tone in its place, and statistics of a pack that are of this front end."""
    before = json.loads(Path(toy, "pack.json").read_text())
    assert BANDS == 4 and num_tokens(160000) == 62 * 4
    wav = torch.sin(2 * math.pi * 1000 / 16000 * torch.arange(16000))[None]
    low, tone, high = (1127 * math.log(1 + hz / 700) for hz in (20, 1000, 8000))
    assert fbank(wav).mean(1).argmax() == round(65 * (tone - low) / (high - low)) - 1
    _, encoder = pretrain(toy)
    assert weights_of("out/mam_iter1.pt")["band"].shape[0] == 4
    assert abs(encoder.cfg.fbank_mean - before["fbank_mean"]) > 0.1

def check_swiglu(toy, ragged):
    """silu(W x) * V x between two matrices, with as many parameters as two of full width have."""
    pretrain(toy)
    check_every_parameter_learns(toy)
    torch.manual_seed(0)
    block, x = Block(MICRO, 2), torch.randn(1, 5, 32)
    weights = sum(layer.weight.numel() for layer in (block.fc1, block.fc2))
    assert abs(weights / (2 * 32 * 64) - 1) < 0.03
    w, v = block.fc1.weight.chunk(2)
    attended = block.ln1(block.alpha * x + block.attn(x, torch.zeros(1, 2, 5, 5), None))
    silu = attended @ w.T * torch.sigmoid(attended @ w.T)
    expected = block.ln2(block.alpha * attended + silu * (attended @ v.T) @ block.fc2.weight.T)
    assert torch.allclose(block(x, torch.zeros(1, 2, 5, 5), None), expected, atol=1e-5)

def check_register_tokens(toy, ragged):
    """Registers are read by all tokens and learn, have no place, and nobody outside sees them."""
    _, encoder = pretrain(toy)
    check_every_parameter_learns(toy)
    check_padding_is_not_seen()
    x, stack = torch.randn(2, 16, 256), encoder.transformer
    assert stack.registers.shape == (4, 32)
    before = encoder(x, all_layers=True)
    assert {state.shape for state in before} == {(2, 16, 32)}
    with torch.no_grad():
        stack.registers.copy_(stack.registers[[2, 0, 3, 1]])
        assert torch.allclose(encoder(x), before[-1], atol=1e-5)
        stack.registers += 1
        assert ((encoder(x) - before[-1]).abs().amax(-1) > 1e-3).all()

def check_all_patches(toy, ragged):
    """The encoder computes on all tokens, knows nothing of hidden patches, and is an ordinary one."""
    pretrain(toy)
    check_every_parameter_learns(toy)
    model, inputs, _ = prepared(toy)
    heard = []
    model.encoder.transformer.register_forward_hook(lambda *call: heard.append(call[1][0].shape[1]))
    logits = model(**inputs)
    assert heard == [inputs["patches"].shape[1]]
    masked, valid = inputs["masked"], inputs["valid"]
    noise = grid_of(masked, valid).flatten(1)[..., None] * torch.randn(256)
    assert torch.equal(model(**inputs | dict(patches=inputs["patches"] + noise)), logits)
    assert not torch.allclose(model(**inputs | dict(patches=inputs["patches"] + 1)), logits, atol=1e-3)

def check_rope(toy, ragged):
    """No parameter is of positions, and what tokens say to each other depends on how far apart they are."""
    _, encoder = pretrain(toy)
    check_every_parameter_learns(toy)
    check_padding_is_not_seen()
    names = [name for name, _ in encoder.transformer.named_parameters()]
    assert not re.search("position|gate", " ".join(names))
    x, places = torch.randn(1, 5, 32), torch.tensor([[0, 3, 9, 20, 33]])
    y = encoder.transformer(x, positions=places)
    rows, bands = 5 * BANDS, 2
    assert torch.allclose(encoder.transformer(x, positions=places + rows + bands), y, atol=1e-5)
    for farther in (BANDS, 1):
        moved = places + torch.tensor([0, 0, 0, 0, farther])
        assert (encoder.transformer(x, positions=moved) - y).abs().max() > 1e-4

def check_fsq(toy, ragged):
    """Codes are the rounded numbers, each is that of its vector, and training moves none."""
    pretrain(toy)
    size = dict(codes=64, code_dim=3, estimator_blocks=1)
    distilled = train_tokenizer.main(data=toy, **size, **SHARED)
    assert distilled["valid_codes_used"] > 1 and math.isfinite(distilled["valid_loss"])
    codebook = load_tokenizer("out/tokenizer_iter2.pt").codebook
    z = torch.randn(500, 3)
    digits = (1.5 * (z.tanh() + 1)).round().long()
    assert torch.equal(codebook(z)[1], digits @ torch.tensor([16, 4, 1]))
    reached = codebook((0.999 * codebook.vectors()).atanh())[1]
    assert torch.equal(reached, torch.arange(64))
    assert not list(codebook.parameters())
    assert not re.search("(update|revive|start)_\\(", Path("train_tokenizer.py").read_text())
    pretrain(toy, iter=2)
