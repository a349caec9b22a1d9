"""README, RESULTS and LOG keep their word: commands run, numbers are the log's, links lead somewhere."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import data
from conftest import MICRO, ROOT, row_of, save_classifier
from model import Classifier, Encoder, export_official
from tokenizer import export_official_tokenizer
from tools.evidence import MARKS

TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md", "COURSE.md", "LOG.md")}
SMALL = "--max_steps 2 --warmup_steps 1 --batch_seconds 8 --device cpu"
SCRIPTS = r"(train_mam|train_tokenizer|finetune)\.py"

@pytest.mark.parametrize("name", TEXTS)
def test_links_and_files_that_are_named_exist(name):
    named = re.findall(r"\]\(([^)#:]+)\)", TEXTS[name])
    named += re.findall(r"`((?:runs|figures|changes|tools|tests)/\w+\.\w+)`", TEXTS[name])
    missing = [file for file in named if not (ROOT / file).exists()]
    assert not missing

@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_every_number_stands_in_the_log_or_the_course(name):
    """Those with a decimal point; without those in code, and the papers' own, which are marked."""
    written = "{}.*{}".format(*MARKS)           # tables that a program has written from logs
    text = re.sub(f"{written}|```.*?```|`[^`]*`|paper: [^|]*\\|", "", TEXTS[name], flags=re.S)
    numbers = set(re.findall(r"(?<![\w./])\d+\.\d+(?![\w./]*\d)", text))
    assert len(numbers) >= 6
    [tables] = re.findall(written, TEXTS["RESULTS.md"], re.S)
    known = TEXTS["LOG.md"] + TEXTS["COURSE.md"] + tables
    unknown = [number for number in numbers if number not in known]
    assert not unknown

def test_the_readme_shows_every_change_with_its_number_of_lines():
    shown = dict(re.findall(r"\]\(changes/(\w+)\.diff\) (\d+)", TEXTS["README.md"]))
    for diff in (ROOT / "changes").glob("*.diff"):
        added = re.findall(r"^\+(?!\+\+)", diff.read_text(), re.M)
        assert shown.pop(diff.stem) == str(len(added))
    assert not shown

# ---- commands

def blocks(text, kind=""):
    return [block for word, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if word == kind]

def commands_of(text):
    """Return the commands in the plain blocks of a text, without their comments."""
    lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    lines = [re.split(r"\s{2,}#", line)[0] for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun|pip) ", line)]

@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy):
    """A copy of the tree in which the files lie that README's commands name: small ones."""
    folder = tmp_path_factory.mktemp("readme") / "nanobeats"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "out", "packs", "__pycache__"))
    noise = 0.1 * np.random.default_rng(0).standard_normal(32000)
    for name in ("a.wav", "b.flac", "clip.wav", "folder/x.wav", "DIR/dog/x.wav", "DIR/cat/y.wav"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise, 16000)
    (folder / "meta.csv").write_text("path,label\na.wav,dog\nb.flac,cat\n")
    for name in ("out/toy", "packs/as20k", "packs/audioset"):
        shutil.copytree(toy, folder / name)

    # released files
    encoder = Encoder(MICRO)
    labels = [f"/m/{number:05}" for number in range(527)]
    table = [f'{number},{name},"sound {number}"\n' for number, name in enumerate(labels)]
    (folder / "class_labels_indices.csv").write_text("index,mid,display_name\n" + "".join(table))
    for name in ("BEATs_iter3", "BEATs_iter3_plus_AS2M"):
        export_official(encoder, folder / f"{name}.pt")
    export_official(Classifier(encoder, labels), folder / "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt")
    return folder

def run(folder, command):
    """Run a command as typed, but trainings for two steps, and on two ranks of a CPU instead of 8 GPUs."""
    if re.search(SCRIPTS, command):
        large = "batch_seconds|device_seconds|max_steps|warmup_steps|model"
        command = re.sub(rf"--({large}) \S+|--compile", "", command)
        command = command.replace("--nproc_per_node 8", "--nproc_per_node 2") + " " + SMALL
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, shell=True, text=True, capture_output=True, timeout=300,
                          env=os.environ | dict(PATH=path, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout

@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(folder, distilled, toy):
    export_official_tokenizer(distilled, folder / "Tokenizer_iter3.pt")
    elsewhere = "pip install|python -m pytest|data.py esc50"
    commands = [line for line in commands_of(TEXTS["README.md"]) if not re.search(elsewhere, line)]
    assert len(commands) >= 15
    for command in commands:
        if "meta.csv" in command or "packs/mine" in command and not (folder / "packs/mine").exists():
            shutil.rmtree(folder / "packs/mine", ignore_errors=True)
        if "train_mam.py --data packs/mine" in command:      # sounds of its own that can be tested on
            shutil.rmtree(folder / "packs/mine")
            shutil.copytree(toy, folder / "packs/mine")
        if "--init a.pt,b.pt" in command:
            for name in "ab":
                shutil.copy(folder / "out/mam_iter2.pt", folder / f"{name}.pt")
        if "out/x.pt,out/y.pt" in command:
            for name in "xy":
                shutil.copy(folder / "out/finetune_mine.pt", folder / f"out/{name}.pt")
        run(folder, command)
    for name in ("mam_iter1", "tokenizer_iter2", "mam_iter2", "finetune_toy"):
        assert (folder / f"out/{name}.pt").exists()
    assert list((folder / "features").rglob("*.npy")) and list((folder / "codes").rglob("*.npy"))

@pytest.mark.slow
def test_the_readme_s_python_runs_as_it_stands(folder, distilled):
    export_official_tokenizer(distilled, folder / "Tokenizer_iter3.pt")
    [code] = blocks(TEXTS["README.md"], "python")
    code += "print(x.shape, valid.sum(1).tolist(), e.shape, p.shape, codes.shape, len(classifier.labels))"
    printed = run(folder, f"python -c {shlex.quote(code)}")
    assert printed.split("torch.Size")[1:] == [
        "([2, 96, 32]) [96, 96], ".replace("], ", "] "), "([2, 32]) ", "([2, 527]) ", "([2, 96]) 527\n"]
