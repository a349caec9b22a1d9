"""
Other implementations, to be timed beside ours by bench.py --peer: nothing here is re-implemented, all of it is theirs.

    pip install openbeats                                       # --peer openbeats: its encoder
    pip install --no-deps --ignore-requires-python espnet       # --peer espnet: encoder and pre-training step (and what it then misses)
    pip install --no-deps torchaudio                            # --peer torchaudio: filter bank, one clip after the other,
                                                                # as both of them do
    pip install kaldi-native-fbank                              # --peer kaldi: its filter bank, 80 bins, for it refuses 128

Each function takes our encoder and bench.py's batch and returns {name of our piece: theirs, a function that does the same work}.
Encoders get our weights and have to give our outputs. Training steps end with clipping and AdamW.
"""
import logging
import warnings

import torch

from common import UserError, autocast
from model import SAMPLE_RATE, fbank
from official import encoder_to_official

def with_our_weights(peer, encoder, wav, lengths, dtype):
    """{"encoder": waveform -> features by the peer's code}; prints how far its output is from ours."""
    peer.eval().to(wav.device).load_state_dict(encoder_to_official(encoder)[1], strict=False)
    peer.fbank_mean, peer.fbank_std = encoder.cfg.fbank_mean, encoder.cfg.fbank_std
    @torch.no_grad()
    def forward():
        with autocast(wav.device, dtype):
            return peer(wav, lengths)[0]
    with torch.no_grad(), autocast(wav.device, dtype):
        ours = encoder.features(wav, lengths)[0]
        print(f"{type(peer).__module__}: largest difference from our output {(forward() - ours).abs().max():.2g}, "
              f"outputs reach {ours.abs().max():.2g}")
    return dict(encoder=forward)

def openbeats(encoder, wav, lengths, dtype):
    from openbeats.beats_encoder import BeatsEncoder
    peer = BeatsEncoder(input_size=0, beats_config=encoder_to_official(encoder)[0], is_pretraining=False)
    return with_our_weights(peer, encoder, wav, lengths, dtype)

def espnet(encoder, wav, lengths, dtype):
    """Its step starts from a ready filter bank and ready labels, ours from the waveform."""
    from espnet2.beats.encoder import BeatsEncoder, BeatsPretrainingPredictor
    from espnet2.beats.espnet_model import BeatsPretrainModel
    logging.getLogger().setLevel(logging.ERROR)
    cfg = encoder.cfg
    settings = encoder_to_official(encoder)[0] | dict(use_flash_attn=False, codebook_vocab_size=1024, decoder_layers=3,
        decoder_embed_dim=cfg.dim, decoder_attention_heads=cfg.heads, layer_wise_gradient_decay_ratio=1.0)
    stats = dict(fbank_mean=cfg.fbank_mean, fbank_std=cfg.fbank_std)
    pieces = with_our_weights(BeatsEncoder(input_size=1, beats_config=settings, is_pretraining=False, **stats),
                              encoder, wav, lengths, dtype)
    model = BeatsPretrainModel(encoder=BeatsEncoder(input_size=1, beats_config=settings, is_pretraining=True, **stats),
                               decoder=BeatsPretrainingPredictor(beats_config=settings), ignore_id=-2, label_smoothing=0.1,
                               waveform_input=False).to(wav.device).train()
    features = fbank(wav)
    frames = torch.full_like(lengths, features.shape[1])
    tokens = torch.full_like(lengths, features.shape[1] // 16 * 8)
    target = torch.randint(1, 1025, (len(wav), int(tokens[0])), device=wav.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01)
    def mam():
        with autocast(wav.device, dtype):
            loss = model(features, frames, target, tokens)[0]
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return pieces | dict(mam=mam)

def torchaudio(encoder, wav, lengths, dtype):
    from torchaudio.compliance import kaldi
    settings = dict(num_mel_bins=128, sample_frequency=SAMPLE_RATE, frame_length=25, frame_shift=10)
    return dict(fbank=lambda: torch.stack([kaldi.fbank(x[None] * 2**15, **settings) for x in wav]))

def kaldi(encoder, wav, lengths, dtype):
    import kaldi_native_fbank as knf
    options = knf.FbankOptions()
    options.frame_opts.dither, options.mel_opts.num_bins = 0.0, 80
    def run():
        for x in wav:
            online = knf.OnlineFbank(options)
            online.accept_waveform(SAMPLE_RATE, (x * 2**15).tolist())       # as its documentation does; lists are its only input
            online.input_finished()
            [online.get_frame(i) for i in range(online.num_frames_ready)]
    return dict(fbank=run)

PEERS = dict(openbeats=openbeats, espnet=espnet, torchaudio=torchaudio, kaldi=kaldi)

def pieces_of(name, *args):
    if name not in PEERS:
        raise UserError(f"--peer {name}: choose one of {', '.join(PEERS)}, or several by commas")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PEERS[name](*args)
    except ImportError as error:
        raise UserError(f"--peer {name}: {error}; python peers.py says how to install it") from None

if __name__ == "__main__":
    print(__doc__)
