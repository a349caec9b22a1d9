"""
Draw what pre-training is: a sound, the codes of its patches, and a model's guesses at hidden ones.

    python -m tools.picture out/mam_iter1.pt out/tokenizer_iter1.pt clip.wav    # picture.png
    python -m tools.picture CHECKPOINT TOKENIZER day.flac --start 3600 --seconds 10
    python -m tools.picture CHECKPOINT TOKENIZER clip.wav --curves a.jsonl,b.jsonl

Of a long sound a window is taken, the loudest unless --start says which. Alike codes have alike
colours: of two principal components of the tokenizer's code vectors one is dark and light, the other
blue and yellow. Beside the sound stand the curves of the run, from the log beside the checkpoint.
"""

import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch

from audio import (
    BANDS,
    PATCH_FRAMES,
    ROW,
    SAMPLE_RATE,
    num_tokens,
    printable,
    read_pieces,
    windows
)
from common import UserError, check, check_flags, load_state, parse, read_checkpoint, reading
from model import KINDS, MaskedAudioModel, count_blocks, on_encoder, unpack
from tokenizer import load_tokenizer
from tools.plots import DARK, draw_panel, has, name_lines, new_figure, read_logs, save
from train_mam import listen, prepare

@dataclass
class Config:
    out: str = "picture.png"        # the picture
    start: float = -1.0             # second at which the window begins, -1 = where it is loudest
    seconds: float = 4.0            # of the window, in whole patch rows (0.16 s)
    mask_ratio: float = 0.75        # share of the patches that is hidden
    seed: int = 0                   # of the choice of these
    curves: str = ""                # logs, a.jsonl,b.jsonl; none = the checkpoint's, if it is there


def load_both(path, tokenizer_path):
    """Return the model with its predictor, and the tokenizer whose codes it predicts.

    Raises UserError where a file holds neither, or one does not belong to the other.
    """
    ckpt = read_checkpoint(path)
    kind, encoder, rest, _ = unpack(ckpt, path)
    with reading(path):
        check(
            kind == "mam",
            f"this file is {KINDS[kind]}; guesses need the label predictor, too, which stands in "
            "what train_mam.py writes, mam_iter<k>.pt"
        )
        codes, dim = rest["head.weight"].shape
        blocks = count_blocks(rest, "predictor.blocks.")
        heads = rest["predictor.position_bias.table"].shape[1]
        model = MaskedAudioModel(encoder, codes, blocks, dim, heads)
    load_state(model, on_encoder(encoder, rest), path)

    tokenizer = load_tokenizer(tokenizer_path)
    known = ckpt.get("tokenizer", tokenizer.id())
    check(
        known == tokenizer.id() and codes == tokenizer.n_codes,
        f"{path} was not trained to predict the codes of {tokenizer_path}; "
        "name the tokenizer that it had"
    )
    return model.eval(), tokenizer


def power(part):
    return part[1].square().sum()


def read_window(path, cfg):
    """Return a window of a sound, (n,) in whole patch rows, and the second at which it begins."""
    rows = max(1, round(cfg.seconds * SAMPLE_RATE / ROW))
    parts = windows(read_pieces(path, max(0.0, cfg.start)), rows, max(1, rows // 4))
    if cfg.start >= 0:
        return next(parts)[1], cfg.start
    first, wav = max(parts, key=power)
    return wav, first * ROW / SAMPLE_RATE


@torch.no_grad()
def guess(model, tokenizer, wav, mask_ratio=0.75, seed=0):
    """Hide patches of a sound (n,) and guess their codes, as a step of pre-training does.

    Returns the filter bank (N, 128); of tokens (T,) codes, -1 = silence, hidden, and guesses, -1 = none.
    """
    T = num_tokens(len(wav))
    noise = torch.rand(1, T, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(1, T, dtype=torch.bool)
    batch = dict(wav=wav[None], noise=noise, valid=valid, mask=None)
    features, batch["codes"] = listen(batch, tokenizer)
    inputs, targets = prepare(batch, model.encoder, tokenizer, mask_ratio)
    answers = model(**inputs).argmax(-1)

    (masked,) = inputs["masked"]
    hidden = torch.zeros(T, dtype=torch.bool)
    hidden[masked] = True
    guesses = torch.full((T,), -1)
    guesses[masked] = answers.masked_fill(targets < 0, -1)[0]
    return features[0], batch["codes"][0], hidden, guesses


# -----------------------------------------------------------------------------
# the picture

# of codes: dark blue to sky, red to yellow
CORNERS = torch.tensor(
    [[[0.07, 0.25, 0.50], [0.60, 0.84, 0.96]], [[0.70, 0.24, 0.05], [1.00, 0.87, 0.42]]]
)
COVER = torch.tensor([[0.89, 0.91, 0.93]])  # of what is hidden


def code_colours(vectors, shown):
    """Give codes colours by their vectors: (K, d) -> (K, 3). Those shown (n,) fill all of CORNERS."""
    x = vectors.double() - vectors.double().mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    along = (x @ directions[:2].T).T.contiguous()  # (2, K)
    others = along[:, shown].sort(1).values
    below = torch.searchsorted(others, along) + torch.searchsorted(others, along, right=True)
    share = below / max(1, 2 * len(shown))
    light, warm = torch.stack([1 - share, share], 1)  # each (2, K)
    return torch.einsum("lk, wk, wlc -> kc", light, warm, CORNERS)


def paint(colours, shown, weight=1.0):
    """Give tokens (T,) the colour of what is shown there, -1 = none: an image of the grid."""
    opacity = (shown >= 0) * weight
    return grid_of(torch.cat([colours[shown], opacity[:, None]], 1))


def grid_of(values):
    """Tokens (T, ...) -> array (8 bands, R, ...), as they stand in a spectrogram."""
    return values.unflatten(0, (-1, BANDS)).transpose(0, 1).numpy()


def draw_sound(figure, name, start, found, vectors):
    """Draw a sound four times: filter bank, what is seen of it, codes, guesses.

    found: as guess returns it; vectors: (K, d), what the codes stand for.
    """
    features, codes, hidden, guesses = found
    colours = code_colours(vectors, codes[codes >= 0])
    asked = guesses >= 0
    right = asked & (guesses == codes)
    rows = len(codes) // BANDS
    frames = features[: rows * PATCH_FRAMES].T.numpy()
    times = start + np.arange(rows + 1) * ROW / SAMPLE_RATE

    panels = figure.subplots(4, 1, sharex=True, sharey=True)
    titles = (
        f"{name}, log-mel",
        f"what the encoder sees: {(~hidden).sum()} of {len(hidden)} patches",
        "the code of each patch, from the tokenizer",
        f"guesses at the hidden codes: {right.sum()} of {asked.sum()} right (dots)"
    )
    for axes, title in zip(panels, titles):
        axes.set_title(title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelleft=axes is panels[0])
    panels[0].set_yticks([0, BANDS], ["20 Hz", "8 kHz"])
    panels[3].set_xlabel("seconds")

    # the sound twice, the second time under a cover
    extent = dict(extent=(times[0], times[-1], 0, BANDS), origin="lower", aspect="auto")
    quiet = np.quantile(frames, 0.05)
    for axes in panels[:2]:
        axes.imshow(frames, cmap="magma", vmin=quiet, **extent)
    images = (
        paint(COVER, hidden.long() - 1),
        paint(colours, codes),
        paint(colours, guesses, 0.4 + 0.6 * right)  # paler where it is wrong
    )
    for axes, image in zip(panels[1:], images):
        axes.imshow(image, **extent)
        axes.hlines(range(BANDS + 1), *extent["extent"][:2], color="white")
        axes.vlines(times, 0, BANDS, color="white")

    for marks, marker in ((right, "o"), (asked & ~right, "x")):
        band, row = grid_of(marks).nonzero()
        middle = times[row] + ROW / SAMPLE_RATE / 2
        panels[3].plot(middle, band + 0.5, marker, color=DARK, markerfacecolor="white")


def draw(runs, *sound):
    """Return the figure of a sound, see draw_sound, beside the curves of {name: lines} of runs."""
    figure = left = new_figure(13.5, 8.8)
    titles = [title for title in ("loss", "accuracy") if has(runs, title)]
    if titles:
        left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
        for number, title in enumerate(titles, 1):
            draw_panel(right.add_subplot(len(titles), 1, number), runs, title)
        name_lines(right, runs, loc="outside upper left")
    draw_sound(left, *sound)
    return figure


def main(argv):
    names = list(takewhile(lambda word: word[:1] != "-", argv))
    cfg = Config(**parse(Config, __doc__, argv[len(names) :], "CHECKPOINT TOKENIZER SOUND "))
    check(
        len(names) == 3,
        "which? python -m tools.picture CHECKPOINT TOKENIZER SOUND [--flag value ...]"
    )
    check_flags(cfg)
    new_figure(1, 1)  # complains of a missing package now and not at the end
    path, tokenizer_path, sound = names
    logs = cfg.curves.split(",") if cfg.curves else [Path(path).with_suffix(".jsonl")]
    runs = read_logs(logs)
    check(any(runs.values()) or not cfg.curves, f"--curves {cfg.curves}: no such logs")

    model, tokenizer = load_both(path, tokenizer_path)
    wav, start = read_window(sound, cfg)
    found = guess(model, tokenizer, wav, cfg.mask_ratio, cfg.seed)
    title = printable(Path(sound).name)
    save(draw(runs, title, start, found, tokenizer.vectors()), cfg.out)
    print(f"{cfg.out}: {len(wav) / SAMPLE_RATE:.2f} s from {start:.2f} s on")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
