"""Known data sets: miniature trees of the exact layout on disk, with its traps."""
import json
import shutil

import numpy as np
import pytest
import torch

import data
import evaluate
import recipes
from audio import fbank
from common import UserError
from recipes import toy

TONE = (0.3 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)

def packed(tmp_path, *arguments):
    """Return the pack that a command makes, and (split, group, *labels) of each clip."""
    data.main([*map(str, arguments), "--out", str(tmp_path / "pack")])
    pack = data.Pack(tmp_path / "pack")
    clips = zip(*pack.table())
    return pack, [(split, group, *(pack.classes[c] for c in labels)) for labels, split, group in clips]

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

def test_every_recipe_explains_itself():
    for name in recipes.commands():
        with pytest.raises(SystemExit, match="0"):
            data.main([name, "--help"])

CLASSES = ('index,mid,display_name\n0,/m/09x0r,"Speech"\n'
           '1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00088,"Gargling"\n')
SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
aBcDeFgHiJ0, 0.000, 6.000, "/m/05zppz"
with_under_, 110.000, 120.000, "/m/09x0r"
millisecond, 12.500, 22.500, "/m/09x0r"
#NAME?, 1.000, 11.000, "/m/09x0r"
notdownload, 1.000, 11.000, "/m/09x0r"
"""

def audioset(tmp_path, *tables):
    """Pack tmp_path/audio by tables, flags and files in turn."""
    classes = write(tmp_path / "classes.csv", CLASSES)
    return packed(tmp_path, "audioset", tmp_path / "audio", "--class_csv", classes, *tables)

def test_audioset_files_go_by_several_names(tmp_path, write_wav):
    for name in ("--PJHxphWEs.wav", "a/YaBcDeFgHiJ0.wav", "b/Ywith_under__110.000_120.000.wav",
                 "b/millisecond_12500_22500.wav", "EVALUATION0_30.flac"):
        write_wav(f"audio/{name}", TONE)
    train = write(tmp_path / "balanced_train_segments.csv", SEGMENTS)
    test = write(tmp_path / "eval.csv", '# a\nEVALUATION0, 30.000, 40.000, "/t/dd00088,/m/05zppz"\n')
    pack, clips = audioset(tmp_path, "--train", train, "--test", test)
    assert pack.classes == ["Speech", "Male speech, man speaking", "Gargling"]      # by index
    assert clips == [
        ("train", "--PJHxphWEs", "Speech", "Gargling"), ("train", "aBcDeFgHiJ0", "Male speech, man speaking"),
        ("train", "with_under_", "Speech"), ("train", "millisecond", "Speech"),
        ("test", "EVALUATION0", "Gargling", "Male speech, man speaking")]
    assert [path for path, _ in pack.skipped()] == ["#NAME?", "notdownload"]

def test_audioset_as_ast_lists_it(tmp_path, write_wav):
    write_wav("audio/abcdefghijk.wav", TONE)
    items = [{"wav": "/somewhere/else/Yabcdefghijk.wav", "labels": "/m/09x0r,/t/dd00088", "video_id": "x"},
             {"wav": "/gone/b.wav", "labels": "/m/09x0r"}]
    pack, clips = audioset(tmp_path, "--train", write(tmp_path / "train.json", json.dumps({"data": items})))
    assert clips == [("train", "abcdefghijk", "Speech", "Gargling")]
    assert [path for path, _ in pack.skipped()] == ["b"]

def test_audioset_tables_that_cannot_be_meant_are_refused(tmp_path, write_wav):
    write_wav("audio/abcdefghijk.wav", TONE)
    line = 'abcdefghijk, 30.000, 40.000, "/m/09x0r"\n'
    for text, message in ((2 * line, "line 2: abcdefghijk stands in .*t.csv, line 1 already"),
                          (line.replace("09x0r", "nobody"), "line 1: label '/m/nobody' is not in"),
                          ("path,label\n", "line 1: wants YTID")):
        with pytest.raises(UserError, match=message):
            audioset(tmp_path, "--train", write(tmp_path / "t.csv", text))
    write_wav("audio/other/abcdefghijk.flac", TONE)
    with pytest.raises(UserError, match="have one name"):
        audioset(tmp_path, "--train", write(tmp_path / "t.csv", line))

def test_class_lists_are_checked(tmp_path, write_wav):
    write_wav("a.wav", TONE)
    meta = write(tmp_path / "meta.csv", "path,label\na.wav,dog\n")
    names = tmp_path / "names.txt"
    for text, message in (("cat\n", "not in the class list: .*dog"), ("cat\ncat\n", "each once"),
                          ("index,mid,display_name\n1,/m/1,dog\n", "does not count")):
        with pytest.raises(UserError, match=message):
            packed(tmp_path, "csv", meta, "--classes", write(names, text))
    assert packed(tmp_path, "csv", meta, "--classes", write(names, "cat\ndog\n"))[0].classes == ["cat", "dog"]

def test_esc50(tmp_path, write_wav):
    text = "filename,fold,target,category,esc10,src_file,take\n"
    for name, category in (("1-32-A-0", "dog"), ("1-38-A-14", "chirping_birds"), ("5-9-B-0", "dog")):
        write_wav(f"ESC-50-master/audio/{name}.wav", TONE)
        fold, recording, take, target = name.split("-")
        text += f"{name}.wav,{fold},{target},{category},True,{recording},{take}\n"
    write(tmp_path / "ESC-50-master/meta/esc50.csv", text)
    pack, clips = packed(tmp_path, "esc50", tmp_path)
    assert pack.classes == ["dog", "chirping_birds"]                    # by target, not by alphabet
    assert clips == [("1", "32", "dog"), ("1", "38", "chirping_birds"), ("5", "9", "dog")]

def test_speech_commands_of_35_words(tmp_path, write_wav):
    for name in ("right/a69b_nohash_0", "right/0a7c_nohash_0", "left/a69b_nohash_1", "_background_noise_/x"):
        write_wav(f"sc/{name}.wav", TONE[:12000])
    write(tmp_path / "sc/validation_list.txt", "right/a69b_nohash_0.wav\nright/missing0_nohash_0.wav\n")
    testing = write(tmp_path / "sc/testing_list.txt", "left/a69b_nohash_1.wav\n")
    pack, clips = packed(tmp_path, "speechcommands", tmp_path / "sc")
    assert pack.classes == ["left", "right"]
    assert clips == [("test", "a69b", "left"), ("train", "0a7c", "right"), ("valid", "a69b", "right")]
    assert (pack.samples == 12000).all()                                # short clips keep their length
    assert [path for path, _ in pack.skipped()] == ["right/missing0_nohash_0.wav"]
    testing.unlink()
    with pytest.raises(UserError, match="testing_list.txt: no such file"):
        packed(tmp_path, "speechcommands", tmp_path / "sc")

def test_speech_commands_of_superb(tmp_path, write_wav):
    for name in ("00000000", "00000001", "00000002"):       # valid, train and nobody: their names' hash
        write_wav(f"sc/yes/{name}_nohash_0.wav", TONE)
        write_wav(f"sc/bed/{name}_nohash_3.wav", TONE)
    write_wav("sc/_background_noise_/tap.wav", np.tile(TONE, 2))
    classes = "yes no up down left right on off stop go _unknown_ _silence_".split()
    for label in classes:
        write_wav(f"test/{label}/x_nohash_0.wav", TONE)
    command = ["speechcommands", tmp_path / "sc", "--version", 1, "--test_root", tmp_path / "test"]
    pack, clips = packed(tmp_path, *command)
    assert pack.classes == classes
    wanted = [("test", "x", label) for label in classes]
    for split, name in (("valid", "00000000"), ("train", "00000001")):
        wanted += [(split, name, "yes"), (split, name, "_unknown_"), *2 * [(split, "tap", "_silence_")]]
    assert sorted(clips) == sorted(wanted)
    assert (pack.samples == 16000).all()                                # also of the silence
    (tmp_path / "test/_silence_/x_nohash_0.wav").unlink()
    for flags, message in ((command, "test/_silence_: no wav files"), (command[:4], "needs a --test_root")):
        with pytest.raises(UserError, match=message):
            packed(tmp_path, *flags)

def test_iemocap(tmp_path, write_wav):
    root = tmp_path / "IEMOCAP_full_release"
    line = "[6.2901 - 8.2357]\t{}\t{}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n"
    for session in range(1, 6):
        dialog, folder = f"Ses0{session}F_impro01", root / f"Session{session}/dialog/EmoEvaluation"
        text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        for i, emotion in enumerate(["neu", "hap", "exc", "ang", "sad", "fru", "xxx"]):
            name = f"{dialog}_{'FM'[i % 2]}{i:03d}"
            text += line.format(name, emotion)
            write_wav(f"{root.name}/Session{session}/sentences/wav/{dialog}/{name}.wav", TONE)
        write(folder / f"{dialog}.txt", text)
        write(folder / f"._{dialog}.txt", line.format("Ses01F_mac_F000", "neu"))
        write(folder / f"Categorical/{dialog}_e1_cat.txt", line.format("Ses01F_other_F000", "neu"))
    pack, clips = packed(tmp_path, "iemocap", tmp_path)
    assert pack.classes == ["neu", "hap", "ang", "sad"]
    assert [label for _, _, label in clips] == 5 * ["neu", "hap", "hap", "ang", "sad"]
    assert clips[4:7] == [("1", "Ses01F", "sad"), ("2", "Ses02F", "neu"), ("2", "Ses02M", "hap")]
    shutil.rmtree(root / "Session5")
    with pytest.raises(UserError, match="Session5.*all needed"):
        packed(tmp_path, "iemocap", root)

def test_toy_sounds_are_a_function_of_the_seed():
    for kind in toy.CLASSES:
        x, again, other = [toy.toy_clip(np.random.default_rng([0, seed]), kind) for seed in (1, 1, 2)]
        assert x.shape == (48000,)
        assert 0.01 < np.abs(x).max() <= 1
        assert np.array_equal(x, again)
        assert not np.array_equal(x, other)

def test_toy_classes_are_not_told_by_their_average_spectrum(tmp_path):
    pack = data.make_toy(tmp_path / "toy", clips=400)
    x = torch.stack([fbank(pack.wav(i)[None])[0].mean(0) for i in range(400)])
    y, (train, _, test) = evaluate.targets_of(pack), evaluate.splits_of(pack)[""]
    scores = evaluate.linear_probe(x[train], y[train], x[test], False)
    assert 0.1 < evaluate.score(scores, y[test], False) < 0.6
