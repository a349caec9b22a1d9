"""Packs, reading audio, and the order of batches."""
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import toy as sounds
from common import UserError
from data import Clips, Loader, Numbers, Pack, Stream, epoch_batches, load_audio, open_packs, read_audio, resample, split_batch
from model import num_tokens

def sine(seconds, rate=16000, hz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)

# ---- reading

@pytest.mark.parametrize("name, options", [("a.wav", dict(subtype="PCM_16")), ("a.wav", dict(subtype="PCM_24")),
                                           ("a.wav", dict(subtype="FLOAT")), ("a.wav", dict(subtype="PCM_U8")),
                                           ("a.flac", {}), ("a.ogg", {}), ("a.mp3", {})])
def test_formats(write_wav, name, options):
    x = sine(1)
    wav, lengths = load_audio(write_wav(name, x, **options))
    assert lengths.tolist() == [wav.shape[1]] and abs(wav.shape[1] - 16000) <= (2400 if name == "a.mp3" else 0)      # mp3 codecs pad
    if name != "a.mp3":
        assert np.abs(wav[0].numpy() - x).max() < (0.05 if name[-3:] in ("ogg", "mp3")
                                                   else 1e-2 if options.get("subtype") == "PCM_U8" else 1e-4)

def test_stereo_is_averaged_and_a_batch_is_padded(write_wav):
    wav, lengths = load_audio([write_wav("stereo.wav", np.stack([sine(0.5), -sine(0.5)], 1)), write_wav("b.wav", sine(1))])
    assert wav.shape == (2, 16000) and lengths.tolist() == [8000, 16000] and wav[0].abs().max() < 1e-4

@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_a_sine(rate, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)        # our own, also where soxr is installed
    y = resample(sine(1, rate), rate)
    assert len(y) == 16000 and np.abs(y - sine(1))[200:-200].max() < 1e-3

def test_resampling_removes_what_would_alias(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    assert np.abs(resample(sine(1, 44100, 12000), 44100))[200:-200].max() < 1e-3

def test_bad_files_are_named(tmp_path, write_wav):
    (tmp_path / "text.wav").write_text("this is not audio")
    for path, message in ((tmp_path / "text.wav", "cannot be read as audio"), (tmp_path / "none.wav", "no such file")):
        with pytest.raises(UserError, match=message) as error:
            read_audio(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="no audio between 2.0 s"):
        read_audio(write_wav("short.wav", sine(1)), start=2.0)
    with pytest.raises(UserError, match="NaN"):
        read_audio(write_wav("nan.wav", np.full(16000, np.nan, np.float32), subtype="FLOAT"))

# ---- packs

def test_a_folder_becomes_a_pack(tmp_path, write_wav, capsys):
    write_wav("sounds/dog/a.wav", sine(1))
    write_wav("sounds/dog/long.wav", sine(25, 8000), 8000)
    write_wav("sounds/cat/b.wav", sine(0.3))
    write_wav("sounds/cat/tiny.wav", sine(0.1))
    (tmp_path / "sounds/cat/text.wav").write_text("hello")
    (tmp_path / "sounds/cat/notes.txt").write_text("not audio, not listed")
    data.main(["folder", str(tmp_path / "sounds"), "--out", str(tmp_path / "pack")])
    pack = Pack(tmp_path / "pack")
    assert pack.classes == ["cat", "dog"] and pack.table()[0] == [[0], [1], [1], [1], [1]]
    assert pack.samples.tolist() == [4800, 16000, 160000, 160000, 80000]        # 25 s in three pieces
    assert pack.info["rests_dropped"] == 0
    assert np.abs(pack.audio(1) / 32768 - sine(1)).max() < 1e-4
    assert np.array_equal(pack.audio(1, 100, 50), pack.audio(1)[100:150])
    assert [path for path, _ in pack.skipped()] == ["cat/text.wav", "cat/tiny.wav"]
    out = capsys.readouterr().out
    assert "2 of 5 files skipped" in out and "cannot be read as audio" in out
    data.main(["stats", str(tmp_path / "pack")])
    assert "shorter than one patch" in capsys.readouterr().out

def test_statistics_are_those_of_all_bins(ragged):
    pack = Pack(ragged)
    values = np.concatenate([data.fbank(torch.from_numpy(pack.audio(i) / np.float32(32768))[None]).flatten() for i in range(len(pack))])
    assert (pack.info["fbank_mean"] == pytest.approx(values.mean(), rel=1e-4)
            and pack.info["fbank_std"] == pytest.approx(values.std(), rel=1e-4))

def table(tmp_path, text):
    (tmp_path / "meta.csv").write_text(text)
    return str(tmp_path / "meta.csv")

def test_a_table_becomes_a_pack(tmp_path, write_wav):
    write_wav("a.wav", sine(4))
    write_wav("b.wav", sine(1))
    meta = table(tmp_path, 'filename,category,fold,start,end\na.wav,"x;y",1,1.0,2.5\na.wav,y,1,3.0,\nb.wav,x,2,,\n')
    data.main(["csv", meta, "--out", str(tmp_path / "pack")])
    pack = Pack(tmp_path / "pack")
    labels, split, _ = pack.table()
    assert pack.samples.tolist() == [24000, 16000, 16000] and labels == [[0, 1], [1], [0]] and split.tolist() == ["1", "1", "2"]
    assert np.abs(pack.audio(0) / 32768 - sine(4)[16000:40000]).max() < 1e-4
    data.main(["csv", meta, "--out", str(tmp_path / "two"), "--keep", "2", "--label_column", "category"])
    assert len(Pack(tmp_path / "two")) == 1

@pytest.mark.parametrize("text, message", [
    ("name,label\na.wav,x\n", "no column named path.*name.*--path_column"), ("path\n", "no rows"),
    ("path,start,end\na.wav,3,1\n", "line 2.*from 3.0 s to 1.0 s"), ("path,start\na.wav,-1\n", "line 2"),
    ("path\na.wav\na.wav\n", "line 3: a.wav stands there twice"), ("path,start\na.wav,soon\n", "seconds, not 'soon'"),
    ("path\nnowhere.wav\n", "no usable audio.*no such file"), ("path,label\n,x\n", "line 2: no path"),
    ('path,label\na.wav,"dog\nb.wav,cat\n', "unexpected end of data"),
    ('path,label\na.wav,"dog\nb.wav",cat\n', "line 3: a quotation mark is open"),
    ("path,start\na.wav,nan\n", "line 2"), ("path,start,end\na.wav,0,inf\n", "line 2"),
    ("path\na.wav\n./a.wav\n", "line 3: ./a.wav stands there twice")])
def test_bad_tables_are_explained(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        data.main(["csv", table(tmp_path, text), "--out", str(tmp_path / "pack")])
    assert not (tmp_path / "pack").exists() and not list(tmp_path.glob("*.partial"))

def test_other_mistakes(tmp_path, toy):
    (tmp_path / "empty").mkdir()
    for arguments, message in ((["folder", str(tmp_path / "empty"), "--out", "x"], "no audio files below"),
                               (["folder", str(tmp_path / "none"), "--out", "x"], "none: no such folder"),
                               (["csv", str(tmp_path / "none.csv"), "--out", "x"], "none.csv: cannot be read"),
                               (["toy", "--out", toy], "exists; remove it"), (["stats", str(tmp_path)], "is not a pack")):
        with pytest.raises(UserError, match=message):
            data.main(arguments)

def test_a_damaged_shard_is_noticed(tmp_path, ragged):
    shutil.copytree(ragged, tmp_path / "pack")
    shard = tmp_path / "pack/audio-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="audio-00000.bin: .* bytes instead of"):
        Pack(tmp_path / "pack")

def test_shares(toy, ragged):
    assert open_packs(f"{toy}:3,{ragged}:1")[1].tolist() == [0.75, 0.25] and open_packs(f"{toy},{ragged}")[1] is None
    for spec in (f"{toy}:0.5,{ragged}", f"{toy}:x,{ragged}:1", f"{toy}:-1,{ragged}:1"):
        with pytest.raises(UserError, match="weight"):
            open_packs(spec)

def test_toy_sounds_are_a_function_of_the_seed():
    clips = {kind: sounds.toy_clip(np.random.default_rng([0, 1]), kind) for kind in sounds.CLASSES}
    for kind, x in clips.items():
        assert x.shape == (48000,) and np.isfinite(x).all() and 0.01 < np.abs(x).max() <= 1
        assert np.array_equal(x, sounds.toy_clip(np.random.default_rng([0, 1]), kind))
        assert not np.array_equal(x, sounds.toy_clip(np.random.default_rng([0, 2]), kind))

def test_toy_classes_are_not_told_by_their_average_spectrum(tmp_path):
    import finetune
    pack = data.make_toy(tmp_path / "toy", clips=400)
    x = torch.stack([data.fbank(torch.from_numpy(pack.audio(i) / np.float32(32768))[None])[0].mean(0) for i in range(400)])
    (train, _, test), targets = finetune.splits_of(pack)[0][""], finetune.splits_of(pack)[1]
    assert 0.1 < finetune.score(finetune.linear_probe(x[train], targets[train], x[test]), targets[test], False) < 0.6

# ---- batches

def test_an_epoch_holds_each_clip_once_within_the_batch_size():
    samples = np.random.default_rng(0).integers(2800, 160000, 1000)
    batches = epoch_batches(samples, 800000, (0, 0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert all(len(b) * samples[b].max() <= 800000 for b in batches)
    padded, real = sum(len(b) * samples[b].max() for b in batches), samples.sum()
    assert padded < 1.15 * real
    assert [b.tolist() for b in batches] == [b.tolist() for b in epoch_batches(samples, 800000, (0, 0))]
    assert [b.tolist() for b in batches] != [b.tolist() for b in epoch_batches(samples, 800000, (0, 1))]

def test_ranks_together_hear_each_clip_once():
    samples = np.random.default_rng(0).integers(2800, 160000, 1001)
    batches = epoch_batches(samples, 800000, (0, 0), multiple=4)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1001))
    assert sorted(len(b) % 4 for b in batches)[-2:] == [0, 1] and min(map(len, batches)) >= 4      # one batch holds the odd clip
    for n in range(1, 260):                                     # no rank is left without a clip, whatever the number of clips
        for weights in (None, [1.0]):
            batches = epoch_batches(np.full(n, 16000), 80000, (0, 0), [np.arange(n)], weights, multiple=3)
            assert min(map(len, batches)) >= 3 and len(np.concatenate(batches)) == max(n, 3)
    assert [len(b) for b in epoch_batches(samples[:3], 800000, (0, 0), multiple=4)] == [4]         # nobody stays without

def three_corpora():
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.integers(16000, 160000, 3000), rng.integers(8000, 16000, 2000), np.full(50, 160000)])
    return samples, np.split(np.arange(5050), [3000, 5000])

@pytest.mark.parametrize("weights, multiple", [((0.7, 0.15, 0.15), 1), ((0.4, 0.3, 0.3), 4), ((0.98, 0.01, 0.01), 1)])
def test_shares_hold_over_any_run_of_batches(weights, multiple):
    samples, subsets = three_corpora()
    batches = epoch_batches(samples, 60 * 16000, (0, 0), subsets, weights, multiple)
    seconds = np.array([[samples[b][np.isin(b, s)].sum() / 16000 for s in subsets] for b in batches])       # (batches, packs)
    until = np.concatenate([np.zeros((1, 3)), np.cumsum(seconds, 0)])
    assert until[-1].sum() == pytest.approx(samples.sum() / 16000, rel=0.01)
    windows = until[None] - until[:, None]                      # (first, last, packs)
    off = np.abs(windows - np.array(weights) * windows.sum(-1, keepdims=True)).max()
    assert off < 20 < 60                                        # seconds: two clips of ten, a third of a batch
    assert all(len(b) % multiple == 0 for b in batches[:-1]) and max(seconds.sum(1)[:-1]) <= 60 + 1e-6
    counts = np.bincount(np.concatenate(batches), minlength=5050)
    assert all(np.ptp(counts[s]) <= 1 for s in subsets)         # within a pack everyone has a turn before anyone has another

def test_the_order_of_a_mixture_is_a_function_of_the_key():
    samples, subsets = three_corpora()
    a, b, c = ([x.tolist() for x in epoch_batches(samples, 960000, key, subsets, (0.7, 0.2, 0.1))] for key in ((0, 0), (0, 0), (0, 1)))
    assert a == b != c

def test_a_pack_with_a_tiny_share_is_not_lost():
    samples = np.concatenate([np.full(100, 16000), np.full(5, 160000)])
    order = np.concatenate(epoch_batches(samples, 800000, (0, 0), [np.arange(100), np.arange(100, 105)], [0.99, 0.01]))
    assert (order >= 100).sum() == 1
    assert epoch_batches(samples, 800000, (0, 0), [np.arange(0)]) == []

def test_micro_batches_are_bounded_and_cut_to_their_longest_clip():
    samples, subsets = three_corpora()
    packs = [type("Silence", (), dict(samples=samples, __len__=lambda s: len(samples),
                                      read_into=lambda s, out, i, start: out.fill(i % 99)))()]
    clips = Clips(packs)
    for batch in epoch_batches(samples, 60 * 16000, (0, 0), subsets, (0.4, 0.3, 0.3))[:20]:
        whole = clips[[(int(i), 0) for i in batch]]
        parts = split_batch(whole, 30)
        assert torch.equal(torch.cat([p["clip"] for p in parts]), whole["clip"])
        rows = [p["noise"].shape[1] // 8 for p in parts]
        assert all(len(p["wav"]) * r * 2560 <= 30 * 16000 for p, r in zip(parts, rows))
        assert all(p["wav"].shape[1] == (r * 16 - 1) * 160 + 400 and r == num_tokens(int(p["lengths"].max())) // 8
                   for p, r in zip(parts, rows))
        for p in parts:
            for wav, n, noise in zip(p["wav"], p["lengths"], p["noise"]):
                assert n <= len(wav) or num_tokens(int(n)) // 8 == len(noise) // 8

def batches_of(toy, workers, start=(0, 0), count=7):
    clips = Clips([Pack(toy)], crop=41200)
    plan = lambda epoch: epoch_batches(clips.samples, 8 * 41200, (0, epoch))
    stream = Stream(plan, 0, start)
    places, batches = [start], iter(Loader(clips, stream, workers))
    out = [next(batches) for _ in range(count)]
    for _ in range(count):
        places.append(stream.after(places[-1]))
    return out, places

def test_batches_do_not_depend_on_workers_and_continue_anywhere(toy):
    alone, places = batches_of(toy, 0, count=15)        # ten batches an epoch
    assert places[10] == (1, 0)
    for other in (batches_of(toy, 2, count=4)[0], batches_of(toy, 0, places[8], count=7)[0]):
        offset = 0 if len(other) == 4 else 8
        for k, batch in enumerate(other):
            assert all(torch.equal(batch[key], alone[offset + k][key]) for key in batch)

def test_crops_and_tokens_belong_together(toy, tmp_path):
    pack = Pack(toy)
    offsets = np.concatenate([[0], np.cumsum([num_tokens(int(n)) for n in pack.samples])])
    np.arange(offsets[-1]).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    clips = Clips([pack], crop=2560 * 4 + 240, align=data.ROW, tokens=[(Numbers(tmp_path / "tokens.bin", "<u2", offsets[-1]), offsets)])
    starts = set()
    for key in range(30):
        item = {name: value[0] for name, value in clips[[(3, key)]].items()}
        first = int(item["tokens"][0]) - offsets[3]
        assert item["tokens"].tolist() == list(range(offsets[3] + first, offsets[3] + first + 32)) and first % 8 == 0
        assert np.array_equal(item["wav"].numpy(), pack.audio(3)[first // 8 * 2560:][:2560 * 4 + 240])
        starts.add(first)
    assert len(starts) > 8 and max(starts) == num_tokens(48000) - 32

def test_a_batch_ends_with_its_last_patch_row(ragged):
    clips = Clips([Pack(ragged)])
    batch = clips[[(0, 0), (23, 0)]]
    rows = num_tokens(32400) // 8
    assert batch["wav"].shape[1] == (rows * 16 - 1) * 160 + 400 and batch["noise"].shape == (2, rows * 8)
    assert not batch["wav"][0, 4800:].any()
    # a clip's noise is its own, in any batch
    assert torch.equal(batch["noise"][0, :num_tokens(4800)], clips[[(0, 0)]]["noise"][0])

def test_held_out_files_are_not_trained_on(toy, ragged):
    packs = [Pack(toy), Pack(ragged)]
    train, valid = data.hold_out(packs)
    assert not set(np.concatenate(train)) & set(np.concatenate(valid))
    assert sorted(np.concatenate(train + valid).tolist()) == list(range(104)) and [len(v) for v in valid] == [4, 2]

# ---- at the size of AudioSet

def pack_slowly(out, delay=0.0):
    torch.set_num_threads(1)                                # a forked process must not touch its parent's threads
    rows = [dict(path=str(i), labels=[], split="", group="") for i in range(400)]
    def read(row):
        time.sleep(delay)
        rng = np.random.default_rng(int(row["path"]))
        if rng.random() < 0.1:
            raise UserError(f"{row['path']} is broken")
        return rng.uniform(-1, 1, rng.integers(1000, 40000)).astype(np.float32)
    data.write_pack(out, rows, read, max_seconds=1.0, workers=2)

def test_a_packing_killed_anywhere_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_BYTES", 400_000)
    monkeypatch.setattr(data, "SYNC_SECONDS", 0.1)
    pack_slowly(tmp_path / "whole")
    journal, done = tmp_path / "killed.partial/journal", []
    for seconds in np.random.default_rng().uniform(0, 0.5, 10):             # killed at random moments of its writing
        before = journal.stat().st_mtime_ns if journal.exists() else 0
        process = multiprocessing.get_context("fork").Process(target=pack_slowly, args=(tmp_path / "killed", 0.02))
        process.start()
        while process.is_alive() and not (journal.exists() and journal.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.join()
        if not journal.exists():
            break                                           # it was faster
        done.append(journal.read_bytes().count(b"\n"))
    assert done == sorted(done) and done[-1] > done[0]      # each went on where the one before was
    if journal.exists():
        pack_slowly(tmp_path / "killed")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "killed").iterdir()) and len(names) > 10
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

def test_a_packing_of_other_files_starts_anew_and_two_at_once_are_refused(tmp_path):
    import fcntl
    partial = tmp_path / "pack.partial"
    partial.mkdir()
    (partial / "journal").write_text("of something else\n[[16000, 1]]\n")
    (partial / "audio-00000.bin").write_bytes(b"1234")
    with open(partial / "journal") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another data.py is at it"):
            pack_slowly(tmp_path / "pack")
    pack_slowly(tmp_path / "pack")
    pack_slowly(tmp_path / "other")
    assert ((tmp_path / "pack/index.npy").read_bytes() == (tmp_path / "other/index.npy").read_bytes()
            and not Pack(tmp_path / "pack").damaged())

def test_an_interrupted_packing_loses_and_doubles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SYNC_SECONDS", 0.0)
    pack_slowly(tmp_path / "whole")
    calls, fsync = [], data.os.fsync
    def interrupted(fd):
        calls.append(fd)
        fsync(fd)
        if len(calls) in (30, 101):
            raise KeyboardInterrupt                             # as Ctrl-C in the middle of writing the journal
    monkeypatch.setattr(data.os, "fsync", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pack_slowly(tmp_path / "stopped")
    pack_slowly(tmp_path / "stopped")
    assert ((tmp_path / "stopped/index.npy").read_bytes() == (tmp_path / "whole/index.npy").read_bytes()
            and not Pack(tmp_path / "stopped").damaged())

def stop_after(monkeypatch, files):
    """data.read_audio raises KeyboardInterrupt at file number `files`, once."""
    read, count = data.read_audio, iter(range(files + 1))
    def limited(*args):
        if next(count, None) == files:
            raise KeyboardInterrupt
        return read(*args)
    monkeypatch.setattr(data, "read_audio", limited)

@pytest.fixture
def stopped(tmp_path, write_wav, monkeypatch):
    """The command line of a packing of 12 files that was interrupted at the ninth."""
    for i in range(12):
        write_wav(f"sounds/{i:02d}.wav", sine(0.5))
    pack = ["folder", str(tmp_path / "sounds"), "--out", str(tmp_path / "pack"), "--workers", "1"]
    stop_after(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        data.main(pack)
    return pack

def test_sounds_that_changed_meanwhile_are_read_again(stopped, tmp_path, write_wav):
    assert (tmp_path / "pack.partial/journal").read_bytes().count(b"\n") > 3
    write_wav("sounds/02.wav", sine(0.5, level=0.1))
    data.main(stopped)
    levels = [np.abs(Pack(tmp_path / "pack").audio(i)).max() for i in range(12)]
    assert levels[2] < 4000 and min(levels[:2] + levels[3:]) > 16000

def test_what_was_written_unvouched_does_not_stay(stopped, tmp_path):
    with open(tmp_path / "pack.partial/audio-00000.bin", "ab") as f:
        f.write(b"0" * 1000)                                    # as a kill between the audio and the journal leaves it
    for path in (tmp_path / "sounds").iterdir():
        if path.name > "00.wav":
            path.write_text("no audio any more")                # so that nothing is written any more either
    data.main(stopped)
    assert len(Pack(tmp_path / "pack")) == 1 and not Pack(tmp_path / "pack").damaged() and len(Pack(tmp_path / "pack").skipped()) == 11

def test_threads_read_the_right_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_BYTES", 40_000)            # a clip or two per shard
    rows = [dict(path=str(i), labels=[], split="", group="") for i in range(60)]
    pack = data.write_pack(tmp_path / "pack", rows, lambda row: np.full(16000, (int(row["path"]) + 1) / 100, np.float32))
    for _ in range(5):
        clips = Clips([Pack(tmp_path / "pack")])
        for batch in Loader(clips, [[(i, 0), (59 - i, 0)] for i in range(60)], 4):
            assert torch.equal(batch["wav"][:, 0].double(), ((batch["clip"] + 1) / 100 * 32768).double().round())
    assert len(pack.shards) == 60

def test_check_finds_the_clip_that_changed(tmp_path, ragged):
    shutil.copytree(ragged, tmp_path / "pack")
    pack = Pack(tmp_path / "pack")
    with open(tmp_path / "pack/audio-00000.bin", "r+b") as f:
        f.seek(2 * int(pack.index["offset"][7]) + 100)
        f.write(b"xx")
    with pytest.raises(UserError, match="1 clips are not what was packed, number 7"):
        data.main(["check", str(tmp_path / "pack")])

def test_long_files_are_read_by_stretches(write_wav, monkeypatch):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 7, 2)).astype(np.float32)
    path = write_wav("long.wav", x, 44100, subtype="FLOAT")
    whole, part = read_audio(path), read_audio(path, 1.25, 6.5)
    monkeypatch.setattr(data, "STRETCH", 2)
    assert np.abs(read_audio(path) - whole).max() < 1e-6 and len(read_audio(path)) == len(whole) == 7 * 16000
    assert np.abs(read_audio(path, 1.25, 6.5) - part).max() < 1e-6

MEASURE = """
import os, sys, time, numpy as np, data
def resident():                                             # MB, with what is shared
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith("VmRSS")).split()[1]) / 1024
before, began = resident(), time.time()
pack = data.Pack(sys.argv[1])
print("open", time.time() - began, resident() - before)
clips, began = data.Clips([pack]), time.time()
plan = lambda epoch: data.epoch_batches(clips.samples, 5600 * 16000, (0, epoch), multiple=8)
stream = data.Stream(plan, 0)
batches = iter(stream)
next(batches)
print("order", time.time() - began)
small = data.Stream(lambda epoch: data.epoch_batches(clips.samples, 20 * 16000, (0, epoch)), 0)
next(iter(small))
before = resident()
for workers in (0, 1, 4):
    for k, batch in zip(range(10000 if workers == 1 else 1000), data.Loader(clips, small, workers)):
        pass
    print("batches", resident() - before)
"""

@pytest.mark.slow
def test_two_million_clips(tmp_path):
    n, length = 2_000_000, 160_000
    index, per = np.zeros(n, data.INDEX), data.SHARD_BYTES // 2 // length
    index["shard"], index["offset"], index["samples"], index["row"] = (
        np.arange(n) // per, np.arange(n) % per * length, length, np.arange(n))
    shards = [int(x) * length for x in np.bincount(index["shard"])]
    np.save(tmp_path / "index.npy", index)
    for shard, samples in enumerate(shards):
        with open(tmp_path / f"audio-{shard:05d}.bin", "wb") as f:
            f.truncate(2 * samples)                         # a hole: no disk space
    (tmp_path / "pack.json").write_text(json.dumps(dict(version=2, id="x", source="nothing", classes=[], clips=n, shards=shards)))
    out = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], cwd=Path(data.__file__).parent, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    said = [(line.split()[0], [float(x) for x in line.split()[1:]]) for line in out.stdout.splitlines()]
    (_, (seconds, megabytes)), (_, (order,)), *batches = said
    assert seconds < 2 and megabytes < 150
    assert order < 4                                        # 0.4 on a quiet machine
    # MB: after 10,000 batches, and with any number of threads
    assert len(batches) == 3 and all(more < 30 for _, (more,) in batches)
