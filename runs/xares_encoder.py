"""
A checkpoint as an encoder of X-ARES (pip install xares), the suite that scores frozen audio encoders. From this folder's parent:

    BEATS_CHECKPOINT=out/mam_iter2.pt python -m xares.run --max-jobs 0 runs/xares_encoder.py tasks/esc50_task.py

BEATS_CHECKPOINT is anything --init of finetune.py takes, also several encoders, as in a.pt,b.pt. --max-jobs 0 is needed without
a GPU. Scores are kept in env/<task>/{embeddings,checkpoints}/BeatsEncoder: delete both before another checkpoint.
Tokens are handed over one after the other, 8 bands per 160 ms: an embedding every 20 ms.

Measured with xares 0.1.3 (seed 42) on the sounds of two packs, tiny encoder after iteration 1, beside finetune.py --probe:
ESC-50, 5 folds: MLP 21.4 %, ours 21.2 to 22.0 over five seeds; kNN 7.75 %, ours (knn_xares) 7.75, and 20.35 with cosines as
intended (knn). 40 Arabic words: MLP 11.5 %, ours 10.0 to 12.6; kNN 4.31 %, ours 4.31, and 11.11 as intended.
"""
import importlib.util
import os

import soundfile
import torch

import finetune     # modules only: X-ARES wants a single name here that ends with Encoder

if importlib.util.find_spec("torchaudio") and not importlib.util.find_spec("torchcodec"):
    import torchaudio       # new ones decode with torchcodec; without it X-ARES would skip every clip without a word

    def read(path, *args, **kwargs):
        x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(x.T.copy()), rate

    torchaudio.load = read

class BeatsEncoder(torch.nn.Module):
    """(B, n) or (n,) waveforms at 16 kHz, up to ten minutes and more -> (B, T, D)"""
    sampling_rate, hop_size_in_ms = 16000, 20

    def __init__(self):
        super().__init__()
        if "BEATS_CHECKPOINT" not in os.environ:
            raise finetune.UserError("say which encoder: BEATS_CHECKPOINT=out/mam_iter2.pt python -m xares.run ...")
        self.model = finetune.open_encoder(os.environ["BEATS_CHECKPOINT"]).eval()
        self.output_dim = self(torch.zeros(1, self.sampling_rate)).shape[-1]

    @torch.inference_mode()
    def forward(self, audio):
        chunks = torch.atleast_2d(audio).split(10 * self.sampling_rate, dim=1)
        pad = lambda x: torch.nn.functional.pad(x, (0, max(0, self.sampling_rate - x.shape[1])))       # a last rest of under a second
        return torch.cat([self.model.features(pad(chunk))[0] for chunk in chunks], dim=1)
