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

import torch

import common
from audio import MELS, SAMPLE_RATE, fbank, num_tokens
from common import UserError, autocast, check
from model import encoder_to_official

# -----------------------------------------------------------------------------
# the same around theirs and ours


@torch.no_grad()
def features(encode, batch, dtype):
    """Return encode(wav, lengths)[0]."""
    with autocast(batch["wav"].device, dtype):
        return encode(batch["wav"], batch["lengths"])[0]


def training_step(model, losses, device, dtype):
    """Return a function that does a step: forward, backward, clipping, AdamW. losses() -> dict of sums"""
    optimizer = common.make_optimizer(model, 1e-5, 0.01)

    def step():
        with autocast(device, dtype):
            sums = losses()
        (sums["loss"] / sums["count"]).float().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# -----------------------------------------------------------------------------
# theirs


def same_encoder(BeatsEncoder, encoder, batch, dtype):
    """Return a function: the features of a peer with our weights. Prints how far they are from ours."""
    settings, weights = encoder_to_official(encoder)
    peer = BeatsEncoder(input_size=1, beats_config=settings, is_pretraining=False)
    peer.eval().to(batch["wav"].device).load_state_dict(weights, strict=False)
    peer.fbank_mean = encoder.cfg.fbank_mean
    peer.fbank_std = encoder.cfg.fbank_std

    difference = features(peer, batch, dtype) - features(encoder.features, batch, dtype)
    print(f"{peer.__module__}: largest difference from our output {difference.abs().max():.2g}")
    return functools.partial(features, peer, batch, dtype)


def openbeats(encoder, batch, dtype):
    from openbeats.beats_encoder import BeatsEncoder

    return dict(encoder=same_encoder(BeatsEncoder, encoder, batch, dtype))


def espnet(encoder, batch, dtype):
    """Its step starts from a ready filter bank and ready labels, ours from the waveform."""
    from espnet2.beats.encoder import BeatsEncoder, BeatsPretrainingPredictor
    from espnet2.beats.espnet_model import BeatsPretrainModel

    settings = encoder_to_official(encoder)[0] | dict(
        decoder_embed_dim=encoder.cfg.dim, decoder_attention_heads=encoder.cfg.heads
    )
    model = BeatsPretrainModel(
        encoder=BeatsEncoder(input_size=1, beats_config=settings, is_pretraining=True),
        decoder=BeatsPretrainingPredictor(beats_config=settings)
    )
    model.to(batch["wav"].device).train()
    x = fbank(batch["wav"])
    tokens = num_tokens(batch["lengths"])
    frames = torch.full_like(tokens, x.shape[1])
    target = batch["valid"].long()  # which code is the same to the clock

    def losses():
        return dict(loss=model(x, frames, target, tokens)[0].sum(), count=1)

    return dict(
        encoder=same_encoder(BeatsEncoder, encoder, batch, dtype),
        mam=training_step(model, losses, tokens.device, dtype)
    )


def torchaudio(encoder, batch, dtype):
    from torchaudio.compliance import kaldi

    def run():
        for clip in batch["wav"].split(1):
            kaldi.fbank(clip * 2**15, num_mel_bins=MELS)

    return dict(fbank=run)


def kaldi(encoder, batch, dtype):
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80

    def run():
        for clip in batch["wav"]:
            online = knf.OnlineFbank(options)
            # lists are its only input
            online.accept_waveform(SAMPLE_RATE, (clip * 2**15).tolist())
            online.input_finished()

    return dict(fbank=run)


PEERS = dict(openbeats=openbeats, espnet=espnet, torchaudio=torchaudio, kaldi=kaldi)


def pieces_of(name, *args):
    """Return {name of our piece: a peer's function that does the same}."""
    check(
        name in PEERS, f"--peer {name}: choose one of {', '.join(PEERS)}, or several by commas"
    )
    try:
        return PEERS[name](*args)
    except ImportError as error:
        raise UserError(
            f"--peer {name}: {error}; tools/peers.py says how to install it"
        ) from None
