import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data                                     # noqa: E402
from model import PRESETS, Encoder, EncoderConfig   # noqa: E402

MICRO = EncoderConfig(layers=2, dim=32, ffn=64, heads=2, patch_dim=16, conv_pos=16, conv_groups=4, buckets=32, max_distance=64,
                      dropout=0.0, attention_dropout=0.0)
PRESETS["micro"] = MICRO    # for the scripts' main(model="micro")

@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the official code on small models with random weights."""
    return torch.load(Path(__file__).parent / "golden.pt", weights_only=True)

@pytest.fixture
def official(golden, tmp_path):
    """Path of an official checkpoint: official("encoder" | "finetuned" | "tokenizer")."""
    def write(kind):
        torch.save(golden[kind]["checkpoint"], tmp_path / f"{kind}.pt")
        return tmp_path / f"{kind}.pt"
    return write

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A pack of 80 made sounds of 3 s."""
    path = tmp_path_factory.mktemp("packs") / "toy"
    data.make_toy(path, clips=80)
    return str(path)

@pytest.fixture(scope="session")
def ragged(tmp_path_factory):
    """A labelled pack of 24 clips of 0.3 to 2 s in 3 folds."""
    path = tmp_path_factory.mktemp("packs") / "ragged"
    rows = [dict(path=f"{i}", labels=["ab"[i % 2]], split=str(i % 3 + 1), group="", n=int(4800 + i * 1200)) for i in range(24)]
    tone = lambda row: 0.3 * np.sin(np.arange(row["n"]) * (0.1 if row["labels"] == ["a"] else 0.5)).astype(np.float32)
    data.write_pack(path, rows, lambda row: tone(row) + 0.01 * np.random.default_rng(row["n"]).standard_normal(row["n"]).astype(np.float32))
    return str(path)

@pytest.fixture
def random_encoder():
    """A micro encoder whose every parameter matters: nothing at zero or one."""
    torch.manual_seed(0)
    encoder = Encoder(MICRO)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return encoder.eval()

@pytest.fixture
def write_wav(tmp_path):
    def write(name, x, rate=16000, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, x, rate, **options)
        return path
    return write
