"""Packs, reading audio, and the order of batches."""
import json

import numpy as np
import pytest
import soundfile
import torch

import data
from common import UserError
from data import Clips, Pack, Stream, collate, epoch_batches, load_audio, loader, open_packs, read_audio, resample
from model import num_tokens

def sine(seconds, rate=16000, hz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)

# ---- reading

@pytest.mark.parametrize("name, options", [("a.wav", dict(subtype="PCM_16")), ("a.wav", dict(subtype="PCM_24")), ("a.wav", dict(subtype="FLOAT")),
                                           ("a.wav", dict(subtype="PCM_U8")), ("a.flac", {}), ("a.ogg", {}), ("a.mp3", {})])
def test_formats(write_wav, name, options):
    x = sine(1)
    wav, lengths = load_audio(write_wav(name, x, **options))
    assert lengths.tolist() == [wav.shape[1]] and abs(wav.shape[1] - 16000) <= (2400 if name == "a.mp3" else 0)      # mp3 codecs pad
    if name != "a.mp3":
        assert np.abs(wav[0].numpy() - x).max() < (0.05 if name[-3:] in ("ogg", "mp3") else 1e-2 if options.get("subtype") == "PCM_U8" else 1e-4)

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
    assert [s["path"] for s in pack.info["skipped"]] == ["cat/text.wav", "cat/tiny.wav"]
    out = capsys.readouterr().out
    assert "2 files skipped" in out and "cannot be read as audio" in out
    data.main(["stats", str(tmp_path / "pack")])
    assert "shorter than one patch" in capsys.readouterr().out

def test_statistics_are_those_of_all_bins(ragged):
    pack = Pack(ragged)
    values = np.concatenate([data.fbank(torch.from_numpy(pack.audio(i) / np.float32(32768))[None]).flatten() for i in range(len(pack))])
    assert pack.info["fbank_mean"] == pytest.approx(values.mean(), rel=1e-4) and pack.info["fbank_std"] == pytest.approx(values.std(), rel=1e-4)

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
    ("name,label\na.wav,x\n", "no column named path.*name.*--path_column"), ("path\n", "no rows"), ("path,start,end\na.wav,3,1\n", "line 2.*from 3.0 s to 1.0 s"),
    ("path,start\na.wav,-1\n", "line 2"), ("path\na.wav\na.wav\n", "line 3: a.wav stands there twice"), ("path,start\na.wav,soon\n", "seconds, not 'soon'"),
    ("path\nnowhere.wav\n", "no usable audio.*no such file")])
def test_bad_tables_are_explained(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        data.main(["csv", table(tmp_path, text), "--out", str(tmp_path / "pack")])
    assert not (tmp_path / "pack").exists() and not list(tmp_path.glob("*.partial"))

def test_other_mistakes(tmp_path, toy):
    (tmp_path / "empty").mkdir()
    for arguments, message in ((["folder", str(tmp_path / "empty"), "--out", "x"], "no audio files below"),
                               (["folder", str(tmp_path / "none"), "--out", "x"], "no such folder"),
                               (["csv", str(tmp_path / "none.csv"), "--out", "x"], "none.csv: cannot be read"),
                               (["toy", "--out", toy], "exists; remove it"), (["stats", str(tmp_path)], "is not a pack")):
        with pytest.raises(UserError, match=message):
            data.main(arguments)

def test_a_damaged_shard_is_noticed(tmp_path, ragged):
    import shutil
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
    clips = {kind: data.toy_clip(np.random.default_rng([0, 1]), kind) for kind in data.TOY_CLASSES}
    for kind, x in clips.items():
        assert x.shape == (48000,) and np.isfinite(x).all() and 0.01 < np.abs(x).max() <= 1
        assert np.array_equal(x, data.toy_clip(np.random.default_rng([0, 1]), kind))
        assert not np.array_equal(x, data.toy_clip(np.random.default_rng([0, 2]), kind))

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

def test_ranks_share_an_epoch_evenly():
    samples = np.random.default_rng(0).integers(2800, 160000, 1001)
    batches = epoch_batches(samples, 800000, (0, 0), multiple=4)
    assert all(len(b) % 4 == 0 for b in batches)
    assert len(np.concatenate(batches)) == 1004 and set(np.concatenate(batches)) == set(range(1001))

def test_packs_get_their_share_of_the_seconds():
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.integers(16000, 160000, 300), rng.integers(8000, 16000, 2000)])
    batches = epoch_batches(samples, 800000, (0, 0), [np.arange(300), np.arange(300, 2300)], [0.25, 0.75])
    order = np.concatenate(batches)
    assert samples[order][order < 300].sum() / samples[order].sum() == pytest.approx(0.25, abs=0.01)
    assert len(np.unique(order[order >= 300])) == 2000        # the small pack is gone through whole, several times

def test_a_pack_with_a_tiny_share_is_not_lost():
    samples = np.concatenate([np.full(100, 16000), np.full(5, 160000)])
    order = np.concatenate(epoch_batches(samples, 800000, (0, 0), [np.arange(100), np.arange(100, 105)], [0.99, 0.01]))
    assert (order >= 100).sum() == 1
    assert epoch_batches(samples, 800000, (0, 0), [np.arange(0)]) == []

def test_worker_processes_open_the_files_themselves(toy):
    import pickle
    pack = Pack(toy)
    assert len(pickle.dumps(pack)) < 1000 and np.array_equal(pickle.loads(pickle.dumps(pack)).audio(3), pack.audio(3))

def batches_of(toy, workers, start=(0, 0), count=7):
    clips = Clips([Pack(toy)], crop=41200)
    plan = lambda epoch: epoch_batches(clips.samples, 8 * 41200, (0, epoch))
    stream = Stream(plan, 0, start)
    places, batches = [start], iter(loader(clips, stream, workers))
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

def test_crops_and_tokens_belong_together(toy):
    pack = Pack(toy)
    offsets = np.concatenate([[0], np.cumsum([num_tokens(int(n)) for n in pack.samples])])
    tokens = np.arange(offsets[-1]).astype(np.uint16)
    clips = Clips([pack], crop=2560 * 4 + 240, align=data.ROW, tokens=[(tokens, offsets)])
    starts = set()
    for key in range(30):
        item = clips[(3, key)]
        first = int(item["tokens"][0]) - offsets[3]
        assert item["tokens"].tolist() == list(range(offsets[3] + first, offsets[3] + first + 32)) and first % 8 == 0
        assert np.array_equal(item["wav"], pack.audio(3)[first // 8 * 2560:][:2560 * 4 + 240])
        starts.add(first)
    assert len(starts) > 8 and max(starts) == num_tokens(48000) - 32

def test_a_batch_ends_with_its_last_patch_row(ragged):
    clips = Clips([Pack(ragged)])
    batch = collate([clips[(0, 0)], clips[(23, 0)]])
    rows = num_tokens(32400) // 8
    assert batch["wav"].shape[1] == (rows * 16 - 1) * 160 + 400 and batch["noise"].shape == (2, rows * 8)
    assert (batch["noise"][0, num_tokens(4800):] == 2).all() and not batch["wav"][0, 4800:].any()

def test_held_out_files_are_not_trained_on(toy, ragged):
    packs = [Pack(toy), Pack(ragged)]
    train, valid = data.hold_out(packs)
    assert not set(np.concatenate(train)) & set(np.concatenate(valid))
    assert sorted(np.concatenate(train + valid).tolist()) == list(range(104)) and [len(v) for v in valid] == [4, 2]
