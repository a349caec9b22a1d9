"""What several test files share: small models, packs of made sounds, sound files."""
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
from model import PREDICTORS, PRESETS, Encoder, EncoderConfig

ROOT = Path(__file__).parent.parent
MICRO = EncoderConfig(layers=2, dim=32, ffn=64, heads=2, patch_dim=16, conv_pos=16, conv_groups=4, buckets=32,
                      max_distance=64, dropout=0.0, attention_dropout=0.0)
PRESETS["micro"], PREDICTORS["micro"] = MICRO, (1, 32)              # for the scripts' main(model="micro")

@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the official code on small models with random weights."""
    return torch.load(ROOT / "tests/golden.pt", weights_only=True)

@pytest.fixture
def official(golden, tmp_path):
    """official("encoder" | "finetuned" | "tokenizer"): the path of an official checkpoint."""
    def write(kind):
        torch.save(golden[kind]["checkpoint"], tmp_path / f"{kind}.pt")
        return tmp_path / f"{kind}.pt"
    return write

@pytest.fixture
def random_encoder():
    """A micro encoder whose every parameter matters: nothing at zero or one."""
    torch.manual_seed(0)
    encoder = Encoder(MICRO)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The path of a pack of 80 made sounds of 3 s."""
    path = tmp_path_factory.mktemp("packs") / "toy"
    data.make_toy(path, clips=80)
    return str(path)

@pytest.fixture(scope="session")
def ragged(tmp_path_factory):
    """The path of a labelled pack of 24 tones of 0.3 to 2 s in 3 folds."""
    def read(row):
        noise = np.random.default_rng(row["samples"]).standard_normal(row["samples"])
        return (0.3 * np.sin(row["tone"] * np.arange(row["samples"])) + 0.01 * noise).astype(np.float32)
    rows = [dict(path=str(i), labels=["ab"[i % 2]], split=str(i % 3 + 1), group="", samples=4800 + 1200 * i,
                 tone=(0.1, 0.5)[i % 2]) for i in range(24)]
    path = tmp_path_factory.mktemp("packs") / "ragged"
    data.write_pack(path, rows, read)
    return str(path)

@pytest.fixture
def write_wav(tmp_path):
    """write_wav("folder/name.wav", samples, rate): the path of a sound file."""
    def write(name, x, rate=16000, **options):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, x, rate, **options)
        return tmp_path / name
    return write
