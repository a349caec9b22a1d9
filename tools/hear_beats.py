"""
A checkpoint behind the interface of the HEAR benchmark: load_model, get_timestamp_embeddings,
get_scene_embeddings.

    PYTHONPATH=. hear-validator tools.hear_beats -m out/mam_iter2.pt -d cpu

A patch row is 160 ms long. For HEAR's finer grid the encoder runs on four copies of the sound, each 40 ms
later than the one before; an embedding is the mean over the 8 bands of one row, its time the row's centre.
"""

import torch
import torch.nn.functional as F

from audio import BANDS, MIN_SAMPLES, ROW, SAMPLE_RATE, check_wav, windows
from common import check
from model import load_encoder

STEP = 640  # samples from one embedding to the next


def load_model(model_file_path=""):
    """Return an encoder, ours or released."""
    check(
        model_file_path,
        "no weights come with this module; give a checkpoint: load_model('out/mam.pt')"
    )
    model = load_encoder(model_file_path)
    model.sample_rate = SAMPLE_RATE
    model.scene_embedding_size = model.cfg.dim
    model.timestamp_embedding_size = model.cfg.dim
    return model


@torch.no_grad()
def rows(audio, model):
    """(B, n) -> (B, R, D): mean over bands of every patch row."""
    parts = []
    for _, part in windows(audio):
        x, _ = model.features(part)
        parts.append(x.unflatten(1, (-1, BANDS)).mean(2))
    return torch.cat(parts, 1)


def get_timestamp_embeddings(audio, model):
    """audio: (B, n) in [-1, 1] at 16 kHz -> (B, T, D) float32; (B, T) centres, 40 milliseconds apart."""
    check_wav(audio)
    n = audio.shape[1]
    padded = F.pad(audio, (0, ROW - STEP))
    shifted = [rows(padded[:, shift : shift + n], model) for shift in range(0, ROW, STEP)]
    x = torch.stack(shifted, 2).flatten(1, 2)

    reach = max(0, n - MIN_SAMPLES // 2)  # no centre beyond the sound
    x = x[:, : reach // STEP + 1]
    centre = torch.arange(x.shape[1], device=audio.device) * STEP + MIN_SAMPLES / 2
    milliseconds = centre / (SAMPLE_RATE / 1000)  # exact in float32, also of an hour
    return x, milliseconds.expand(len(audio), -1)


def get_scene_embeddings(audio, model):
    """audio: (B, n) -> (B, D) float32, mean over all rows."""
    return rows(audio, model).mean(1)
