"""
A checkpoint as an encoder of X-ARES (pip install xares), the suite that scores frozen audio encoders.

    export BEATS_CHECKPOINT=out/mam_iter2.pt
    python -m xares.run --max-jobs 0 tools/xares_encoder.py tasks/esc50_task.py

BEATS_CHECKPOINT is what --init of evaluate.py takes, also several encoders, as in a.pt,b.pt. Without a GPU it
needs --max-jobs 0. Scores are kept in env/<task>/{embeddings,checkpoints}/BeatsEncoder: delete both before
another checkpoint. Tokens are handed over one after the other, 8 bands per 160 ms: an embedding every 20 ms,
also of a long sound, which the encoder hears in windows.

Measured with xares 0.1.3 (seed 42) on the sounds of two packs, tiny encoder after iteration 1, beside
evaluate.py --probe: ESC-50, 5 folds: MLP 21.4 %, ours 21.2 to 22.0 over five seeds; 40 Arabic words: MLP
11.5 %, ours 10.0 to 12.6. Its kNN was meant to be by cosine, as ours is, but is not: 7.75 %, ours 20.35, and
4.31 %, ours 11.11.
"""

import importlib.util
import os

import soundfile
import torch

import evaluate  # not its functions: X-ARES wants a single name here that ends with Encoder
from audio import windows
from common import check

if importlib.util.find_spec("torchaudio") and not importlib.util.find_spec("torchcodec"):
    import torchaudio  # new ones decode with torchcodec; without it X-ARES skips every clip in silence

    def read(path, *args, **kwargs):
        x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(x.T.copy()), rate

    torchaudio.load = read


class BeatsEncoder(torch.nn.Module):
    """(B, n) or (n,) waveforms at 16 kHz, up to ten minutes and more -> (B, T, D)"""

    sampling_rate, hop_size_in_ms = 16000, 20

    def __init__(self):
        super().__init__()
        check(
            "BEATS_CHECKPOINT" in os.environ,
            "say which encoder: BEATS_CHECKPOINT=out/mam_iter2.pt python -m xares.run ..."
        )
        self.model = evaluate.open_encoder(os.environ["BEATS_CHECKPOINT"]).eval()
        self.output_dim = self(torch.zeros(1, self.sampling_rate)).shape[-1]

    @torch.inference_mode()
    def forward(self, audio):
        parts = windows(torch.atleast_2d(audio))
        tokens = [self.model.features(part)[0] for _, part in parts]
        return torch.cat(tokens, dim=1)
