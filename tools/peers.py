"""
Other implementations, timed beside ours by bench.py --peer. Nothing is re-implemented here, all is theirs.

    pip install openbeats                                   # --peer openbeats: its encoder
    pip install --no-deps --ignore-requires-python espnet   # --peer espnet: its encoder and step
    pip install --no-deps torchaudio                        # --peer torchaudio: filter bank, clip by clip
    pip install kaldi-native-fbank                          # --peer kaldi: filter bank of 80 bins, its most

Each function takes our encoder and a batch, and returns {name of our piece: a function of theirs that does
the same work}. Encoders get our weights and have to give our outputs. (Install also what espnet then misses.)
"""
import functools
import logging
import warnings

import torch

from audio import BANDS, MELS, PATCH_FRAMES, SAMPLE_RATE, fbank
from common import UserError, autocast, check
from model import encoder_to_official

def same_encoder(peer, encoder, wav, lengths, dtype):
    """Give a peer our weights, print how far its output is from ours, and return a function: its features."""
    weights = encoder_to_official(encoder)[1]
    peer.eval().to(wav.device).load_state_dict(weights, strict=False)
    peer.fbank_mean = encoder.cfg.fbank_mean
    peer.fbank_std = encoder.cfg.fbank_std

    @torch.no_grad()
    def features(encode):
        with autocast(wav.device, dtype):
            return encode(wav, lengths)[0]

    ours = features(encoder.features)
    difference = (features(peer) - ours).abs().max()
    print(f"{type(peer).__module__}: largest difference from our output {difference:.2g}, "
          f"outputs reach {ours.abs().max():.2g}")
    return functools.partial(features, peer)

def openbeats(encoder, wav, lengths, dtype):
    from openbeats.beats_encoder import BeatsEncoder
    settings = encoder_to_official(encoder)[0]
    peer = BeatsEncoder(input_size=0, beats_config=settings, is_pretraining=False)
    return dict(encoder=same_encoder(peer, encoder, wav, lengths, dtype))

def espnet(encoder, wav, lengths, dtype):
    """Its step starts from a ready filter bank and ready labels, ours from the waveform."""
    from espnet2.beats.encoder import BeatsEncoder, BeatsPretrainingPredictor
    from espnet2.beats.espnet_model import BeatsPretrainModel
    logging.getLogger().setLevel(logging.ERROR)
    cfg = encoder.cfg
    settings = encoder_to_official(encoder)[0] | dict(
        use_flash_attn=False, codebook_vocab_size=1024, layer_wise_gradient_decay_ratio=1.0,
        decoder_layers=3, decoder_embed_dim=cfg.dim, decoder_attention_heads=cfg.heads)
    shape = dict(input_size=1, beats_config=settings, fbank_mean=cfg.fbank_mean, fbank_std=cfg.fbank_std)
    encode = same_encoder(BeatsEncoder(**shape, is_pretraining=False), encoder, wav, lengths, dtype)

    model = BeatsPretrainModel(
        encoder=BeatsEncoder(**shape, is_pretraining=True),
        decoder=BeatsPretrainingPredictor(beats_config=settings),
        ignore_id=-2, label_smoothing=0.1, waveform_input=False)
    model.to(wav.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01)
    features = fbank(wav)
    frames = torch.full_like(lengths, features.shape[1])
    tokens = frames // PATCH_FRAMES * BANDS
    target = torch.randint(1, 1025, (len(wav), int(tokens[0])), device=wav.device)

    def step():
        with autocast(wav.device, dtype):
            loss = model(features, frames, target, tokens)[0]
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(encoder=encode, mam=step)

def torchaudio(encoder, wav, lengths, dtype):
    from torchaudio.compliance import kaldi
    settings = dict(num_mel_bins=MELS, sample_frequency=SAMPLE_RATE)
    return dict(fbank=lambda: torch.stack([kaldi.fbank(x[None] * 2**15, **settings) for x in wav]))

def kaldi(encoder, wav, lengths, dtype):
    import kaldi_native_fbank as knf
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80

    def run():
        for x in wav:
            online = knf.OnlineFbank(options)
            online.accept_waveform(SAMPLE_RATE, (x * 2**15).tolist())       # lists are its only input
            online.input_finished()
            for i in range(online.num_frames_ready):
                online.get_frame(i)
    return dict(fbank=run)

PEERS = dict(openbeats=openbeats, espnet=espnet, torchaudio=torchaudio, kaldi=kaldi)

def pieces_of(name, *args):
    """Return {name of our piece: a peer's function that does the same}."""
    check(name in PEERS, f"--peer {name}: choose one of {', '.join(PEERS)}, or several by commas")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PEERS[name](*args)
    except ImportError as error:
        raise UserError(f"--peer {name}: {error}; tools/peers.py says how to install it") from None
