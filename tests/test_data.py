"""Packs, batches, and the codes that are kept beside a pack."""
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
from audio import ROW, fbank, rows_in, samples_of
from common import UserError
from conftest import ROOT
from data import Clips, Pack, Sounds, epoch_batches, mixed_batches
from recipes import packs
from tokenizer import SelfDistilledTokenizer

CPU = torch.device("cpu")

@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(packs, "RUN", 3)        # recordings in a shard
    monkeypatch.setattr(data, "RUN", 10)        # clips in a file of codes

def sine(seconds, level=0.5):
    return (level * np.sin(np.arange(int(seconds * 16000)) / 5)).astype(np.float32)

def noise(row):
    """Make 0.1 to 2.5 s of noise, a row's own; one row in ten cannot be read."""
    random = np.random.default_rng(int(row["path"]))
    if random.random() < 0.1:
        raise UserError(f"{row['path']} is broken")
    return random.uniform(-1, 1, random.integers(1600, 40000)).astype(np.float32)

def write_pack(out, count=8, read=noise, max_seconds=1.0, workers=0):
    rows = [dict(path=str(i), labels=[], split="", group="") for i in range(count)]
    return packs.write_pack(out, rows, read, max_seconds=max_seconds, workers=workers)

def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

# ---- sounds become a pack

def test_a_folder_becomes_a_pack(tmp_path, write_wav, capsys):
    for name, seconds in (("dog/a", 1), ("dog/long", 25), ("cat/b", 0.3), ("cat/tiny", 0.1)):
        write_wav(f"sounds/{name}.wav", sine(seconds))
    (tmp_path / "sounds/cat/text.wav").write_text("hello")
    data.main(["folder", f"{tmp_path}/sounds", "--out", f"{tmp_path}/pack"])
    pack = Pack(tmp_path / "pack")
    assert pack.classes == ["cat", "dog"]
    assert pack.table()[0] == [[0], [1], [1], [1], [1]]
    assert pack.samples.tolist() == [4800, 16000, 160000, 160000, 80000]        # 25 s in three pieces
    assert np.allclose(pack.wav(1), sine(1), atol=1e-4)
    data.main(["stats", f"{tmp_path}/pack"])
    out = capsys.readouterr().out
    for text in ("2 of 5 files skipped", "text.wav: cannot be read as audio", "tiny.wav: 0.100 s is shorter"):
        assert text in out

def test_a_table_becomes_a_pack(tmp_path, write_wav):
    write_wav("a.wav", sine(4))
    (tmp_path / "meta.csv").write_text('file,class,fold,start,end\na.wav,"x;y",1,1.0,2.5\na.wav,y,2,3.0,\n')
    data.main(["csv", f"{tmp_path}/meta.csv", "--out", f"{tmp_path}/pack"])
    pack = Pack(tmp_path / "pack")
    assert pack.table()[0] == [[0, 1], [1]]
    assert pack.table()[1].tolist() == ["1", "2"]
    assert np.allclose(pack.wav(0), sine(4)[16000:40000], atol=1e-4)
    assert np.allclose(pack.wav(1), sine(4)[48000:], atol=1e-4)

@pytest.mark.parametrize("command, table, message", [
    ("folder .", "", "no audio files below"),
    ("csv none.csv", "", "none.csv: cannot be read"),
    ("csv meta.csv", "name,label\na.wav,x\n", "no column named path.*name.*--path_column"),
    ("csv meta.csv", "path,start,end\na.wav,3,1\n", "line 2.*from 3.0 s to 1.0 s"),
    ("csv meta.csv", "path,start\na.wav,soon\n", "seconds, not 'soon'"),
    ("csv meta.csv", "path\na.wav\n./a.wav\n", "line 3: ./a.wav stands there twice"),
    ("csv meta.csv", "path\nnowhere.wav\n", "no usable audio.*no such file"),
    ("csv meta.csv", 'path,label\na.wav,"dog\nb.wav",cat\n', "line 3: a quotation mark is open")])
def test_mistakes_are_explained_and_leave_nothing(tmp_path, monkeypatch, command, table, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        data.main([*command.split(), "--out", "pack"])
    assert os.listdir() == ["meta.csv"]

def test_statistics_are_those_of_all_bins_by_this_front_end(ragged, tmp_path):
    pack = Pack(ragged)
    values = np.concatenate([fbank(pack.wav(i)[None]).flatten() for i in range(len(pack))])
    assert pack.info["fbank_mean"] == pytest.approx(values.mean(), rel=1e-4)
    assert pack.info["fbank_std"] == pytest.approx(values.std(), rel=1e-4)
    # packs of this version that name no front end were written before it had a name
    shutil.copytree(ragged, tmp_path / "pack")
    for key, due in (("no_front_end", 99.0), ("front_end", values.mean())):
        info = pack.info | dict(fbank_mean=99.0)
        info[key] = info.pop("front_end") + [64]
        (tmp_path / "pack/pack.json").write_text(json.dumps(info))
        assert Pack(tmp_path / "pack").info["fbank_mean"] == pytest.approx(due, rel=1e-4)

# ---- packing that is stopped, and damage

def die_at(moment, patch):
    """Let a packing end at its n-th recording, sync or rename."""
    count = itertools.count()
    for owner, name in ((packs, "cut_recording"), (os, "fsync"), (os, "replace")):
        def dying(*args, go_on=getattr(owner, name)):
            if next(count) == moment:
                raise KeyboardInterrupt
            return go_on(*args)
        patch.setattr(owner, name, dying)

def test_a_packing_killed_at_any_moment_goes_on_to_the_same_pack(tmp_path, monkeypatch):
    whole, heard = content(write_pack(tmp_path / "whole").path), []
    def read(row):
        heard.append(row)
        return noise(row)
    for moment in range(8 + 3 * 4 + 5):         # recordings; syncs and renames of shards, and at the end
        out, partial = tmp_path / f"{moment}", tmp_path / f"{moment}.partial"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "getpid", lambda: 1)
            die_at(moment, patch)
            write_pack(out)
        finished = sum(len(json.loads(path.read_text())["notes"]) for path in partial.glob("shard-*.json"))
        heard.clear()
        write_pack(out, read=read)
        assert len(heard) == 8 - finished       # what is whole is not done again
        assert content(out) == whole
    audio = [f"audio-{shard:05d}.bin" for shard in range(3)]
    assert sorted(whole) == [*audio, "clips.csv", "index.npy", "pack.json", "skipped.csv"]

@pytest.mark.slow
def test_a_packing_really_killed_goes_on_to_the_same_pack(tmp_path):
    def read(row):
        time.sleep(0.02)
        return noise(row)
    def pack_slowly(name):
        torch.set_num_threads(1)                # a forked process must not touch its parent's threads
        write_pack(tmp_path / name, 60, read, workers=2)
    process = multiprocessing.get_context("fork").Process(target=pack_slowly, args=["killed"])
    process.start()
    while len(list(tmp_path.glob("killed.partial/shard-*.json"))) < 5:
        time.sleep(0.01)
    process.kill()
    process.join()
    for name in ("killed", "whole"):
        pack_slowly(name)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")

@pytest.mark.parametrize("change", ["a sound", "the rows", "the options"])
def test_what_changes_while_a_packing_rests_is_made_anew(tmp_path, monkeypatch, write_wav, change):
    for i in range(8):
        write_wav(f"sounds/{i}.wav", sine(0.5 + i / 10))
    def pack(name, *options):
        data.main(["folder", f"{tmp_path}/sounds", "--out", f"{tmp_path}/{name}", "--workers", "0", *options])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(16, patch)                       # in the third shard
        pack("pack")
    options = []
    if change == "a sound":
        write_wav("sounds/2.wav", sine(0.7, level=0.1))
    if change == "the rows":
        (tmp_path / "sounds/1.wav").unlink()
    if change == "the options":
        options = ["--max_seconds", "0.6"]
    pack("pack", *options)
    pack("fresh", *options)
    assert content(tmp_path / "pack") == content(tmp_path / "fresh")

def test_two_packings_at_once_do_no_harm(tmp_path, monkeypatch):
    whole = content(write_pack(tmp_path / "whole").path)
    def read(row):
        if row["path"] == "4":                  # now another process does it all and is the first
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                write_pack(tmp_path / "pack")
        return noise(row)
    with pytest.raises(OSError):                # which data.py prints
        write_pack(tmp_path / "pack", read=read)
    assert content(tmp_path / "pack") == whole
    assert not (tmp_path / "pack.partial").exists()

def test_a_pack_is_not_overwritten_and_damage_is_noticed(tmp_path, ragged):
    with pytest.raises(UserError, match="exists; remove it"):
        write_pack(ragged)
    with pytest.raises(UserError, match="is not a pack"):
        Pack(tmp_path)
    shutil.copytree(ragged, tmp_path / "pack")
    audio = tmp_path / "pack/audio-00000.bin"
    data.main(["check", f"{tmp_path}/pack"])
    with open(audio, "r+b") as file:
        file.seek(2 * 4800)                     # where the second clip begins
        file.write(b"xx")
    with pytest.raises(UserError, match="1 clips are not what was packed, number .*1.* the first"):
        data.main(["check", f"{tmp_path}/pack"])
    os.truncate(audio, audio.stat().st_size - 2)
    with pytest.raises(UserError, match="audio-00000.bin: .* bytes instead of .* make it again"):
        Pack(tmp_path / "pack")

# ---- batches

def test_an_epoch_holds_each_clip_once_within_the_batch_size():
    samples = np.random.default_rng(0).integers(2800, 160000, 1000)
    batches = epoch_batches(samples, 800000, (0, 0))
    assert sorted(np.concatenate(batches)) == list(range(1000))
    padded = [len(batch) * samples[batch].max() for batch in batches]
    assert max(padded) <= 800000
    assert sum(padded) < 1.15 * samples.sum()
    for epoch in (0, 1):                        # the order is a function of the key
        again = epoch_batches(samples, 800000, (0, epoch))
        assert np.array_equal(np.concatenate(again), np.concatenate(batches)) == (epoch == 0)

def test_no_rank_stays_without_a_clip():
    for n in range(1, 260):
        samples, clips = np.full(n, 16000), np.arange(n)
        for batches in (epoch_batches(samples, 80000, (0, 0), clips, multiple=3),
                        mixed_batches(samples, 80000, (0, 0), [clips], [1.0], multiple=3)):
            assert min(map(len, batches)) >= 3
            assert len(np.concatenate(batches)) == max(n, 3)

@pytest.mark.parametrize("ranks, shares", [(1, [.7, .15, .15]), (4, [.4, .3, .3]), (1, [.98, .01, .01])])
def test_shares_hold_over_any_run_of_batches(ranks, shares):
    random, subsets = np.random.default_rng(0), np.split(np.arange(5050), [3000, 5000])
    lengths = random.integers(16000, 160000, 3000), random.integers(8000, 16000, 2000), np.full(50, 160000)
    samples = np.concatenate(lengths)
    batches = mixed_batches(samples, 60 * 16000, (0, 0), subsets, shares, ranks)
    seconds = np.zeros((len(batches) + 1, 3))
    for number, batch in enumerate(batches):
        np.add.at(seconds[number + 1], np.digitize(batch, [3000, 5000]), samples[batch] / 16000)
    until = np.cumsum(seconds, 0)
    runs = until[None] - until[:, None]                                         # (last, first, packs)
    off = np.abs(runs - np.array(shares) * runs.sum(-1, keepdims=True)).max()
    assert off < 20                             # seconds: two clips of ten, a third of a batch
    assert until[-1].sum() == pytest.approx(samples.sum() / 16000, rel=0.01)
    assert seconds.sum(1)[:-1].max() <= 60 + 1e-6
    counts = np.bincount(np.concatenate(batches), minlength=5050)
    for subset in subsets:                      # within a pack everyone has a turn before anyone has another
        assert np.ptp(counts[subset]) <= 1

def test_shares_are_positive_numbers_of_all_packs_or_none(toy, ragged):
    assert data.open_packs(f"{toy}:3,{ragged}:1")[1].tolist() == [0.75, 0.25]
    assert data.open_packs(f"{toy},{ragged}")[1] is None
    for spec in (f"{toy}:0.5,{ragged}", f"{toy}:x,{ragged}:1", f"{toy}:-1,{ragged}:1"):
        with pytest.raises(UserError, match="weight"):
            data.open_packs(spec)

def test_batches_do_not_depend_on_workers_and_continue_anywhere(toy):
    def some_batches(count, workers=0, place=(0, 0)):
        sounds = Sounds(toy, crop_seconds=2.56, batch_seconds=20.0, workers=workers)
        return list(itertools.islice(sounds.batches(place), count))
    batches = some_batches(15)
    assert batches[-1]["next"][0] == 1          # well into the second epoch
    for first, again in ((0, some_batches(4, workers=2)), (4, some_batches(11, place=batches[3]["next"]))):
        for batch, other in zip(batches[first:], again):
            assert batch["next"] == other["next"]
            for name in ("wav", "lengths", "clip", "noise"):
                assert torch.equal(batch[name], other[name])

def test_ranks_together_hear_each_clip_once_and_train_on_no_held_out_recording(tmp_path, ragged, monkeypatch):
    pack = write_pack(tmp_path / "pack", 60)            # most recordings become several clips
    train, valid = [], []
    monkeypatch.setattr(data, "world", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(data, "rank", lambda: number)
        sounds = Sounds(f"{ragged},{pack.path}", 0.0, 20.0, workers=0)
        for batch in sounds.batches():
            train += batch["clip"].tolist()
            if batch["next"] == (1, 0):
                break
        for batch in sounds.held_out(CPU):
            valid += batch["clip"].tolist()
    assert sorted(train + valid) == list(range(24 + len(pack)))
    recording = np.concatenate([Pack(ragged).index["row"], 100 + pack.index["row"]])
    assert not set(recording[train]) & set(recording[valid])
    assert len(set(recording[valid])) == 2 + 3          # a twentieth of each pack's

def test_micro_batches_are_bounded_and_cut_to_their_longest_clip(ragged):
    clips = Clips([Pack(ragged)])
    whole = clips[[(clip, 0) for clip in reversed(range(24))]]
    parts = data.split_batch(whole, 6.0)
    assert torch.equal(torch.cat([part["clip"] for part in parts]), whole["clip"])
    for part in parts:
        rows = rows_in(int(part["lengths"].max()))
        assert part["wav"].shape[1] == samples_of(rows)
        assert part["noise"].shape[1] == 8 * rows
        assert len(part["wav"]) * rows * ROW <= 6 * 16000
        alone = clips[[(int(part["clip"][-1]), 0)]]     # a clip's sound and noise are its own in any batch
        for name in ("wav", "noise"):
            assert torch.equal(part[name][-1, :alone[name].shape[1]], alone[name][0])

def test_threads_read_the_right_clips(tmp_path):
    def read(row):
        return np.append(np.float32(int(row["path"]) / 64), sine(0.25))
    clips = Clips([write_pack(tmp_path / "pack", 60, read)])
    dealt = [([(i, 0), (59 - i, 0)], None) for i in range(60)]
    for batch in data.load_batches(clips, 5 * dealt, workers=4):
        assert torch.equal(batch["wav"][:, 0], 512 * batch["clip"])

# ---- codes of a frozen tokenizer

@pytest.fixture
def pack(ragged, tmp_path):
    return Pack(shutil.copytree(ragged, tmp_path / "pack"))

@pytest.fixture
def tokenizer(random_encoder):
    tokenizer = SelfDistilledTokenizer(random_encoder, 32, 8, 0).eval()
    tokenizer.codebook.start_(torch.randn(500, 8))
    return tokenizer

def test_codes_are_those_of_each_clip_alone_and_crops_belong_to_them(pack, tokenizer):
    clips = Clips([pack], crop=samples_of(4))
    clips.codes = [data.cached_codes(tokenizer, pack, CPU)]
    long, short = [tokenizer.encode(pack.wav(clip)[None])[0] for clip in (23, 3)]
    starts = set()
    for key in range(40):
        batch = clips[[(23, key), (3, key)]]            # one longer than the crop, one shorter
        row = next(row for row in range(rows_in(32400))
                   if np.array_equal(pack.audio(23)[row * ROW:][:samples_of(4)], batch["wav"][0]))
        assert torch.equal(batch["codes"][0], long[8 * row:][:32])
        assert batch["codes"][1].tolist() == short.tolist() + [-1] * (32 - len(short))
        starts.add(row)
    assert starts == set(range(rows_in(32400) - 3))

def test_codes_are_computed_once_finished_after_a_kill_and_refused_if_damaged(pack, tokenizer):
    data.cached_codes(tokenizer, pack, CPU)
    first, second, third = sorted(pack.path.glob("codes-*/*"))
    whole = second.read_bytes()
    os.replace(second, f"{second}.123.partial")         # as a kill before the rename leaves it
    third.write_bytes(first.read_bytes())
    data.cached_codes(tokenizer, pack, CPU)
    assert second.read_bytes() == whole
    assert third.read_bytes() == first.read_bytes()     # nobody computed it again
    os.truncate(first, first.stat().st_size - 2)
    with pytest.raises(UserError, match=f"{first}: .*; remove it, it is made again"):
        data.cached_codes(tokenizer, pack, CPU)

def test_two_jobs_at_the_same_codes_do_no_harm(pack, tokenizer):
    encode, contents = tokenizer.encode, []
    def encode_beside(wav, lengths):                    # now another job begins, and is the first to end
        tokenizer.encode = encode
        data.cached_codes(tokenizer, pack, CPU)
        contents.append(content(next(pack.path.glob("codes-*"))))
        return encode(wav, lengths)
    tokenizer.encode = encode_beside
    data.cached_codes(tokenizer, pack, CPU)
    assert content(next(pack.path.glob("codes-*"))) == contents[0]

def test_another_tokenizer_or_sound_has_codes_of_its_own(pack, tokenizer, tmp_path):
    data.cached_codes(tokenizer, pack, CPU)
    tokenizer.encoder.cfg.fbank_mean += 1e-3
    data.cached_codes(tokenizer, pack, CPU)
    for weights in (tokenizer.codebook.weight, tokenizer.quantize_layer[0].bias.data):
        weights[:1] += 1e-3
        data.cached_codes(tokenizer, pack, CPU)
    assert len(list(pack.path.glob("codes-*"))) == 4

    def louder(row):
        return noise(row) + np.float32(row["path"] == "0") / 32768
    folders = []
    for name, read in (("a", noise), ("b", noise), ("c", louder)):
        other = write_pack(tmp_path / name, read=read)
        data.cached_codes(tokenizer, other, CPU)
        folders += [path.name for path in other.path.glob("codes-*")]
    assert folders[0] == folders[1] != folders[2]

# ---- at the size of AudioSet

MEASURE = """
import itertools, sys, time, data
def memory():                                       # MB, with what is shared
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
before, began = memory(), time.time()
clips = data.Clips([data.Pack(sys.argv[1])])
print(time.time() - began, memory() - before)
data.epoch_batches(clips.samples, 5600 * 16000, (0, 0), multiple=8)
print(time.time() - began)
dealt = data.deal(lambda epoch: data.epoch_batches(clips.samples, 20 * 16000, (0, epoch)), 0)
next(dealt)
before = memory()
for batch in data.load_batches(clips, itertools.islice(dealt, 10000), workers=4):
    pass
print(memory() - before)
"""

@pytest.mark.slow
def test_two_million_clips_open_fast_with_little_memory(tmp_path):
    number = np.arange(2_000_000)
    index = np.zeros(len(number), packs.INDEX)
    index["shard"], index["offset"] = number // 500, number % 500 * 160_000
    index["samples"], index["row"] = 160_000, number
    np.save(tmp_path / "index.npy", index)
    for shard in range(4000):
        with open(tmp_path / f"audio-{shard:05d}.bin", "wb") as file:
            file.truncate(500 * 320_000)            # a hole: no disk space
    info = dict(version=2, source="", classes=[], clips=len(number), shards=[500 * 160_000] * 4000)
    (tmp_path / "pack.json").write_text(json.dumps(info))
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened, megabytes, ordered, more = map(float, done.stdout.split())
    assert opened < 2                               # seconds
    assert megabytes < 150
    assert ordered < 6
    assert more < 60                                # threads and their buffers
