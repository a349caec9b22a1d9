"""What tools.curves and tools.picture share: logs, read and drawn, and how a picture looks."""

import json
import math
import os
from pathlib import Path

from common import UserError, write_whole

# the colour-blind tell them apart, too (Okabe and Ito); after the last the markers change
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
MARKERS = "os^Dv"
DARK, GREY, PALE = "#333333", "#888888", "#e8e8e8"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 15,
    "axes.titlesize": 16,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALE,
    "text.color": DARK,
    "axes.labelcolor": DARK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": DARK,
    "ytick.labelcolor": DARK,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "savefig.dpi": 110,
    "savefig.facecolor": "white"  # on a dark page, too
}


def new_figure(width, height):
    """Return an empty figure of so many inches. Raises UserError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs one more package: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    return Figure((width, height), layout="constrained")


def save(figure, path):
    """Write a figure as .png, whole at any time, for somebody may be looking at it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


# -----------------------------------------------------------------------------
# logs


def read_log(path):
    """Return the lines of a log, dicts; none of a file that is not there yet."""
    lines = []
    if os.path.exists(path):
        lines = Path(path).read_text(errors="replace").splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # a line that was cut, or is being written
            continue

    # what train_mam.py says once, of the codes to predict, holds from its first step to its last
    last = max([row.get("step", 0) for row in rows], default=0)
    once = [row for row in rows if "codes_used" in row and "step" not in row]
    return rows + [row | dict(step=step) for row in once for step in (0, last)]


def read_logs(paths):
    """Return {name: lines} of logs, whose names are no longer than tells them apart."""
    files = [Path(path).resolve().with_suffix("") for path in paths]
    above = os.path.commonpath([file.parent for file in files])
    names = [os.path.relpath(file, above) for file in files]
    return {name: read_log(path) for name, path in zip(names, paths)}


def series(rows, *keys):
    """Return steps and values of the first of the keys that a log has, empty lists if it has none.

    Of a step that was taken again, after a crash, the later value counts.
    """
    for key in keys:
        values = {row["step"]: row[key] for row in rows if {"step", key} <= row.keys()}
        if values:
            # JSON has no NaN, the loss of no steps
            values = {step: math.nan if value is None else value for step, value in values.items()}
            return sorted(values), [values[step] for step in sorted(values)]
    return [], []


def floor(rows):
    """Return as series the entropy given the band, of a run that predicts codes."""
    predicts, _ = series(rows, "accuracy")
    return series(rows, "entropy_given_band") if predicts else ([], [])


# -----------------------------------------------------------------------------
# curves

PANELS = {  # title -> key of the training clips, keys of those held out
    "loss": ("loss", "valid_loss", "test_loss"),
    "accuracy": ("accuracy", "valid_accuracy", "valid_score", "test_score"),
    "cosine with the teacher": ("cosine", "valid_cosine"),
    "codes in use": ("codes_used", "valid_codes_used"),
    "perplexity of the codes": ("perplexity", "valid_perplexity"),
    "learning rate": ("lr",),
    "seconds of audio per second": ("x_realtime",)
}


def look_of(number):
    """Return colour and marker of a run."""
    cycle, number = divmod(number, len(COLOURS))
    return dict(color=COLOURS[number], marker=MARKERS[cycle % len(MARKERS)])


def has(runs, title):
    """Tell whether any of {name: lines} of runs has something for this panel."""
    return any(series(rows, *PANELS[title])[0] for rows in runs.values())


def draw_panel(axes, runs, title):
    """Draw what a panel shows of {name: lines} of runs."""
    training, *held_out = PANELS[title]
    for number, rows in enumerate(runs.values()):
        look = look_of(number)
        steps, values = series(rows, *held_out)
        axes.plot(steps, values, **look)
        look["marker"] = ""
        if title == "loss":
            axes.plot(*floor(rows), "--", **look)
        axes.plot(*series(rows, training), alpha=0.4 if steps else 1, **look)

    axes.set_title(title)
    axes.set_xlabel("step")
    axes.locator_params(nbins=5)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def name_lines(where, runs, **options):
    """Put a legend on a figure or axes: of the runs, unless it is one, and of the kinds of lines."""
    from matplotlib.lines import Line2D

    lines = {}
    if len(runs) > 1:
        lines = {name: look_of(number) for number, name in enumerate(runs)}
    lines["held out"] = dict(color=DARK, marker="o")
    lines["training"] = dict(color=DARK, alpha=0.4)
    if any(floor(rows)[0] for rows in runs.values()):
        lines["entropy given the band"] = dict(color=DARK, linestyle="--")
    where.legend([Line2D([], [], **look) for look in lines.values()], lines, **options)
