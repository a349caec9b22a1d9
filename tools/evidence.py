"""
Make the tables and the figure of what runs/evidence.sh left behind.

    python -m tools.evidence out/evidence               # -> tables.md there; with matplotlib evidence.png
    python -m tools.evidence out/evidence RESULTS.md    # the tables between the marks in that page as well

Every score is read from a log that finetune.py or evaluate.py wrote. A table says, in percent, the mean and
standard deviation over the seeds and how many these are; behind it stand the differences of two rows seed by
seed, and how often their sign is that of the mean. Bold: every seed agrees, of three or more.
Costs are of the processors, as the logs of the stages say; those of the papers' rows are counted: the
arithmetic of Linear layers and attention, backward as twice forward, at a share of the devices' rate.
"""

import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch

from common import UserError, check
from model import PREDICTORS, PRESETS, Encoder, MaskedAudioModel, flops_of
from tools.plots import COLOURS, GREY, new_figure, read_log, save

# column: the logs of a row's scores, {} = the encoder; of several folds their mean
COLUMNS = {
    "ESC-50, fine-tuned": "finetune_{}_esc50_fold5",
    "ESC-50, frozen": "linear_{}_esc50_fold5",
    "ESC-50, all layers": "linear_{}_all_esc50_fold5",
    "words, fine-tuned": "finetune_{}_words",
    "words, frozen": "linear_{}_words",
    "words, all layers": "linear_{}_all_words",
    "emotions, frozen": "linear_{}_emotions_fold?",
    "emotions, all layers": "linear_{}_all_emotions_fold?"
}
FOLDS = 6  # of the emotions

# row: the folder and the encoder in it
ROWS = {
    "scratch": "scratch scratch",
    "reconstruction, as it is": "reconstruct_raw iter1",
    "reconstruction": "reconstruct iter1",
    "iteration 1, plain": "plain iter1",
    "iteration 1": "smooth iter1",
    "iteration 2": "iterations iter2",
    "iteration 3": "iterations iter3",
    "iteration 3+": "plus iter3",
    "iteration 2, best codes": "iterations_whiten iter2",
    "iteration 3, best codes": "iterations_whiten iter3",
    "speech 70 : 15 : 15": "speech_heavy iter1",
    "balanced 40 : 30 : 30": "balanced iter1",
    "both side by side": "ensembles mixtures",
    "two seeds of speech": "ensembles speech_heavy",
    "two seeds of balanced": "ensembles balanced",
    "predictor 192 wide": "predictor_192 iter1",
    "96 wide": "predictor_96 iter1",
    "64 wide": "predictor_64 iter1",
    "iteration 2, predictor 192 wide": "predictor_192 iter2",
    "iteration 2, 96 wide": "predictor_96 iter2",
    "iteration 2, 64 wide": "predictor_64 iter2",
    "all patches seen": "all_patches iter1",
    "iteration 2, masked in blocks": "block_masking iter2",
    "half of the sound": "half iter1",
    "a quarter of the sound": "quarter iter1"
}

# title, what the papers say, and pairs: is the first better than the second?
TABLES = [
    (
        "1. Labels against reconstruction",
        "BEATs Table 1: iteration 1 has 47.9 mAP on AS-2M, 36.0 on AS-20K and 94.0 % on ESC-50, Audio-MAE, "
        "which reconstructs, 47.3, 37.1 and 94.1 (theirs).",
        "iteration 1 > scratch; iteration 1 > reconstruction; iteration 1, plain > reconstruction; "
        "iteration 1, plain > iteration 1; reconstruction > reconstruction, as it is"
    ),
    (
        "2. Iterations",
        "BEATs Tables 1 and 2, iterations 1, 2, 3, 3+: AS-20K 36.0, 38.3, 38.3, 38.9 to 41.8 mAP, "
        "ESC-50 94.0, 95.1, 95.6, 96.2 to 97.1 % (theirs).",
        "iteration 2 > iteration 1; iteration 3 > iteration 2; iteration 3+ > iteration 3; "
        "iteration 3+ > iteration 2; iteration 2, best codes > iteration 2; "
        "iteration 3, best codes > iteration 3; iteration 3, best codes > iteration 2, best codes"
    ),
    (
        "3. Mixtures",
        "ICME Table I, MLP of X-ARES, balanced and speech-heavy: ESC-50 .868 and .857, Speech Commands .944 "
        "and .958, RAVDESS .630 and .655 (theirs).",
        "balanced 40 : 30 : 30 > speech 70 : 15 : 15"
    ),
    (
        "4. Features side by side",
        "ICME III-A: with Dasheng beside them, ESC-50 .904 where the best member has .891, RAVDESS .792 and "
        ".793 (theirs).",
        "both side by side > speech 70 : 15 : 15; both side by side > balanced 40 : 30 : 30; "
        "both side by side > two seeds of speech; both side by side > two seeds of balanced"
    ),
    (
        "5. Width of the predictor",
        "The paper does not say how wide its own is. 128 is that of all other rows.",
        "iteration 1 > predictor 192 wide; iteration 1 > 96 wide; iteration 1 > 64 wide; "
        "iteration 2 > iteration 2, predictor 192 wide; iteration 2 > iteration 2, 96 wide; "
        "iteration 2 > iteration 2, 64 wide"
    ),
    (
        "6. What else",
        "BEATs 3.3.2: visible patches only, for speed; its predictor sees them at their places.",
        "iteration 1 > all patches seen; iteration 2, masked in blocks > iteration 2; "
        "iteration 1 > half of the sound; half of the sound > a quarter of the sound"
    )
]
FIGURE = "scratch; reconstruction; iteration 1; iteration 2; iteration 3; iteration 3+"
PANELS = ["ESC-50, fine-tuned", "words, fine-tuned", "emotions, frozen"]


def last_score(path):
    """Return the accuracy, in percent, of the last test in a log."""
    scores = [line["accuracy"] for line in read_log(path) if "recordings" in line]
    return 100 * scores[-1] if scores else None


def scores_of(folder, row, column):
    """Return {seed: score} of those seeds that have been through all folds."""
    where, encoder = ROWS[row].split()
    pattern = COLUMNS[column].format(encoder) + ".jsonl"
    wanted = FOLDS if "?" in pattern else 1
    scores = {}
    for seed in sorted(folder.glob(f"{where}/*")):
        logs = [last_score(path) for path in seed.glob(pattern)]
        if len(logs) == wanted and None not in logs:
            scores[seed.name] = statistics.mean(logs)
    return scores


def spread(values):
    """Return mean ± standard deviation (n) as text."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return f"{mean} (1)"
    return f"{mean} ± {statistics.stdev(values):.1f} ({len(values)})"


def difference(folder, pair, column):
    """Return the differences of a pair of rows, first less second, seed by seed, as text."""
    first, second = (scores_of(folder, row, column) for row in pair)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return ""
    values = [first[seed] - second[seed] for seed in seeds]
    mean = statistics.mean(values)
    alike = sum(value * mean > 0 for value in values)
    text = " ".join(f"{value:+.1f}" for value in values)
    text = f"{text}; {alike} of {len(values)}"
    every = alike == len(values) and len(values) >= 3
    return f"**{text}**" if every else text


def markdown(header, rows):
    """Return the lines of a table, without rows in which nothing stands; none if that is all of them."""
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return []
    lines = ["", *header], ["---"] * (len(header) + 1), *rows
    return [f"| {' | '.join(line)} |" for line in lines]


def tables(folder):
    """Yield the lines of all tables of scores."""
    for title, claim, pairs in TABLES:
        pairs = [pair.split(" > ") for pair in pairs.split("; ")]
        asked = {row for pair in pairs for row in pair}
        means, differences = [], []
        for row in ROWS:
            if row in asked:
                scores = [scores_of(folder, row, column) for column in COLUMNS]
                means.append([row, *(spread(list(values.values())) for values in scores)])
        for pair in pairs:
            cells = [difference(folder, pair, column) for column in COLUMNS]
            differences.append([" less ".join(pair), *cells])
        if lines := markdown(COLUMNS, differences):  # there is something to compare
            yield from [f"### {title}", "", claim, "", *markdown(COLUMNS, means), "", *lines, ""]


def ensembles(folder):
    """Yield the lines of the table of mean probabilities: one member, and the mean of 2, 4, 6."""
    rows = []
    for members in (1, 2, 4, 6):
        cells = []
        for column, stem in {"esc50": "esc50_fold5", "words": "words"}.items():
            paths = folder.glob(f"ensembles/*/ensemble_{members}_{stem}.jsonl")
            if members == 1:
                paths = folder.glob(f"[sb][pa][el]*/*/finetune_iter1_{stem}.jsonl")
            scores = [last_score(path) for path in paths]
            cells.append(spread([score for score in scores if score]))
        rows.append([f"{members}", *cells])
    if lines := markdown(["ESC-50, fine-tuned", "words, fine-tuned"], rows):
        yield from ["### Mean probability of fine-tuned members, half of them of each mixture", ""]
        yield "BEATs Table 3: 50.6 mAP of ten where the best has 48.6 (theirs). Fours share members."
        yield from ["", *lines, ""]


# -----------------------------------------------------------------------------
# costs


# column: the logs of the stages of a row, {where} = its folder, {encoder} = iter1 and so on, {n} = 1
STAGES = {
    "teacher, tokenizer": r"tokenizer_{where}_(\d+)_{n}|finetune_{where}_(\d+)_labels",
    "pre-training": r"mam_{where}_(\d+)_{n}",
    "scores": r"(?:linear|finetune)_{where}_(\d+)_{encoder}_.*"
}


def minutes_of(folder, pattern):
    """Return {seed: minutes of a core} of the stages whose logs have that name."""
    minutes = defaultdict(float)
    for path in folder.glob("logs/*.log"):
        if name := re.fullmatch(pattern, path.stem):
            text = path.read_text().replace(",", ".")  # of some languages
            seconds = re.findall(r"^core seconds: ([\d.]+) \+ ([\d.]+)", text, re.M)
            seed = next(filter(None, name.groups()))
            minutes[seed] += sum(float(user) + float(system) for user, system in seconds) / 60
    return {seed: total for seed, total in minutes.items() if total}


def costs(folder):
    """Yield the lines of the table of what the rows cost, in minutes of a core."""
    rows = []
    for row, place in ROWS.items():
        where, encoder = place.split()
        names = dict(where=where, encoder=encoder, n=encoder[-1])
        columns = [minutes_of(folder, pattern.format(**names)) for pattern in STAGES.values()]
        total = sum(sum(column.values()) for column in columns)
        cells = [spread(list(column.values())) for column in columns]
        rows.append([row, *cells, f"{total:,.0f}" if total else ""])
    if lines := markdown([*STAGES, "all seeds together"], rows):
        yield from ["### What a row costs, in minutes of a core", "", *lines, ""]


RATE, DEVICES, USE = 989e12, 8, 0.3  # bfloat16 operations a second of an H100; share that is made use of

# the papers' rows: model, steps, seconds of audio a step
PAPERS = {
    "BEATs, pre-training of an iteration": ("base", 400_000, 5600),
    "BEATs, a tokenizer": ("base", 400_000, 1400),
    "BEATs, fine-tuning on AS-2M": ("base", 50_000, 6400),
    "ICME, pre-training of one mixture": ("large", 800_000, 5340)
}


def arithmetic(model, stage):
    """Count the operations of training on a second of audio, in clips of 10 s."""
    blocks, dim = PREDICTORS[model]
    tokens = 496
    with torch.device("meta"):
        mam = MaskedAudioModel(Encoder(PRESETS[model]), 1024, blocks, dim)
    whole, predictor = flops_of(mam.encoder, tokens), flops_of(mam.predictor, tokens)
    if "pre-training" in stage:
        return 3 * (flops_of(mam.encoder, tokens / 4) + predictor) / 10
    if "tokenizer" in stage:
        return (3 * (whole + predictor) + whole) / 10  # encoder, estimator; and the teacher, forward
    return 3 * whole / 10


def papers():
    """Yield the lines of the table of what the papers' rows would cost."""
    machine = f"{DEVICES} H100 at {USE:.0%} of {RATE / 1e12:.0f} TFLOP/s"
    yield from [f"### What the papers' rows would cost on {machine}", ""]
    yield from ["Counted, not measured; the codes of a frozen tokenizer are not in it.", ""]
    rows = []
    for stage, (model, steps, seconds) in PAPERS.items():
        total = arithmetic(model, stage) * steps * seconds
        hours = total / (RATE * DEVICES * USE) / 3600
        rows.append([stage, f"{steps * seconds / 3600:,.0f}", f"{total:.1e}", f"{hours:,.1f}"])
    yield from [*markdown(["hours of sound", "operations", "hours"], rows), ""]


# -----------------------------------------------------------------------------
# figure


def figure(folder, path):
    """Draw the rows of FIGURE on the three sets: a point a seed, a bar at their mean."""
    rows = [row for row in FIGURE.split("; ") if any(scores_of(folder, row, column) for column in PANELS)]
    check(rows, f"{folder}: nothing to draw yet")
    picture = new_figure(14, 4.2)
    panels = picture.subplots(1, len(PANELS), sharey=True)
    for panel, column in zip(panels, PANELS):
        for height, row in enumerate(rows):
            values = list(scores_of(folder, row, column).values())
            if not values:
                continue  # not measured yet
            colour = GREY if row in ("scratch", "reconstruction") else COLOURS[0]
            panel.plot(values, [height] * len(values), "o", color=colour, alpha=0.6, markersize=9)
            mean = statistics.mean(values)
            panel.plot([mean], [height], "|", color=colour, markersize=26, markeredgewidth=3)
        panel.set_xlabel(f"{column}, %")
        panel.set_yticks(range(len(rows)), rows)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(axis="x")
        panel.grid(visible=False, axis="y")
    save(picture, path)


MARKS = "<!-- what python -m tools.evidence says -->", "<!-- until here -->"


def put_between_marks(page, text):
    """Replace what stands between the two MARKS of a page."""
    before, first, rest = page.read_text().partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    check(first and last, f"{page}: no lines {' and '.join(MARKS)} for the tables to stand between")
    page.write_text(f"{before}{first}\n\n{text}\n{last}{after}")


def main(argv):
    check(
        len(argv) in (1, 2) and argv[0] != "--help",
        "usage: python -m tools.evidence out/evidence [RESULTS.md]"
    )
    folder = Path(argv[0])
    check(Path(folder, "logs").is_dir(), f"{folder}: no folder that runs/evidence.sh has made: no logs in it")
    lines = [*tables(folder), *ensembles(folder), *costs(folder), *papers()]
    text = "\n".join(lines)
    Path(folder, "tables.md").write_text(f"{text}\n")
    print(text)
    for page in argv[1:]:
        put_between_marks(Path(page), text)
    try:
        figure(folder, Path(folder, "evidence.png"))
    except UserError as error:  # the tables are there without matplotlib
        print(error)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
