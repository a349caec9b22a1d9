"""COURSE.md: what it quotes stands in the code, what it names exists, and its commands print its numbers."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

TEXT = (ROOT / "COURSE.md").read_text()
INTRODUCTION, *LESSONS = re.split(r"^## ", TEXT, flags=re.M)
PARTS = ["Idea", "Code", "Shapes", "Try", "Think"]
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"

def blocks(text, language):
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)

def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)

def experiments(text):
    """Return (command, the lines that it says are printed, or "") one after the other."""
    pairs = re.findall(r"^```bash\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.M | re.S)
    assert len(pairs) == text.count("```bash")
    return pairs

# ---- the text

def test_ten_lessons_are_numbered_and_have_their_five_parts_in_order():
    assert [int(lesson.split()[0]) for lesson in LESSONS] == list(range(1, 11))
    for lesson in LESSONS:
        assert re.findall(r"^\*\*(\w+)\.\*\*", lesson, re.M) == PARTS
        assert blocks(lesson, "python") and blocks(lesson, "bash") and blocks(lesson, "text")

@pytest.mark.parametrize("block", blocks(TEXT, "python"))
def test_code_that_is_quoted_stands_in_its_file_once(block):
    head, lines = block.split("\n", 1)
    code = (ROOT / head.removeprefix("# ")).read_text()
    assert f"\n{code}".count(f"\n{lines}") == 1, f"{head}: the course quotes what is no longer there"

def test_files_that_are_named_exist():
    names = set(re.findall(r"`([\w/]+\.(?:py|md|txt|sh|diff))`", TEXT))
    names.update(re.findall(r"\]\((?!http)([^)#]+)", TEXT))
    names.update(re.findall(r"^python (\w+\.py)", TEXT, re.M))
    assert len(names) >= 4
    assert not [name for name in names if not (ROOT / name).exists()]

def test_what_is_imported_or_named_is_there():
    for module, names in re.findall(r"^from ([\w.]+) import (.+)$", "\n".join(blocks(TEXT, "bash")), re.M):
        path = ROOT / f"{module.replace('.', '/')}.py"
        if path.exists():
            there = path.read_text()
            for name in names.split(", "):
                assert re.search(rf"\b{name}\b", there), f"{module} has no {name}"

@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.split(" ")[0])
def test_numbers_with_a_decimal_point_that_are_told_are_printed_or_quoted(lesson):
    """Numbers of earlier lessons may be told again."""
    number = LESSONS.index(lesson)
    shown = " ".join(re.findall(r"^```.*?^```", "".join(LESSONS[: number + 1]), re.M | re.S))
    known = {float(text.replace(",", "")) for text in re.findall(NUMBER, shown)}
    missing = [text for text in re.findall(r"(?<![\w.])\d+\.\d+", prose(lesson))
               if not any(close(float(text), value, 0.5 * 10 ** -len(text.split(".")[1])) for value in known)]
    assert not missing

# ---- the commands

def close(value, expected, tolerance):
    return abs(value - expected) <= tolerance + 1e-9

def tolerance(line, expected):
    """Return how far a number may be off: accuracies by 8 points, all others by 3 %, or in the last digit.

    What a trained encoder's vectors are to a codebook differs more from machine to machine.
    """
    if "%" in line and re.search("probe|accuracy|class from", line):
        return 8.0
    share = 0.15 if re.search("codes used|distance|codes_used|perplexity", line) else 0.03
    return max(share * abs(expected), 0.03)

def says(printed, expected):
    """Tell whether a printed line is the expected one, up to its numbers; "..." stands for anything."""
    pieces = [f"({NUMBER})".join(map(re.escape, re.split(NUMBER, piece))) for piece in expected.split("...")]
    match = re.fullmatch(".*".join(pieces), printed)
    if not match:
        return False
    pairs = zip(match.groups(), re.findall(NUMBER, expected), strict=True)
    pairs = [[float(text.replace(",", "")) for text in pair] for pair in pairs]
    return all(close(value, truth, tolerance(expected, truth)) for value, truth in pairs)

def test_lines_are_compared_by_words_and_numbers():
    assert says("loss 6.12  x 3", "loss 6.11  ...")
    assert says("a step moves it by 112 %", "a step moves it by 113 %")
    assert says("step 3  mfu 0.2  codes_used 930", "step 3  ...codes_used 944")
    assert says("-0.02 of [243, 48]", "-0.03 of [244, 48]")
    assert not says("loss 7.12  x 3", "loss 6.11  ...")
    assert not says("gain 6.11  x 3", "loss 6.11  ...")

@pytest.mark.slow
def test_every_command_prints_what_the_course_says(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "out", "packs", "venv", "__pycache__"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | dict(PATH=path, OMP_NUM_THREADS="1")
    wrong = []
    for command, expected in experiments(TEXT):
        run = subprocess.run(["bash", "-e", "-c", command], cwd=tree, env=environment, text=True,
                             capture_output=True, timeout=3600)
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
        printed = (run.stdout + run.stderr).splitlines()
        wrong += [line for line in expected.splitlines() if not any(says(other, line) for other in printed)]
    assert not wrong, "\n".join(["not printed:", *wrong])
