"""Packs, batches, and the codes that are kept beside a pack."""
import itertools
import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch

import data
from audio import ROW, fbank, rows_in, samples_of
from common import UserError
from conftest import row_of
from data import Clips, Pack, Sounds, epoch_batches, mixed_batches
from recipes import packs

CPU = torch.device("cpu")

@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(packs, "RUN", 3)        # recordings in a shard
    monkeypatch.setattr(data, "RUN", 10)        # clips in a file of codes
    monkeypatch.setattr(os, "getpid", itertools.count().__next__)       # each writer as if another process

def sine(seconds, level=0.5):
    return (level * np.sin(np.arange(int(seconds * 16000)) / 5)).astype(np.float32)

def noise(row):
    """Make 0.1 to 2.5 s of noise, a row's own; one row in ten cannot be read."""
    random = np.random.default_rng(int(row["path"]))
    if random.random() < 0.1:
        raise UserError(f"{row['path']} is broken")
    return random.uniform(-1, 1, random.integers(1600, 40000)).astype(np.float32)

def write_pack(out, count=8, read=noise):
    return packs.write_pack(out, list(map(row_of, range(count))), read, max_seconds=1.0, workers=0)

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
    assert [row["labels"] for row in pack.rows()] == ["cat", "cat", "cat", "dog", "dog"]
    assert pack.index["row"].tolist() == [0, 3, 4, 4, 4]
    assert pack.samples.tolist() == [4800, 16000, 160000, 160000, 80000]        # 25 s in three pieces
    data.main(["stats", f"{tmp_path}/pack"])
    out = capsys.readouterr().out
    for text in ("2 of 5 files skipped", "text.wav: cannot be read as audio", "tiny.wav: 0.100 s is shorter"):
        assert text in out

def test_a_table_becomes_a_pack(tmp_path, write_wav):
    write_wav("a.wav", sine(4))
    (tmp_path / "meta.csv").write_text('file,class,fold,start,end\na.wav,"x;y",1,1.0,2.5\na.wav,y,2,3.0,\n')
    data.main(["csv", f"{tmp_path}/meta.csv", "--out", f"{tmp_path}/pack"])
    pack = Pack(tmp_path / "pack")
    labels, split = pack.table
    assert labels[[0, 1]].tolist() == [[True, True], [False, True]]
    assert split.tolist() == ["1", "2"]
    assert np.allclose(pack.wav(0), sine(4)[16000:40000], atol=1e-4)
    assert np.allclose(pack.wav(1), sine(4)[48000:], atol=1e-4)

@pytest.mark.parametrize("table, message", [
    ("name,label\na.wav,x\n", "no column named path.*name.*--path_column"),
    ("path,start,end\na.wav,3,1\n", "line 2.*from 3.0 s to 1.0 s"),
    ("path\na.wav\n./a.wav\n", "line 3: ./a.wav stands there twice"),
    ("path\nnowhere.wav\n", "no usable audio.*no such file"),
    ('path,label\na.wav,"dog\nb.wav",cat\n', "line 3: a quotation mark is open")])
def test_mistakes_are_explained_and_leave_nothing(tmp_path, monkeypatch, table, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        data.main(["csv", "meta.csv", "--out", "pack"])
    assert os.listdir() == ["meta.csv"]

def test_statistics_are_those_of_all_bins_by_this_front_end(ragged, tmp_path):
    pack = Pack(ragged)
    values = np.concatenate([fbank(pack.wav(i)[None]).flatten() for i in range(len(pack))])
    assert pack.info["fbank_mean"] == pytest.approx(values.mean(), rel=1e-4)
    assert pack.info["fbank_std"] == pytest.approx(values.std(), rel=1e-4)
    shutil.copytree(ragged, tmp_path / "pack")
    info = pack.info | dict(fbank_mean=99.0)
    del info["front_end"]                       # written before it had a name: it was this one
    for front_end, due in (({}, 99.0), (dict(front_end=[16000, 400, 160, 64]), values.mean())):
        (tmp_path / "pack/pack.json").write_text(json.dumps(info | front_end))
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
            die_at(moment, patch)
            write_pack(out)
        finished = sum(len(json.loads(path.read_text())["notes"]) for path in partial.glob("shard-*.json"))
        heard.clear()
        write_pack(out, read=read)
        assert len(heard) == 8 - finished       # what is whole is not done again
        assert content(out) == whole
    audio = [f"audio-{shard:05d}.bin" for shard in range(3)]
    assert sorted(whole) == [*audio, "clips.csv", "index.npy", "pack.json", "skipped.csv"]

def test_what_changes_while_a_packing_rests_is_made_anew(tmp_path, monkeypatch, write_wav):
    def pack(name, *options):
        data.main(["folder", f"{tmp_path}/sounds", "--out", f"{tmp_path}/{name}", "--workers", "0", *options])
        return content(tmp_path / name)
    for i in range(8):
        write_wav(f"sounds/{i}.wav", sine(0.5 + i / 10))
    changes = dict(sound=lambda: write_wav("sounds/2.wav", sine(0.7, level=0.1)),
                   rows=(tmp_path / "sounds/1.wav").unlink, options=lambda: None)
    for name, change in changes.items():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            die_at(16, patch)                   # in the third shard
            pack(name)
        change()
        options = ["--max_seconds", "0.6"] * (name == "options")
        assert pack(name, *options) == pack(f"{name}_fresh", *options)

def test_two_packings_at_once_do_no_harm(tmp_path):
    whole = content(write_pack(tmp_path / "whole").path)
    def read(row):
        if row["path"] == "4":                  # now another process does it all and is the first
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
    audio = shutil.copytree(ragged, tmp_path / "pack") / "audio-00000.bin"
    data.main(["check", f"{tmp_path}/pack"])
    audio.write_bytes(audio.read_bytes()[:-2] + b"xx")
    with pytest.raises(UserError, match="1 clips are not what was packed, number .*23.* the first"):
        data.main(["check", f"{tmp_path}/pack"])
    audio.write_bytes(audio.read_bytes()[:-2])
    with pytest.raises(UserError, match="audio-00000.bin: .* bytes instead of .* make it again"):
        Pack(tmp_path / "pack")

# ---- batches

def test_an_epoch_holds_each_clip_once_within_the_batch_size():
    samples = np.random.default_rng(0).integers(2800, 160000, 1000)
    batches, other = (epoch_batches(samples, 800000, (0, epoch)) for epoch in (0, 1))
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))
    padded = [len(batch) * samples[batch].max() for batch in batches]
    assert max(padded) <= 800000
    assert sum(padded) < 1.15 * samples.sum()

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
    until = np.zeros((len(batches) + 1, 3))     # seconds of each pack up to a batch
    for number, batch in enumerate(batches):
        np.add.at(until[number + 1], np.digitize(batch, [3000, 5000]), samples[batch] / 16000)
    most = 60 + (ranks > 1) * ranks / 2 * 10        # the nearest multiple of clips
    assert until[:-1].sum(1).max() <= most + 1e-6
    until = until.cumsum(0)
    assert until[-1].sum() == pytest.approx(samples.sum() / 16000, rel=0.01)
    ahead = until - np.array(shares) * until.sum(1, keepdims=True)
    assert np.ptp(ahead, 0).max() < 20          # seconds: two clips of ten, a third of a batch
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
    for first, again in ((0, some_batches(15, workers=4)), (4, some_batches(11, place=batches[3]["next"]))):
        for batch, other in zip(batches[first:], again, strict=True):
            torch.testing.assert_close(batch, other, rtol=0, atol=0)

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

def splits_pack(path):
    """Write a pack of 40 clips of 1 s, ten of each split in turn; the path in it is the number."""
    names = ("train", "test", "valid", "")
    rows = [row_of(i, "a", names[i % 4]) for i in range(40)]
    return data.write_pack(path, rows, lambda row: sine(1))

@pytest.mark.parametrize("flags, heard", [
    ({}, ["", "train"]), (dict(splits="test"), ["", "test"]),
    (dict(splits="all"), ["", "test", "train", "valid"]),
    (dict(splits="train,valid", leave_out="valid"), ["", "train"])])
def test_clips_to_test_or_choose_by_are_not_heard_unless_named(flags, heard, tmp_path):
    split = splits_pack(tmp_path / "pack").table[1]
    sounds = Sounds(str(tmp_path / "pack"), 0.0, 10.0, **flags)
    assert sorted(set(split[np.concatenate(sounds.train + sounds.valid)])) == heard
    left = [f"10 of {name}" for name in ("test", "train", "valid") if name not in heard]
    assert str(sounds).endswith(f"left out: {', '.join(left) or 'none'}")
    epoch = {clip for batch in sounds.plan(0) for clip in batch}
    assert set(split[list(epoch)]) == set(heard)

def test_a_fold_is_left_out_and_a_name_that_no_pack_has_is_a_mistake(ragged, tmp_path):
    assert "all folds are heard, 1, 2, 3; see --leave_out" in str(Sounds(ragged, 0.0, 10.0))
    sounds = Sounds(ragged, 0.0, 10.0, leave_out="2")
    assert set(np.concatenate(sounds.train + sounds.valid) % 3) == {0, 2}
    for flags in (dict(leave_out="7"), dict(splits="trian")):
        with pytest.raises(UserError, match="has no split .*, but 1, 2, 3"):
            Sounds(ragged, 0.0, 10.0, **flags)
    rows = [row_of(i, "a", "test") for i in range(4)]
    data.write_pack(tmp_path / "tests", rows, lambda row: sine(1))
    with pytest.raises(UserError, match="not for training .test.; name those to hear, as in --splits test"):
        Sounds(str(tmp_path / "tests"), 0.0, 10.0)

def test_excluded_recordings_are_listed_with_the_reason(tmp_path, write_wav, capsys):
    for name in ("a/one", "a/two", "b/three", "b/one", "b/four, five"):
        write_wav(f"sounds/{name}.wav", sine(1))
    (tmp_path / "list.txt").write_text("two\nb/one.wav\nthree.wav\nfour, five\nnobody\n")
    flags = ["--out", f"{tmp_path}/pack", "--exclude", f"{tmp_path}/list.txt"]
    data.main(["folder", f"{tmp_path}/sounds", *flags])
    pack = Pack(tmp_path / "pack")
    assert [pack.rows()[row]["path"] for row in pack.index["row"]] == ["a/one.wav"]
    assert dict(pack.skipped())["b/one.wav"] == f"b/one.wav: excluded by {tmp_path}/list.txt"
    assert "leaves out 4 recordings; 1 of its 5 names are not there" in capsys.readouterr().out

def test_statistics_follow_the_shares_of_a_mixture(tmp_path):
    """A quiet pack of 30 clips and a loud one of 10, sampled one to three."""
    for name, count, level in (("quiet", 30, 1e-3), ("loud", 10, 0.3)):
        noise = np.random.default_rng(0).standard_normal((count, 16000)).astype(np.float32)
        rows = [row_of(i) for i in range(count)]
        data.write_pack(tmp_path / name, rows, lambda row: level * noise[int(row["path"])])
    spec = f"{tmp_path}/quiet:0.25,{tmp_path}/loud:0.75"
    sounds = Sounds(spec, 0.0, 10.0)
    heard = [batch["wav"].abs().mean(1) > 0.01 for batch in sounds.sample(CPU)]
    assert 0.7 < torch.cat(heard).float().mean() < 0.8

    values = torch.cat([fbank(batch["wav"]).flatten() for batch in sounds.sample(CPU)])
    stats = sounds.fbank_stats()
    assert stats["fbank_mean"] == pytest.approx(values.mean().item(), abs=0.2)
    assert stats["fbank_std"] == pytest.approx(values.std().item(), abs=0.1)       # not 1.2 of either pack

def test_an_evaluation_hears_no_more_than_ten_steps(toy):
    sounds = Sounds(toy, 0.0, 0.5)          # crops of 3 s
    assert sum(map(len, sounds.valid)) == 2
    assert sum(map(len, Sounds(toy, 0.0, 20.0).valid)) == 3

def test_what_is_held_out_is_bounded_in_seconds():
    recording, samples = np.repeat(np.arange(2000), 360), np.full(720_000, 160_000)         # hours
    held = data.hold_out(recording, samples, seconds=4000)
    assert held.sum() == 2 * 360
    held = data.hold_out(np.arange(30), samples[:30])
    assert held.sum() == 2
    assert not data.hold_out(np.zeros(9, int), samples[:9]).any()           # of the only recording

def test_batches_are_of_about_one_size_and_of_the_nearest_multiple_of_the_ranks():
    for ranks, clips in ((8, 144), (16, 144)):
        samples = np.full(144 * 20 + 17, 160_000)       # as Table 4 has them: 1,400 s, 140 clips
        sizes = [len(batch) for batch in epoch_batches(samples, 1400 * 16000, 0, multiple=ranks)]
        assert sorted(sizes)[2:] == [clips] * 19
        assert min(sizes) >= clips // 2

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

# ---- codes of a frozen tokenizer

@pytest.fixture
def pack(ragged, tmp_path):
    without_codes = shutil.ignore_patterns("codes-*")      # of other tests
    return Pack(shutil.copytree(ragged, tmp_path / "pack", ignore=without_codes))

def test_codes_are_those_of_each_clip_alone_and_crops_belong_to_them(pack, distilled):
    clips = Clips([pack], crop=samples_of(4))
    clips.codes = [data.cached_codes(distilled, pack, CPU)]
    long, short = [distilled.encode(pack.wav(clip)[None])[0] for clip in (23, 3)]
    starts = set()
    for key in range(40):
        batch = clips[[(23, key), (3, key)]]            # one longer than the crop, one shorter
        row = next(row for row in range(rows_in(32400))
                   if np.array_equal(pack.audio(23)[row * ROW:][:samples_of(4)], batch["wav"][0]))
        assert torch.equal(batch["codes"][0], long[8 * row:][:32])
        assert batch["codes"][1].tolist() == short.tolist() + [-1] * (32 - len(short))
        starts.add(row)
    assert starts == set(range(rows_in(32400) - 3))

def test_codes_are_computed_once_finished_after_a_kill_and_refused_if_damaged(pack, distilled):
    data.cached_codes(distilled, pack, CPU)
    first, second, third = sorted(pack.path.glob("codes-*/*"))
    whole = second.read_bytes()
    os.replace(second, f"{second}.123.partial")         # as a kill before the rename leaves it
    third.write_bytes(first.read_bytes())
    data.cached_codes(distilled, pack, CPU)
    assert second.read_bytes() == whole
    assert third.read_bytes() == first.read_bytes()     # nobody computed it again
    os.truncate(first, first.stat().st_size - 2)
    with pytest.raises(UserError, match=f"{first}: .*; remove it, it is made again"):
        data.cached_codes(distilled, pack, CPU)

def test_another_tokenizer_has_codes_of_its_own(pack, distilled):
    data.cached_codes(distilled, pack, CPU)
    distilled.encoder.cfg.fbank_mean += 1e-3
    data.cached_codes(distilled, pack, CPU)
    distilled.codebook.weight[0] += 1e-3
    data.cached_codes(distilled, pack, CPU)
    assert len(list(pack.path.glob("codes-*"))) == 3

# ---- at the size of AudioSet

def resident_megabytes():
    return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024

@pytest.mark.slow
def test_two_million_clips_open_fast_with_little_memory(tmp_path):
    number = np.arange(2_000_000)
    index = np.zeros(len(number), packs.INDEX)
    index["shard"], index["offset"] = number // 500, number % 500 * 160_000
    index["samples"], index["row"] = 160_000, number
    np.save(tmp_path / "index.npy", index)
    for shard in range(4000):
        with open(tmp_path / f"audio-{shard:05d}.bin", "wb") as file:
            file.truncate(500 * 320_000)        # a hole: no disk space
    info = dict(version=2, source="", classes=["a", "b"], clips=len(number), shards=[500 * 160_000] * 4000)
    (tmp_path / "pack.json").write_text(json.dumps(info))
    (tmp_path / "clips.csv").write_text("path,labels,split,group\n" + 1_000_000 * "x,b,train,\ny,a;b,test,\n")

    before, began = resident_megabytes(), time.time()
    clips = Clips([Pack(tmp_path)])
    assert resident_megabytes() - before < 150
    assert time.time() - began < 2              # seconds
    before = resident_megabytes()
    labels, split = clips.packs[0].table
    assert labels[[0, 1_999_999]].tolist() == [[False, True], [True, True]]
    assert split[-2:].tolist() == ["train", "test"]
    position, label = labels.pairs(number)
    assert np.bincount(label).tolist() == [1_000_000, 2_000_000]
    assert resident_megabytes() - before < 300          # a table of 527 classes would have 1,000
    dealt = data.deal(lambda epoch: epoch_batches(clips.samples, 20 * 16000, (0, epoch)), 0)
    next(dealt)
    before = resident_megabytes()
    for _ in data.load_batches(clips, itertools.islice(dealt, 3000), workers=4):
        pass
    assert resident_megabytes() - before < 60   # threads and their buffers
