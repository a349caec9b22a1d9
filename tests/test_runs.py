"""The recipes in runs/, as a user types them, and that no flag written anywhere is wrong."""
import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import evaluate
import finetune
import train_mam
import train_tokenizer
from conftest import ROOT, row_of
from tools import bench, infer, report

SCRIPTS = {f"{script.__name__}.py": script for script in (train_mam, train_tokenizer, finetune, evaluate)}
TOOLS = {tool.__name__: tool for tool in (bench, infer, report)}
SMALL = "--model tiny --batch_seconds 8 --max_steps 2 --warmup_steps 1 --device cpu --no-compile"
CLEAN = dict.fromkeys(["GPUS", "LAUNCH", "LAST", "DRY_RUN"], "")        # what a shell may have set
FLAGS = dict(MAM=SMALL, TOKENIZER=f"{SMALL} --codes 32 --code_dim 8", FINETUNE=SMALL)

def recipe(*command, **environment):
    """Run a recipe; returns what subprocess.run does."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | dict(OMP_NUM_THREADS="1", PATH=path, **CLEAN) | FLAGS | environment
    return subprocess.run([f"runs/{command[0]}", *command[1:]], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=600)

def content(path):
    return torch.load(path, weights_only=True)

def stages(run):
    """Return (script, whether resumed) of the stages that a recipe has run."""
    assert run.returncode == 0, run.stdout + run.stderr
    return re.findall(r"^\+ .*?(\w+)\.py .*?(--resume)?$", run.stdout, re.M)

@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """The path of a pack of 24 noises of 1 to 2 s with one or two labels and the splits train and test."""
    def read(row):
        return 0.1 * np.random.default_rng(row["samples"]).standard_normal(row["samples"], np.float32)
    rows = [row_of(i, ["a", "b", "ab"][i % 3], ["train", "test"][i // 6 % 2], samples=16000 + 500 * i)
            for i in range(24)]
    path = tmp_path_factory.mktemp("packs") / "labelled"
    data.write_pack(path, rows, read)
    return str(path)

@pytest.fixture
def packs(toy, ragged, labelled):
    return dict(toy=toy, ragged=ragged, labelled=labelled)

# ---- no flag is wrong

def read_flags(command):
    """Let the script that a command runs read its flags; returns its name, or None, and the flags typed."""
    command = re.sub(r"\$\w+", "1", command)             # of a loop over seeds
    words = iter(shlex.split(command, comments=True))
    for word in words:
        word = Path(word).name if word.endswith(".py") else word    # of a copy with changes, too
        if word in SCRIPTS:
            flags = common.parse(SCRIPTS[word].Config, "", list(words))
            assert flags.get("task", "custom") in finetune.TASKS
            assert flags.get("preset", "ssl") in train_tokenizer.TABLE_4
            return word, flags
        if word in TOOLS:
            words = list(words)
            names = list(itertools.takewhile(lambda word: word[0] != "-", words))
            return word, dict(names=names) | common.parse(TOOLS[word].Config, "", words[len(names) :])
    return None, {}

def files(name, flags):
    """Return the checkpoints that a command reads, and those that it writes."""
    out, number = flags.get("out_dir"), flags.get("iter")
    tokenizer, fold = f"{out}/tokenizer_iter{number}.pt", flags.get("fold", "")
    if name == "train_mam.py":
        codes = flags.get("tokenizer", tokenizer)
        return [codes][: number > 1], [f"{out}/mam_iter{number}.pt", *[tokenizer][: number == 1]]
    if name == "train_tokenizer.py":
        return [flags.get("teacher", f"{out}/mam_iter{number - 1}.pt")], [tokenizer]
    if name == "finetune.py":
        return [flags["init"]], [f"{out}/finetune_{flags['name']}{fold and '_fold'}{fold}.pt"]
    if "names" in flags:
        return flags["names"], []                           # of the report
    return (flags.get("init") or flags["ensemble"]).split(","), []

RECIPES = {
    "paper_base.sh packs/audioset": [4, 3, 4, 0],
    "icme_large.sh speech {toy},{ragged} {toy} {labelled} codes.pt": [1, 0, 0, 0],
    "icme_large.sh balanced {toy},{ragged} {toy} {labelled} codes.pt": [1, 0, 0, 0],
    "iterations.sh {toy},{ragged} {ragged} 2": [4, 3, 6, 5],
    "iterations.sh {toy} {labelled}": [4, 3, 6, 5]}

def test_the_evidence_has_flags_that_scripts_know_and_files_of_earlier_ones(tmp_path):
    run = recipe("evidence.sh", "audio", DRY_RUN="1", OUT=str(tmp_path), JOBS="1", **dict.fromkeys(FLAGS, ""))
    assert run.returncode == 0, run.stderr
    there = {"scratch"}
    for name, flags in map(read_flags, re.findall(r"^\+ (.*)$", run.stdout, re.M)):
        if name is None:                                    # data.py makes a pack
            continue
        assert "," not in flags.get("init", "") or "layers" not in flags       # all layers are of one encoder
        needed, made = files(name, flags)
        assert there.issuperset(needed), (name, flags)
        there.update(made)
    assert {f"{tmp_path}/{row}/{seed}/mam_iter{number}.pt" for row, number in [("plus", 3), ("balanced", 1)]
            for seed in range(3)} <= there
    assert not any(tmp_path.iterdir())

@pytest.mark.parametrize("command, counts", RECIPES.items())
def test_stages_have_flags_that_scripts_know_and_files_of_earlier_ones(command, counts, packs, tmp_path):
    words = command.format(**packs).split()
    run = recipe(*words, DRY_RUN="1", OUT=str(tmp_path), MAM="", TOKENIZER="", FINETUNE="")
    assert run.returncode == 0, run.stderr
    read = [read_flags(line) for line in re.findall(r"^\+ (.*)$", run.stdout, re.M)]
    names = [name for name, _ in read]
    assert [names.count(name) for name in SCRIPTS] == counts
    there = {"codes.pt", "scratch", "kmeans"}
    for name, flags in read:
        needed, made = files(name, flags)
        assert there.issuperset(needed), (name, flags)
        there.update(made)
    assert not any(tmp_path.iterdir())

def written(text):
    """Return the commands in a text: in fenced or indented blocks, and from scripts on in backquotes."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    blocks += "\n".join(re.findall(r"^    .*$", text, re.M))
    lines = blocks.replace("\\\n", " ").splitlines()
    lines = [line for line in lines if re.search(r"\b(python|torchrun) ", line)]
    spans = re.findall(r"`(\w+\.py [^`]*)`", text)
    return lines + [span.replace("...", "") for span in spans]

@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "LOG.md", *SCRIPTS])
def test_every_command_that_is_written_has_flags_that_its_script_knows(name):
    commands = written(SCRIPTS[name].__doc__ if name in SCRIPTS else (ROOT / name).read_text())
    assert len([name for name, _ in map(read_flags, commands) if name]) >= 3

def test_every_flag_that_the_readme_names_is_one():
    known = {"help"}
    for script in [*SCRIPTS.values(), *TOOLS.values()]:
        known.update(field.name for field in dataclasses.fields(script.Config))
    for recipe in (ROOT / "recipes").glob("*.py"):      # of data.py
        known.update(re.findall(r'"--(\w+)"', recipe.read_text()))
    assert known.issuperset(re.findall(r"`--(\w+)", (ROOT / "README.md").read_text()))

# ---- what a recipe does

def test_a_mixture_is_shares_of_kinds_and_says_what_is_repeated(toy, ragged, labelled, tmp_path):
    hours = {pack: data.Pack(pack).info["hours"] for pack in (toy, ragged, labelled)}
    def run(name):
        return recipe("icme_large.sh", name, f"{toy},{ragged}", ragged, labelled, "x.pt", DRY_RUN="1",
                      OUT=str(tmp_path), MAM="--max_steps 9 --batch_seconds 100")
    speech, balanced = run("speech"), run("balanced")
    shares = {pack: 70 * hours[pack] / (hours[toy] + hours[ragged]) for pack in (toy, ragged)}
    heard = re.findall(r"--data (\S+)", speech.stdout)[0].split(",")
    assert heard[0] == f"{toy}:{shares[toy]:.6g}"
    assert heard[1:] == [f"{ragged}:{shares[ragged]:.6g}", f"{ragged}:15", f"{labelled}:15"]
    assert f"--data {toy}:40,{ragged}:30,{labelled}:30 " in balanced.stdout
    assert balanced.stderr.count("of the 0.25 h heard") == 3
    assert f"{labelled}: 30.0 %" in balanced.stderr
    assert f"h: {0.3 * 0.25 / hours[labelled]:.3g} times" in balanced.stderr

def test_a_recipe_without_its_arguments_says_what_it_needs():
    for name in ("paper_base.sh", "icme_large.sh", "iterations.sh"):
        run = recipe(name)
        assert run.returncode
        assert f"usage: runs/{name} " in run.stderr

@pytest.mark.parametrize("arguments, message", [
    ([], "usage: runs/evidence.sh AUDIO"), (["nowhere"], "nowhere/esc50/meta.csv: no such table"),
    (["here", "smoth", "0"], "no such job, or no seed: smoth 0"), (["here", "smooth"], "or no seed: smooth")])
def test_the_evidence_without_tables_job_or_seed_says_what_it_needs(arguments, message, tmp_path):
    (tmp_path / "esc50").mkdir()
    (tmp_path / "esc50/meta.csv").touch()
    arguments = [str(tmp_path) if word == "here" else word for word in arguments]
    run = recipe("evidence.sh", *arguments, OUT=str(tmp_path / "out"))
    assert run.returncode and message in run.stderr
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("launch", ["true", "false"])
def test_a_recipe_stops_where_a_stage_ends_early(launch, tmp_path):
    """Also one that ends with status 0, as after a signal."""
    run = recipe("paper_base.sh", "packs/audioset", OUT=str(tmp_path), LAUNCH=launch)
    assert run.returncode == 1
    assert run.stdout.count("+ ") == 1
    assert "mam_iter1.pt is not finished; the same command goes on from there" in run.stderr

@pytest.mark.slow
def test_the_paper_s_loop_on_two_ranks(labelled, tmp_path):
    run = recipe("paper_base.sh", labelled, OUT=str(tmp_path), GPUS="2")
    mam, tokenizer, tuning = (name.removesuffix(".py") for name in list(SCRIPTS)[:3])
    loop = [mam, tuning, *2 * [tokenizer, mam, tuning], tokenizer, mam, tuning]
    assert [name for name, _ in stages(run)] == loop
    assert len(re.findall(" on 2 x cpu, codes of ", run.stdout)) == 4
    assert len(re.findall("(have|has) several labels", run.stdout)) == 4       # one rank of each fine-tuning
    assert content(tmp_path / "plus/mam_iter3.pt")["step"] == 2
    assert content(tmp_path / "plus/tokenizer_iter3.pt")["tokenizer"]["target_width"] == 2      # class logits
    for name in ("mam_iter1", "mam_iter2", "mam_iter3", "mam_iter3plus"):
        assert (tmp_path / f"finetune_{name}.csv").exists()

@pytest.mark.slow
def test_a_large_encoder_s_recipe_on_two_ranks(toy, ragged, labelled, distilled, tmp_path):
    common.save_checkpoint(tmp_path / "codes.pt", **distilled.state())
    packs = f"{toy},{labelled}", ragged, labelled
    command = "icme_large.sh", "balanced", *packs, str(tmp_path / "codes.pt")
    run = recipe(*command, OUT=str(tmp_path), GPUS="2")
    assert stages(run) == [("train_mam", "")]
    ckpt = content(tmp_path / "mam_iter3.pt")
    assert ckpt["step"] == 2
    assert len(list(filter(None, ckpt["packs"]))) == 3      # two of one kind of sound

@pytest.mark.slow
def test_iterations_go_on_where_they_stopped(toy, ragged, tmp_path):
    def run(**more):
        return recipe("iterations.sh", f"{toy},{ragged}", ragged, "2", OUT=str(tmp_path), LAST="2", **more)
    assert "--max_steps 0: has to be above 0" in run(FINETUNE="--max_steps 0").stderr
    ckpt = content(tmp_path / "mam_iter2.pt")
    assert ckpt["config"]["leave_out"] == "2"
    torch.save(ckpt | dict(step=1, place=(0, 1)), tmp_path / "mam_iter2.pt")          # as if interrupted
    done = run()
    assert [name for name, resumed in stages(done) if resumed] == ["train_mam"]
    assert content(tmp_path / "mam_iter2.pt")["step"] == 2
    assert len(json.loads((tmp_path / "report.json").read_text())["tokenizers"]) == 4
    for probe in (" linear", ""):
        assert done.stdout.count(f"{ragged}{probe} fold 2: accuracy") == 3
