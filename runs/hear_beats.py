"""
A checkpoint behind the interface of the HEAR benchmark: load_model, get_timestamp_embeddings, get_scene_embeddings.

    PYTHONPATH=. hear-validator runs.hear_beats -m out/mam_iter2.pt -d cpu

A patch row is 160 ms long. For HEAR's finer grid the encoder runs on four copies of the sound, each 40 ms later than the one
before; an embedding is the mean over the 8 bands of one row, its time the centre of the row.
"""
import torch
import torch.nn.functional as F

import finetune
from model import BANDS, HOP, MIN_SAMPLES, PATCH, SAMPLE_RATE, num_tokens, rows_of

ROW, ROWS, STEP = PATCH * HOP, 62, 640      # samples of a patch row, rows of a chunk (9.9 s), samples from one embedding to the next

def load_model(model_file_path=""):
    """An encoder, ours or released."""
    if not model_file_path:
        raise finetune.UserError("no weights come with this module: give a checkpoint, as in load_model('out/mam_iter2.pt')")
    model = finetune.open_encoder(str(model_file_path)).eval()
    model.sample_rate = SAMPLE_RATE
    model.scene_embedding_size = model.timestamp_embedding_size = model.cfg.dim
    return model

@torch.no_grad()
def rows(audio, model):
    """(B, n) -> (B, R, D): mean over bands of every whole patch row, in chunks of 62 rows that overlap by a window's 15 ms."""
    count = max(1, num_tokens(audio.shape[1]) // BANDS)
    audio = F.pad(audio, (0, max(0, (count - 1) * ROW + MIN_SAMPLES - audio.shape[1])))
    starts = range(0, count, ROWS)
    return torch.cat([rows_of(model.features(audio[:, i * ROW:(min(i + ROWS, count) - 1) * ROW + MIN_SAMPLES])[0])[0].mean(2)
                      for i in starts], 1)

def get_timestamp_embeddings(audio, model):
    """audio: (B, n) in [-1, 1] at 16 kHz -> (B, T, D) float32; (B, T) centres in milliseconds, 40 ms apart."""
    count = max(1, num_tokens(audio.shape[1]) // BANDS)
    padded = F.pad(audio, (0, ROW))
    x = torch.stack([rows(padded[:, shift:], model)[:, :count] for shift in range(0, ROW, STEP)], 2).flatten(1, 2)
    centre = (torch.arange(x.shape[1], device=audio.device) * STEP + MIN_SAMPLES / 2) / (SAMPLE_RATE / 1000)     # exact in float32
    inside = max(1, int((centre <= audio.shape[1] / SAMPLE_RATE * 1000).sum()))
    return x[:, :inside].float(), centre[:inside].expand(len(audio), -1)

def get_scene_embeddings(audio, model):
    """audio: (B, n) -> (B, D) float32, mean over all rows."""
    return rows(audio, model).mean(1).float()
