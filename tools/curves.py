"""
Draw the logs of runs over each other: is mine on its way, and how does it compare?

    python -m tools.curves out/*.jsonl                      # curves.png
    python -m tools.curves out/mam_iter1.jsonl --live       # again and again, until Ctrl-C
    python -m tools.curves out figures/logs/toy             # all logs of folders

The logs come before the flags. Each panel shows a key of theirs, which the training scripts explain:
pale on the training clips, with markers on those held out; dashed is the loss of a model that knows
which codes occur in which band and nothing else. Scores on the test clips and of frozen probes stand
in the last panel, a dot for each fold and the mean.
"""

import itertools
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import UserError, check, check_flags, parse
from tools.plots import (
    COLOURS,
    PANELS,
    draw_panel,
    has,
    name_lines,
    new_figure,
    read_logs,
    save,
    series
)

@dataclass
class Config:
    out: str = "curves.png"         # the picture
    live: bool = False              # draw again and again, until Ctrl-C
    seconds: float = 5.0            # between two drawings


def scores(logs):
    """Return {name: accuracy, or else mAP, of each fold} of what was tested."""
    found = defaultdict(list)
    for name, rows in logs.items():
        together = re.sub(r"_fold[^_/.]*(?=[.\d]*$)", "", name)
        last = {key: value for row in rows for key, value in row.items() if "step" not in row}
        found[together].append(last.get("accuracy", last.get("mAP")))
        for when in ("before", "after"):
            _, values = series(rows, f"probe_{when}")
            found[f"{together}, probe {when}"] += values
    for name, values in found.items():
        found[name] = [value for value in values if isinstance(value, float)]
    return {name: values for name, values in found.items() if values}


def draw_scores(axes, found):
    """Draw a line of dots for each name, the first on top, and its mean as a number."""
    for y, values in enumerate(found.values()):
        axes.plot(values, [y] * len(values), "o", color=COLOURS[0], alpha=0.35)
        axes.plot(mean(values), y, "o", color=COLOURS[0], markersize=10)
        axes.text(1.01, y, f"{mean(values):.1%}", va="center")
    axes.set_title("accuracy or mAP when tested")
    axes.set_yticks(range(len(found)), found)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")


def draw(logs):
    """Return the figure of {name: lines}, None where there is nothing to draw yet."""
    runs = {name: rows for name, rows in logs.items() if series(rows, "loss", "valid_loss")[0]}
    found = scores(logs)
    titles = [title for title in PANELS if has(runs, title)]
    if not titles and not found:
        return None

    # long names of scores would squeeze the curves: each kind is laid out by itself
    columns = max(2, min(3, len(titles)))
    lines = -(-len(titles) // columns)
    heights = 0.8 + 3.0 * lines, 1.2 + 0.42 * len(found)
    shown = [height for height, content in zip(heights, (titles, found)) if content]
    figure = new_figure(4.8 * columns, sum(shown))
    parts = figure.subfigures(len(shown), 1, height_ratios=shown, squeeze=False)[:, 0]
    for number, title in enumerate(titles, 1):
        draw_panel(parts[0].add_subplot(lines, columns, number), runs, title)
    if titles:
        name_lines(parts[0], runs, loc="outside upper left", ncols=columns + 1)
    if found:
        draw_scores(parts[-1].add_subplot(), found)
    return figure


def main(argv):
    names = list(itertools.takewhile(lambda word: word[:1] != "-", argv))
    cfg = Config(**parse(Config, __doc__, argv[len(names) :], "LOGS "))
    check(names, "which? python -m tools.curves LOG.jsonl ... [--flag value ...]")
    check_flags(cfg)
    paths = []
    for name in names:
        there = cfg.live or Path(name).exists()
        check(there, f"{name}: no such log; with --live it is waited for")
        paths += sorted(Path(name).glob("*.jsonl")) if Path(name).is_dir() else [name]
    check(paths, f"{names[0]}: no .jsonl in this folder")

    while True:
        figure = draw(read_logs(paths))
        check(
            figure or cfg.live,
            f"nothing to draw in {', '.join(names)}: no logs of runs, or runs that have just begun"
        )
        if figure:
            save(figure, cfg.out)
        if not cfg.live:
            break
        time.sleep(cfg.seconds)
    print(f"{cfg.out}: {len(paths)} logs")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("ended; the picture is whole")
