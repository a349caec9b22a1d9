"""Packs, batches, and the codes that are kept beside a pack."""
import itertools
import json
import os
import re
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
from conftest import ROOT, row_of
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
    for text in ("of 5 recordings 2 left out, 1 cut into clips of at most 10 s: skipped.csv, notes.csv say",
                 "text.wav: cannot be read as audio", "tiny.wav: 0.100 s is shorter"):
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
    ("path\nnowhere.wav\n", "none of its files is there, nowhere.wav the first"),
    ('path,label\na.wav,"dog\nb.wav",cat\n', "line 3: a quotation mark is open")])
def test_mistakes_are_explained_and_leave_nothing(tmp_path, monkeypatch, table, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        data.main(["csv", "meta.csv", "--out", "pack"])
    assert os.listdir() == ["meta.csv"]

@pytest.mark.parametrize("command, message", [
    ("toy --workers -1", "--workers -1: 0 to 1000"), ("toy --max_seconds nan", "--max_seconds nan: 0.175"),
    ("toy --max_seconds -1", "--max_seconds -1"), ("toy --max_seconds inf", "--max_seconds inf"),
    ("toy --clips 0", "--clips 0: 1 to"), ("toy --seed -1", "--seed -1: 0 to"),
    ("toy --workers 100000", "--workers 100000"), ("voxlingua33 x --most -1", "--most -1: is not negative"),
    ("toy --out /", "--out: has to name a folder")])
def test_flags_out_of_range_are_named(tmp_path, command, message):
    with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        data.main(command.split()[:1] + ["--out", f"{tmp_path}/pack"] + command.split()[1:])
    assert not os.listdir(tmp_path)

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
    # 8 recordings; syncs and renames: two files a shard, six files more, and the folder
    for moment in range(8 + 3 * 4 + 6 * 2 + 1):
        out, partial = tmp_path / f"{moment}", tmp_path / f"{moment}.partial"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            die_at(moment, patch)
            write_pack(out)
        finished = min(8, 3 * len(list(partial.glob("shard-*.json"))))
        heard.clear()
        write_pack(out, read=read)
        assert len(heard) == 8 - finished       # what is whole is not done again
        assert content(out) == whole
    audio = [f"audio-{shard:05d}.bin" for shard in range(3)]
    assert sorted(whole) == [*audio, "clips.csv", "index.npy", "notes.csv", "pack.json", "skipped.csv"]

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
    with pytest.raises(UserError, match="1 clips are not what was packed, .*pack/23 the first"):
        data.main(["check", f"{tmp_path}/pack"])
    audio.write_bytes(audio.read_bytes()[:-2])
    with pytest.raises(UserError, match="audio-00000.bin: .* bytes instead of .* make it again"):
        Pack(tmp_path / "pack")

# ---- nothing lost, nothing silent

def packed_folder(tmp_path, *flags):
    """Return the pack of tmp_path/sounds."""
    data.main(["folder", f"{tmp_path}/sounds", "--out", f"{tmp_path}/pack", *flags])
    return Pack(tmp_path / "pack")

def test_what_a_pack_changes_is_said_and_listed(tmp_path, write_wav, capsys):
    x = sine(2)
    write_wav("sounds/a/cancel.wav", np.stack([x, -x], 1))
    write_wav("sounds/a/other_rate.wav", x, 44100)
    write_wav("sounds/b/long.wav", sine(20.1))
    write_wav("sounds/b/silent.wav", 0 * x)
    write_wav("sounds/b/plain.wav", x)
    capsys.readouterr()
    pack = packed_folder(tmp_path)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("of 5 recordings")]
    for text in ("1 resampled", "1 mixed down", "1 cancelled (the loudest channel is kept)", "1 silent",
                 "1 cut into clips of at most 10 s", ": skipped.csv, notes.csv say which"):
        assert text in line
    assert {(path, kind) for path, kind, _ in pack.notes()} == {
        ("a/cancel.wav", "mixed down"), ("a/cancel.wav", "cancelled"), ("a/other_rate.wav", "resampled"),
        ("b/long.wav", "cut"), ("b/silent.wav", "silent")}
    assert pack.notes()[-2] == ("b/long.wav", "cut", "20.10 s, clips: 2, the last 0.100 s dropped")
    assert np.allclose(abs(pack.wav(0)), abs(x), atol=1e-4)     # not the mean

def levels():
    """Return sounds of all levels, and the largest error that a pack may make."""
    noise = np.random.default_rng(0).uniform(-1, 1, 4000).astype(np.float32)
    noise[:2] = -1, 1
    return [(peak * noise, (1 if 2**-8 <= peak <= 1 else peak) * 2**-15)
            for peak in (1.0, 0.5, 2**-8, 1.001, 9830.0, 2.0**31, 2**-9, 3.2e-6, 1e-30)]

def test_levels_are_kept_from_24_bits_to_floats_beyond_full_scale(tmp_path):
    sounds = levels()
    data.write_pack(tmp_path / "pack", list(map(row_of, range(9))), lambda row: sounds[int(row["path"])][0])
    pack = Pack(tmp_path / "pack")
    batch = Clips([pack])[[(clip, 0) for clip in range(9)]]
    heard = data.to_device(batch, CPU)["wav"]
    for clip, (x, error) in enumerate(sounds):
        assert abs(pack.wav(clip).numpy() - x).max() <= error
        assert torch.equal(heard[clip], pack.wav(clip)[:heard.shape[1]])
        assert np.frexp(pack.gain[clip])[0] == 0.5              # a power of two
    assert pack.gain[:3].tolist() == 3 * [1 / 32768]
    scaled = [path for path, kind, _ in pack.notes() if kind == "scaled"]
    assert scaled == list("345678")

def test_sixteen_bits_come_back_bit_for_bit_however_quiet(tmp_path):
    sounds = [np.linspace(-most, most, 4000).round() for most in (1, 2, 127, 128, 32767)]
    data.write_pack(tmp_path / "pack", list(map(row_of, range(5))),
                    lambda row: (sounds[int(row["path"])] / 32768).astype(np.float32))
    pack = Pack(tmp_path / "pack")
    for clip, x in enumerate(sounds):
        assert np.array_equal(pack.wav(clip) * 32768, x)

def test_a_pack_without_gains_is_read_as_it_was(ragged, tmp_path):
    path, pack = shutil.copytree(ragged, tmp_path / "pack"), Pack(ragged)
    index = np.array(pack.index[["shard", "offset", "samples", "row", "crc"]].tolist(),
                     np.dtype(packs.INDEX.descr[:-1]))
    np.save(path / "index.npy", index)
    (path / "notes.csv").unlink()
    info = pack.info | dict(id=packs.id_of(index))
    del info["recordings"]
    (path / "pack.json").write_text(json.dumps(info))
    old = Pack(path)
    assert torch.equal(old.wav(3), pack.wav(3))
    assert old.notes() == []
    data.main(["check", str(path)])

def test_names_of_any_bytes_are_packed_and_read_back(tmp_path, write_wav):
    names = ["new\nline", "cr\rx", " lead", "com,ma", 'quo"te', "semi;colon", "\U0001f600", "a\\b", "tab\t"]
    for name in names:
        write_wav(f"sounds/a/{name}.wav", sine(0.5))
    for folder, name in ((b"a", b"caf\xe9.wav"), (b"\xff", b"x.wav")):
        target = os.path.join(os.fsencode(tmp_path / "sounds"), folder)
        os.makedirs(target, exist_ok=True)
        shutil.copy(tmp_path / "sounds/a/ lead.wav", os.path.join(target, name))
    pack = packed_folder(tmp_path)
    paths = {row["path"]: row["labels"] for row in pack.rows()}
    lines = [re.sub("[\n\r\t]", lambda match: f"\\x{ord(match[0]):02x}", name) for name in names]
    assert paths == {f"a/{name}.wav": "a" for name in [*lines, "caf\\xe9"]} | {"\\xff/x.wav": "\\xff"}
    assert pack.table[0].counts.tolist() == 11 * [1]
    data.main(["check", f"{tmp_path}/pack"])

def test_names_that_a_caller_made_of_surrogates_come_back(tmp_path):
    rows = [row_of("caf\udce9", ["\ud800"]), row_of("b", ["x"])]
    data.write_pack(tmp_path / "pack", rows, lambda row: sine(1))
    assert [row["path"] for row in Pack(tmp_path / "pack").rows()] == ["caf\udce9", "b"]
    assert Pack(tmp_path / "pack").table[0].counts.tolist() == [1, 1]

@pytest.mark.parametrize("error", [MemoryError(), TypeError("x"), KeyError("x"), OSError(5, "x"),
                                   RecursionError()])
def test_whatever_goes_wrong_in_one_recording_is_its_reason_alone(tmp_path, error):
    def read(row):
        if row["path"] == "1":
            raise error
        return sine(1)
    data.write_pack(tmp_path / "pack", list(map(row_of, range(4))), read)
    pack = Pack(tmp_path / "pack")
    [(path, reason)] = pack.skipped()
    assert path == "1" and reason.startswith(f"1: {type(error).__name__}")
    assert pack.index["row"].tolist() == [0, 2, 3]

@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_numbers_that_are_no_sound_are_left_out(tmp_path, value):
    sounds = sine(1), np.full(16000, value, np.float32)
    data.write_pack(tmp_path / "pack", [row_of(0), row_of(1)], lambda row: sounds[int(row["path"])])
    pack = Pack(tmp_path / "pack")
    assert "1: its samples reach" in pack.skipped()[0][1]

def test_a_header_that_floods_the_pack_is_not_believed(tmp_path, write_wav, monkeypatch):
    write_wav("sounds/a/x.wav", sine(1))
    write_wav("sounds/b/y.wav", sine(1))
    decode = packs.decode
    def flooding(path, start, end):
        x, notes = decode(path, start, end)
        return (np.tile(x, 9000) if path.name == "x.wav" else x), notes
    monkeypatch.setattr(packs, "decode", flooding)
    [(path, reason)] = packed_folder(tmp_path).skipped()
    assert re.search("x.wav: 9000 s of sound in 32044 bytes: its header cannot be right", reason)

def test_statistics_are_of_what_sounds_and_silence_alone_has_usable_ones(tmp_path, capsys):
    loud = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    rows = list(map(row_of, range(12)))
    stats = []
    for name, sounds in (("one", [11]), ("all", range(12)), ("none", [])):
        data.write_pack(tmp_path / name, rows, lambda row: loud * (int(row["path"]) in sounds))
        stats.append(Pack(tmp_path / name).info)
    values = fbank(torch.from_numpy((loud * 32768).round() / 32768)[None])
    for info in stats[:2]:
        assert info["fbank_mean"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert info["fbank_std"] == pytest.approx(values.std().item(), rel=1e-3)
    assert stats[2]["fbank_std"] == 1
    assert "nothing in it sounds" in capsys.readouterr().out

def test_statistics_do_not_know_what_is_there_for_testing(tmp_path):
    def read(row):
        noise = np.random.default_rng(int(row["path"])).standard_normal(16000)
        return (noise * (0.1 if row["split"] == "train" else 0.001)).astype(np.float32)
    data.write_pack(tmp_path / "pack", [row_of(i, "a", ("train", "test")[i % 2]) for i in range(8)], read)
    pack = Pack(tmp_path / "pack")
    values = torch.cat([fbank(pack.wav(i)[None]) for i in range(0, 8, 2)])
    assert pack.info["fbank_mean"] == pytest.approx(values.mean().item(), rel=1e-4)

def test_a_recording_without_a_label_among_labelled_ones_is_said(tmp_path, capsys):
    data.write_pack(tmp_path / "pack", [row_of(0, "a"), row_of(1), row_of(2, "b")], lambda row: sine(1))
    assert "of 3 recordings 1 without a label though others have one" in capsys.readouterr().out
    assert Pack(tmp_path / "pack").notes() == [("1", "without a label", "")]
    data.write_pack(tmp_path / "bare", [row_of(0), row_of(1)], lambda row: sine(1))
    assert "without a label" not in capsys.readouterr().out

@pytest.mark.parametrize("text, kept", [
    (b"", ["one", "two"]), (b"\xef\xbb\xbfone\r\n\r\n", ["two"]), ("two.wav\n".encode("utf-16"), ["one"]),
    (b"  a/one.wav  \r\nnobody", ["two"])])
def test_an_exclude_list_may_be_empty_or_from_windows(tmp_path, write_wav, text, kept):
    for name in ("one", "two"):
        write_wav(f"sounds/a/{name}.wav", sine(1))
    (tmp_path / "list.txt").write_bytes(text)
    pack = packed_folder(tmp_path, "--exclude", f"{tmp_path}/list.txt", "--folders", "classes")
    assert [pack.rows()[row]["path"] for row in pack.index["row"]] == [f"a/{name}.wav" for name in kept]

def test_a_name_with_spaces_can_be_excluded_and_a_pack_of_less_than_a_second_used(tmp_path, write_wav):
    for name in (" one ", "two"):
        write_wav(f"sounds/a/{name}.wav", sine(0.176))
    (tmp_path / "list.txt").write_text(" one .wav\n")
    flags = ["--exclude", f"{tmp_path}/list.txt", "--folders", "nothing"]
    pack = packed_folder(tmp_path, *flags)
    assert len(pack) == 1
    assert Sounds(str(pack.path), 0.0, 1.0).fbank_stats()["fbank_mean"] == pack.info["fbank_mean"]

def test_a_second_packing_under_one_name_is_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "pack.partial").mkdir()
    with open(tmp_path / "pack.partial/.pack.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="pack.partial.*another process is writing it"):
            write_pack(tmp_path / "pack")
    write_pack(tmp_path / "pack")
    assert not list((tmp_path / "pack").glob(".*"))

# ---- packs are not trusted

def of_index(change):
    """Return what edits the index of a pack, and its id with it."""
    def edit(path):
        index, info = np.load(path / "index.npy"), json.loads((path / "pack.json").read_text())
        index = change(index) if callable(change) else index
        np.save(path / "index.npy", index)
        (path / "pack.json").write_text(json.dumps(info | dict(id=packs.id_of(index), clips=len(index))))
    return edit

def at(name, value):
    """Return what edits one field of clip 3."""
    def change(index):
        index[name][3] = value
        return index
    return of_index(change)

def of_info(**values):
    """Return what edits pack.json; None removes a key."""
    def edit(path):
        info = json.loads((path / "pack.json").read_text()) | values
        text = json.dumps({key: value for key, value in info.items() if value is not None})
        (path / "pack.json").write_text(text)
    return edit

def of_text(name, old, new):
    """Return what edits a table."""
    def edit(path):
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new, 1))
    return edit

def of_bytes(name, content):
    return lambda path: (path / name).write_bytes(content)

def instead_of(name, make):
    """Return what puts something else where a file was."""
    def edit(path):
        os.replace(path / name, path.parent / "moved")
        make(path / name)
    return edit

def link(path):
    os.symlink(path.parent.parent / "moved", path)

BAD_PACKS = dict(
    negative_samples=(at("samples", -100), "index.npy: clip 3 cannot be"),
    short=(at("samples", 2799), "clip 3"), long=(at("samples", 2**31 - 1), "clip 3"),
    negative_row=(at("row", -3), "clip 3"), row_beyond=(at("row", 24), "clips.csv: lists 24 recordings"),
    negative_offset=(at("offset", -1), "clip 3"), far_offset=(at("offset", 2**63 - 1), "clip 3"),
    shard=(at("shard", 8), "clip 3"), negative_shard=(at("shard", -1), "clip 3"),
    gain=(at("gain", np.nan), "clip 3"), no_gain=(at("gain", 0), "clip 3"),
    dtype=(of_index(lambda index: index["samples"].astype("f8")), "index.npy: not the index of the clips"),
    shape=(of_index(lambda index: index[None]), "index.npy: not the index"),
    empty=(of_index(lambda index: index[:0]), "no clips"),
    cut=(of_bytes("index.npy", b"x"), "index.npy: cannot be read"),
    pickle=(lambda path: np.save(path / "index.npy", np.array([{}]), allow_pickle=True), "cannot be read"),
    edited=(lambda path: np.save(path / "index.npy", np.load(path / "index.npy")[::-1]), "its hash is not"),
    nan=(of_info(fbank_mean=float("nan")), "pack.json: fbank_mean nan"),
    std=(of_info(fbank_std=0.0), "fbank_std 0.0"), text=(of_info(fbank_std="1"), "fbank_std '1'"),
    no_mean=(of_info(fbank_mean=None), "fbank_mean None"), no_classes=(of_info(classes=None), "'classes'"),
    no_id=(of_info(id=None), "'id' is not a str"), twice=(of_info(classes=["a", "a"]), "a class is no name"),
    numbers=(of_info(classes=[1, 2]), "a class is no name"), hours=(of_info(hours="x"), "hours"),
    version=(of_info(version=3), "of version 3, where"), clips=(of_info(clips=7), "not the index of the"),
    shards=(of_info(shards=["a"]), "size of a shard"), fewer=(of_info(shards=[1]), "clip 0 cannot be"),
    deep=(of_bytes("pack.json", b"[" * 100_000), "pack.json: cannot be read"),
    list=(of_bytes("pack.json", b"[]"), "holds no keys"), latin=(of_bytes("pack.json", b"\xe9"), "cannot be"),
    unknown=(of_info(classes=["a", "c"]), "clips.csv: 'b' is not a class"),
    line=(of_text("clips.csv", "3,b,1,\n", ""), "clips.csv: lists 23 recordings"),
    field=(of_text("clips.csv", "3,b,1,", "3,b"), "clips.csv: line 5 is cut short"),
    header=(of_text("clips.csv", "path,", "paths,"), "clips.csv: its header is not"),
    binary=(of_bytes("clips.csv", b"path,labels,split,group\n\xff,,,\n"), "clips.csv: cannot be read"),
    no_table=(lambda path: (path / "clips.csv").unlink(), "clips.csv: No such file"),
    no_skipped=(lambda path: (path / "skipped.csv").unlink(), "skipped.csv: No such file"),
    no_shard=(lambda path: (path / "audio-00000.bin").unlink(), "audio-00000.bin: No such file"),
    pipe=(instead_of("audio-00000.bin", os.mkfifo), "audio-00000.bin: a link, a folder or a pipe"),
    link=(instead_of("audio-00000.bin", link), "audio-00000.bin: a link"),
    folder=(instead_of("audio-00000.bin", os.mkdir), "audio-00000.bin: a link, a folder"),
    index_pipe=(instead_of("index.npy", os.mkfifo), "index.npy: a link, a folder or a pipe"),
    info_pipe=(instead_of("pack.json", os.mkfifo), "pack.json: a link, a folder or a pipe"),
    table_pipe=(instead_of("clips.csv", os.mkfifo), "clips.csv: a link, a folder or a pipe"))

@pytest.mark.parametrize("kind", BAD_PACKS)
def test_an_edited_or_damaged_pack_is_refused_in_one_line(ragged, tmp_path, kind):
    edit, message = BAD_PACKS[kind]
    path = shutil.copytree(ragged, tmp_path / "pack", ignore=shutil.ignore_patterns("codes-*"))
    edit(path)
    with pytest.raises(UserError, match=f"^{path}[^\n]*{re.escape(message)}[^\n]*$"):
        pack = Pack(path)
        pack.table, pack.skipped()

# ---- other systems

def test_audio_is_read_alike_without_preadv_and_without_pread_by_many_threads(ragged, monkeypatch):
    pack = Pack(ragged)
    due = [pack.audio(i) for i in range(len(pack))]
    for name in ("preadv", "pread"):
        monkeypatch.delattr(os, name)
        for _ in range(10):
            for x, y in zip(packs.in_order(pack.audio, range(len(pack)), 4), due):
                assert np.array_equal(x, y)

def test_limits_of_open_files_are_raised_only_where_needed_and_never_in_the_way(ragged, monkeypatch):
    resource = pytest.importorskip("resource")
    infinite, asked = resource.RLIM_INFINITY, []
    for limits, files, due in (((256, infinite), 8, True), ((256, infinite), 4000, True),
                               ((256, 1024), 4000, 1024), ((9999, infinite), 8, False),
                               ((infinite, infinite), 4000, False)):
        asked.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda kind, wanted: asked.append(wanted))
        packs.allow_files(files)
        if due:
            [(soft, hard)] = asked
            assert hard == limits[1]
            assert soft == 1024 if due == 1024 else files + 256 < soft < files + 1256
        assert bool(asked) == bool(due)
    def refused(kind, wanted):
        raise ValueError("not allowed to raise maximum limit")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, infinite))
    monkeypatch.setattr(resource, "setrlimit", refused)
    packs.allow_files(4000)
    assert len(Pack(ragged)) == 24

WINDOWS = """
import os, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("preadv", "pread"):
    delattr(os, name)
import numpy as np
import torch
import data
from tokenizer import RandomProjectionTokenizer
for path in sys.argv[1:]:
    data.write_pack(path, [dict(path="x", labels=[], split="", group="")], lambda row: np.ones(9000) / 2)
    pack = data.Pack(path)
    data.cached_codes(RandomProjectionTokenizer(), pack, torch.device("cpu"))
    print(pack.wav(0)[0])
del pack
data.Pack(path).wav(0)
left_open = data.Pack(path)
"""

def test_a_system_without_fcntl_resource_and_preadv_packs_and_leaves_no_file_open(tmp_path):
    command = [sys.executable, "-W", "error::ResourceWarning",
               "-c", WINDOWS, f"{tmp_path}/a", f"{tmp_path}/b"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor(0.5000)") == 2
    assert "Warning" not in done.stderr

# ---- batches

def test_an_epoch_holds_each_clip_once_within_the_batch_size():
    samples = np.random.default_rng(0).integers(2800, 160000, 1000)
    batches, other = (epoch_batches(samples, 800000, (0, epoch)) for epoch in (0, 1))
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))
    padded = [len(batch) * samples[batch].max() for batch in batches]
    assert max(padded) <= 800000
    assert sum(padded) < 1.15 * samples.sum()

def test_epochs_and_seeds_have_orders_crops_and_noise_of_their_own(toy):
    sounds, plans, heard = Sounds(toy, 2.56, 20.48), [], set()
    for sounds.seed in (0, 1):
        plans += [np.concatenate(sounds.plan(epoch)).tolist() for epoch in (0, 1)]
        dealt = data.deal(sounds.plan, sounds.seed)
        items = [item for _ in range(2 * len(sounds.plan(0))) for item in next(dealt)[0]]
        heard.update(item[1:] for item in items)
    assert len(set(map(tuple, plans))) == 4
    assert len(heard) == sum(map(len, plans))           # keys of what is random
    assert max(map(len, sounds.plan(0))) == 8           # 20.48 s
    assert not np.array_equal(*[np.concatenate(Sounds(toy, 0.0, 9.0, seed=seed).valid) for seed in (0, 1)])

def test_batches_of_short_and_long_clips_come_in_any_order():
    samples = np.arange(1000, 2000)
    lengths = [samples[batch].mean() for batch in epoch_batches(samples, 40_000, (0, 0))]
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.5      # sorted it would be 1

def test_samples_are_shares_of_full_scale_and_what_is_padded_is_not_valid():
    wav = torch.tensor([[-32768, 16384] * 4000, [8192] * 3000 + [0] * 5000], dtype=torch.int16)
    batch = data.to_device(dict(wav=wav, lengths=torch.tensor([8000, 3000])), CPU)
    assert batch["wav"][:, :2].tolist() == [[-1, 0.5], [0.25, 0.25]]
    assert batch["valid"].sum(1).tolist() == [24, 8]
    assert torch.equal(batch["mask"], batch["valid"])
    assert data.to_device(dict(wav=wav, lengths=torch.tensor([8000, 7950])), CPU)["mask"] is None

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

@pytest.mark.parametrize("name, heard", [
    ("test-clean", False), ("dev_other", False), ("Test set", False), ("FSD50K.eval_audio", False),
    ("validation2", False), ("my-tests", False), ("train-clean-100", True), ("contest", True)])
def test_a_split_with_a_word_for_testing_in_its_name_is_not_heard(name, heard, tmp_path):
    rows = [row_of(i, "a", name if i % 2 else "other") for i in range(8)]
    data.write_pack(tmp_path / "pack", rows, lambda row: sine(1))
    left = "none" if heard else f"4 of {name}"
    assert str(Sounds(str(tmp_path / "pack"), 0.0, 10.0)).endswith(f"left out: {left}")

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
    third.write_bytes(other := third.read_bytes()[:-2] + b"\1\0")
    data.cached_codes(distilled, pack, CPU)
    assert second.read_bytes() == whole
    assert third.read_bytes() == other                  # nobody computed it again
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

def test_codes_of_two_dtypes_do_not_mix(pack, distilled):
    for dtype in ("float32", "bfloat16", "float32"):
        data.cached_codes(distilled, pack, CPU, dtype)
    assert len(list(pack.path.glob("codes-*"))) == 2

@pytest.mark.parametrize("content, message", [
    (np.full((10, 48), 32, np.uint16), "holds code 32, where there are 32"),
    (np.zeros((10, 40), np.uint16), r"uint16 of shape \(10, 40\) instead of uint16 of \(10, 48\)"),
    (np.zeros((10, 48), np.int16), "int16 of shape"), (np.zeros(480), "float64 of shape")])
def test_codes_that_cannot_be_are_refused_in_one_line(pack, distilled, content, message):
    data.cached_codes(distilled, pack, CPU)
    first = min(pack.path.glob("codes-*/*"))
    np.save(first, content)
    with pytest.raises(UserError, match=f"^{first}: {message}[^\n]*; remove it, it is made again$"):
        data.cached_codes(distilled, pack, CPU)
    first.unlink()
    data.cached_codes(distilled, pack, CPU)

@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_codes_that_are_no_file_are_refused_and_nothing_hangs(pack, distilled, make):
    data.cached_codes(distilled, pack, CPU)
    first = min(pack.path.glob("codes-*/*"))
    first.unlink()
    make(first)
    with pytest.raises(UserError, match=f"^{first}: missing, or a link or a pipe"):
        data.cached_codes(distilled, pack, CPU)

def test_a_full_disk_leaves_no_codes_behind(pack, distilled, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="codes-.*No space left.*write to"):
        patch.setattr(os, "fsync", full)
        data.cached_codes(distilled, pack, CPU)
    assert not list(pack.path.glob("codes-*/*"))
    data.cached_codes(distilled, pack, CPU)

def test_a_full_disk_ends_a_packing_that_goes_on_later(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        write_pack(tmp_path / "pack")
    assert not list((tmp_path / "pack.partial").glob("audio*"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="toy: No space .*same command"):
        patch.setattr(os, "fsync", full)
        data.main(["toy", "--clips", "3", "--out", f"{tmp_path}/toy"])
    assert content(write_pack(tmp_path / "pack").path) == content(write_pack(tmp_path / "other").path)

# ---- at the size of AudioSet

def resident_megabytes():
    return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024

@pytest.mark.slow
def test_two_million_clips_open_fast_with_little_memory(tmp_path):
    number = np.arange(2_000_000)
    index = np.zeros(len(number), packs.INDEX)
    index["shard"], index["offset"] = number // 500, number % 500 * 160_000
    index["samples"], index["row"], index["gain"] = 160_000, number, 2**-15
    np.save(tmp_path / "index.npy", index)
    for shard in range(4000):
        with open(tmp_path / f"audio-{shard:05d}.bin", "wb") as file:
            file.truncate(500 * 320_000)        # a hole: no disk space
    info = dict(version=2, id=packs.id_of(index), source="", classes=["a", "b"], clips=len(number), hours=1.0,
                shards=[500 * 160_000] * 4000, fbank_mean=0.0, fbank_std=1.0)
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

def test_who_reads_only_the_first_lines_of_what_is_said_gets_no_error(ragged):
    command = f"{sys.executable} data.py stats {ragged} | true"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")

@pytest.mark.parametrize("error, way_out", [
    (PermissionError(13, "Permission denied"), "choose another --out"),
    (OSError(28, "No space left on device"), "once that is mended the same command goes on")])
def test_a_pack_that_cannot_be_written_names_the_way_out(error, way_out, write_wav, tmp_path, monkeypatch):
    def refuse(*_):
        raise error
    write_wav("sounds/a.wav", sine(1))
    monkeypatch.setattr(packs, "write_pack", refuse)
    with pytest.raises(UserError, match=f"pack: {error.strerror}; {way_out}"):
        data.main(["folder", f"{tmp_path}/sounds", "--out", f"{tmp_path}/pack"])
