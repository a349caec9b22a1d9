"""The tables of the papers' claims: what they say of scores, seeds and costs."""
import json
import re

import numpy as np
import pytest
import soundfile

from common import UserError
from conftest import ROOT
from test_runs import recipe
from tools import evidence

def write_scores(folder, row, column, scores):
    """Leave logs as fine-tuning and probes do: a line of training, then one of the test, in [0, 1]."""
    where, encoder = evidence.ROWS[row].split()
    name = evidence.COLUMNS[column].format(encoder)
    for seed, score in enumerate(scores):
        for fold in range(1, 7) if "?" in name else [0]:
            path = folder / where / str(seed) / (name.replace("?", str(fold)) + ".jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            shift = (fold - 3.5) / 100 if fold else 0
            lines = [dict(step=20, accuracy=0.99), dict(accuracy=score / 100 + shift, recordings=400)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))

def table(folder, title):
    """Return {row: {column: cell}} of a title's two tables in what the program writes."""
    (folder / "logs").mkdir(exist_ok=True)
    evidence.main([str(folder)])
    text = (folder / "tables.md").read_text()
    lines = text[text.index(title) :].split("\n### ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row: dict(zip(cells[0][1:], values)) for row, *values in cells[1:]}

def test_a_row_says_mean_and_standard_deviation_over_seeds_and_how_many_these_are(tmp_path):
    write_scores(tmp_path, "scratch", "ESC-50, fine-tuned", [40, 41, 45])
    write_scores(tmp_path, "iteration 1", "ESC-50, fine-tuned", [50])
    write_scores(tmp_path, "iteration 1", "emotions, frozen", [30, 34])
    rows = table(tmp_path, "1. Labels")
    assert rows["scratch"]["ESC-50, fine-tuned"] == "42.0 ± 2.6 (3)"
    assert rows["iteration 1"]["ESC-50, fine-tuned"] == "50.0 (1)"
    assert rows["iteration 1"]["emotions, frozen"] == "32.0 ± 2.8 (2)"      # means of six folds
    assert "reconstruction" not in rows

def test_a_seed_without_all_of_its_folds_does_not_count(tmp_path):
    write_scores(tmp_path, "scratch", "emotions, frozen", [30, 34])
    write_scores(tmp_path, "iteration 1", "emotions, frozen", [30, 34])
    (tmp_path / "scratch/1/linear_scratch_emotions_fold6.jsonl").unlink()
    assert table(tmp_path, "1. Labels")["scratch"]["emotions, frozen"] == "30.0 (1)"

@pytest.mark.parametrize("second, cell", [
    ([41, 43, 44], "**+1.0 +2.0 +4.0; 3 of 3**"),
    ([41, 46, 44], "+1.0 -1.0 +4.0; 2 of 3"),
    ([41, 43], "+1.0 +2.0; 2 of 2")])
def test_differences_are_of_the_same_seed_and_bold_where_three_agree(second, cell, tmp_path):
    write_scores(tmp_path, "iteration 2", "words, fine-tuned", [42, 45, 48])
    write_scores(tmp_path, "iteration 1", "words, fine-tuned", second)
    assert table(tmp_path, "2. Iterations")["iteration 2 less iteration 1"]["words, fine-tuned"] == cell

def write_cost(folder, stage, *seconds):
    (folder / "logs").mkdir(exist_ok=True)
    lines = [f"step 100\ncore seconds: {each} + 1.5\n" for each in seconds]
    (folder / "logs" / f"{stage}.log").write_text("".join(lines))

def test_a_row_costs_what_its_stages_took_with_interrupted_ones_added_up(tmp_path):
    write_cost(tmp_path, "mam_iterations_0_2", 58.5, 118.5)                 # went on after an interruption
    write_cost(tmp_path, "mam_iterations_1_2", 58.5)
    write_cost(tmp_path, "mam_iterations_2_2")                              # not through yet
    write_cost(tmp_path, "mam_iterations_0_3", 6000)                        # another row's
    write_cost(tmp_path, "tokenizer_iterations_0_2", 28.5)
    write_cost(tmp_path, "linear_iterations_0_iter2_all_esc50", 28.5)
    write_cost(tmp_path, "finetune_iterations_0_iter2_words", 28.5)
    row = table(tmp_path, "What a row costs")["iteration 2"]
    assert list(row.values()) == ["0.5 (1)", "2.0 ± 1.4 (2)", "1.0 (1)", "6"]

def test_the_teacher_of_3_plus_is_part_of_its_cost(tmp_path):
    write_cost(tmp_path, "finetune_plus_0_labels", 58.5)
    write_cost(tmp_path, "tokenizer_plus_0_3", 28.5)
    assert table(tmp_path, "What a row costs")["iteration 3+"]["teacher, tokenizer"] == "1.5 (1)"

def test_the_tables_replace_what_stands_between_the_marks_of_a_page(tmp_path, capsys):
    first, last = evidence.MARKS
    (tmp_path / "logs").mkdir()
    write_scores(tmp_path, "scratch", "words, fine-tuned", [40, 41, 45])
    write_scores(tmp_path, "iteration 1", "words, fine-tuned", [50])
    page = tmp_path / "page.md"
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    for _ in range(2):
        evidence.main([str(tmp_path), str(page)])
        text = page.read_text()
        assert text.startswith(f"before\n{first}\n") and text.endswith(f"\n{last}\nafter\n")
        assert "42.0 ± 2.6 (3)" in text and "old" not in text
    page.write_text("no marks\n")
    with pytest.raises(UserError, match="page.md.*until here"):
        evidence.main([str(tmp_path), str(page)])
    assert page.read_text() == "no marks\n"

def test_the_papers_rows_cost_what_a_count_by_hand_gives(tmp_path):
    # 10 s: 496 tokens; blocks of 12 d^2 weights; the visible quarter through 12 blocks, the grid through 3
    blocks = 12 * 768**2
    linear = 2 * blocks * (12 * 124 + 3 * 496)
    attention = 4 * 768 * (12 * 124**2 + 3 * 496**2)
    total = 3 * (linear + attention) / 10 * 400_000 * 5600
    told = float(table(tmp_path, "papers' rows")["BEATs, pre-training of an iteration"]["operations"])
    assert told == pytest.approx(total, rel=0.06)                           # patches, codes: small beside it

@pytest.mark.slow
def test_one_job_after_another_gives_the_tables(tmp_path):
    chance = np.random.default_rng(0)

    def make(name, label, split):
        folder = tmp_path / "audio" / name
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / "meta.csv"
        number = len(table.read_text().splitlines()) if table.exists() else 0
        if not number:
            table.write_text("path,label,fold_or_split,group\n")
        soundfile.write(folder / f"{number}.wav", 0.1 * chance.standard_normal(16000), 16000)
        with open(table, "a") as file:
            file.write(f"{number}.wav,{label},{split},{number}\n")
    for i in range(20):
        make("esc50", "ab"[i % 2], i // 2 % 5 + 1)
        make("arabic_kws", "xy"[i % 2], ["train", "test"][i // 2 % 2])
        make("pretrain_mix", ["speech_en", "music"][i % 2], "pretrain")
    for i in range(24):
        make("ravdess", "uv"[i % 2], i // 2 % 6 + 1)
    for job in ["packs", "reconstruct"]:
        run = recipe("evidence.sh", str(tmp_path / "audio"), job, "0", OUT=str(tmp_path / "out"))
        assert run.returncode == 0, run.stdout + run.stderr
    for column in evidence.COLUMNS:
        write_scores(tmp_path / "out", "iteration 1", column, [50])     # something to compare with
    rows = table(tmp_path / "out", "1. Labels")
    for column in evidence.COLUMNS:
        assert re.fullmatch(r"[\d.]+ \(1\)", rows["reconstruction"][column])
    changed = (tmp_path / "out/code/reconstruct/train_mam.py").read_text()
    assert "layer_norm" in changed and "layer_norm" not in (ROOT / "train_mam.py").read_text()
    assert "layer_norm" not in (tmp_path / "out/code/reconstruct_raw/train_mam.py").read_text()
