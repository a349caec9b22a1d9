"""What several test files share: small models, packs of made sounds, sound files."""
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import common
import data
from model import PREDICTORS, PRESETS, Classifier, Encoder, EncoderConfig
from tokenizer import SelfDistilledTokenizer

ROOT = Path(__file__).parent.parent
MICRO = EncoderConfig(layers=2, dim=32, ffn=64, heads=2, patch_dim=16, conv_pos=16, conv_groups=4, buckets=32,
                      max_distance=64, dropout=0.0, attention_dropout=0.0)
PRESETS["micro"], PREDICTORS["micro"] = MICRO, (1, 32)              # for the scripts' main(model="micro")
common.matrix_rate = functools.partial(common.matrix_rate, n=256)   # a second less for each run

def row_of(path, labels=(), split="", **more):
    """Return the row of a recording, as recipes make them."""
    return dict(path=str(path), labels=list(labels), split=split, group="", **more)

def save_classifier(encoder, path, labels):
    """Write a file as finetune.py does, with a random head."""
    model = Classifier(encoder, labels, False)
    torch.nn.init.normal_(model.head.weight)
    configuration = dict(encoder=dataclasses.asdict(encoder.cfg), labels=labels, multilabel=False)
    torch.save(dict(kind="classifier", model=model.state_dict(), **configuration), path)

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
    encoder = Encoder(dataclasses.replace(MICRO))
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()

@pytest.fixture
def distilled():
    """A micro tokenizer of 32 codes, with its estimator."""
    torch.manual_seed(0)
    encoder = Encoder(dataclasses.replace(MICRO))
    made = SelfDistilledTokenizer(encoder, n_codes=32, code_dim=8, estimator_blocks=1, target_width=32)
    made.codebook.start_(torch.randn(500, 8))
    return made.eval()

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
    rows = [row_of(i, "ab"[i % 2], str(i % 3 + 1), samples=4800 + 1200 * i, tone=(0.1, 0.5)[i % 2])
            for i in range(24)]
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
