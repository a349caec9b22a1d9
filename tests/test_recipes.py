"""Known data sets: miniature trees of the exact layout on disk, with its traps."""
import argparse
import hashlib
import json
import shutil

import numpy as np
import pytest

import data
import recipes
from common import UserError

TONE = (0.3 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)

def rows_of(name, *arguments):
    """Return what a recipe finds: (rows, classes)."""
    recipe, parser = recipes.commands()[name], argparse.ArgumentParser()
    recipe.add_flags(parser)
    return recipe.rows(parser.parse_args(list(map(str, arguments))))

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
AbCdEfGhIj0, 0.000, 10.000, "/t/dd00088"
with_under_, 110.000, 120.000, "/m/09x0r"
-startsdash, 20.000, 30.000, "/m/09x0r"
millisecond, 12.500, 22.500, "/m/09x0r"
#NAME?, 1.000, 11.000, "/m/09x0r"
notdownload, 1.000, 11.000, "/m/09x0r"
emptyfile00, 1.000, 11.000, "/m/09x0r"
"""

def audioset(tmp_path, *tables):
    """Pack tmp_path/audio by tables, flags and files in turn."""
    classes = write(tmp_path / "classes.csv", CLASSES)
    return packed(tmp_path, "audioset", tmp_path / "audio", "--class_csv", classes, *tables)

def test_audioset_files_go_by_several_names(tmp_path, write_wav):
    for name in ("--PJHxphWEs.wav", "a/YaBcDeFgHiJ0.wav", "a/AbCdEfGhIj0.wav", "b/with_under__110.000.wav",
                 "b/Y-startsdash_20_30.wav", "b/millisecond_12500_22500.wav", "EVALUATION0_30.flac"):
        write_wav(f"audio/{name}", TONE)
    (tmp_path / "audio/emptyfile00.wav").touch()
    train = write(tmp_path / "balanced_train_segments.csv", SEGMENTS)
    test = write(tmp_path / "eval.csv", '# a\nEVALUATION0, 30.000, 40.000, "/t/dd00088,/m/05zppz"\n')
    pack, clips = audioset(tmp_path, "--train", train, "--test", test)
    assert pack.classes == ["Speech", "Male speech, man speaking", "Gargling"]      # by index
    assert clips == [
        ("train", "--PJHxphWEs", "Speech", "Gargling"),
        ("train", "aBcDeFgHiJ0", "Male speech, man speaking"), ("train", "AbCdEfGhIj0", "Gargling"),
        ("train", "with_under_", "Speech"), ("train", "-startsdash", "Speech"),
        ("train", "millisecond", "Speech"), ("test", "EVALUATION0", "Gargling", "Male speech, man speaking")]
    spreadsheet, missing, empty = [reason for _, reason in pack.skipped()]
    assert "line 8: #NAME? is no YouTube id" in spreadsheet
    assert "no file for notdownload below" in missing
    assert "emptyfile00.wav: cannot be read" in empty

def test_audioset_as_ast_lists_it(tmp_path, write_wav):
    write_wav("audio/Yabc.wav", TONE)
    items = [{"wav": "/somewhere/else/Yabc.wav", "labels": "/m/09x0r,/t/dd00088", "video_id": "x"},
             {"wav": "/gone/b.wav", "labels": "/m/09x0r"}]
    listing = write(tmp_path / "train.json", "# a comment, as AST has it\n" + json.dumps({"data": items}))
    pack, clips = audioset(tmp_path, "--train", listing)
    assert clips == [("train", "Yabc", "Speech", "Gargling")]
    assert "no file for b" in pack.skipped()[0][1]

def test_one_recording_in_two_audioset_tables_is_refused(tmp_path, write_wav):
    write_wav("audio/abcdefghijk.wav", TONE)
    table = write(tmp_path / "t.csv", 'abcdefghijk, 30.000, 40.000, "/m/09x0r"\n')
    with pytest.raises(UserError, match="line 1: abcdefghijk stands in .*t.csv, line 1 already"):
        audioset(tmp_path, "--train", table, "--test", table)
    write_wav("audio/other/abcdefghijk.flac", TONE)
    with pytest.raises(UserError, match="have one name"):
        audioset(tmp_path, "--train", table)

def test_bad_audioset_tables(tmp_path, write_wav):
    write_wav("audio/a.wav", TONE)
    for line, message in (('x, 30.000, 20.000, "/m/09x0r"', "line 1: a clip cannot go from 30.0 s to 20.0 s"),
                          ('x, 30.000, 40.000, "/m/nobody"', "line 1: label '/m/nobody' is not in"),
                          ("path,label", "line 1: wants YTID")):
        with pytest.raises(UserError, match=message):
            audioset(tmp_path, "--train", write(tmp_path / "t.csv", line + "\n"))

def test_class_lists_are_checked(tmp_path, write_wav):
    write_wav("a.wav", TONE)
    meta = write(tmp_path / "meta.csv", "path,label\na.wav,dog\n")
    names = write(tmp_path / "names.txt", "cat\ndog\n")
    assert packed(tmp_path, "csv", meta, "--classes", names)[0].classes == ["cat", "dog"]
    for text, message in (("cat\n", "line 2: label 'dog' is not in"), ("cat\ncat\n", "each once"),
                          ("index,mid,display_name\n1,/m/1,dog\n", "does not count")):
        with pytest.raises(UserError, match=message):
            rows_of("csv", meta, "--classes", write(names, text))

def test_esc50(tmp_path, write_wav):
    text = "filename,fold,target,category,esc10,src_file,take\n"
    for name, category in (("1-32-A-0", "dog"), ("1-38-A-14", "chirping_birds"), ("5-9-B-0", "dog")):
        write_wav(f"ESC-50-master/audio/{name}.wav", TONE)
        fold, recording, take, target = name.split("-")
        text += f"{name}.wav,{fold},{target},{category},True,{recording},{take}\n"
    table = write(tmp_path / "ESC-50-master/meta/esc50.csv", text)
    pack, clips = packed(tmp_path, "esc50", tmp_path)
    assert pack.classes == ["dog", "chirping_birds"]                    # by target, not by alphabet
    assert clips == [("1", "32", "dog"), ("1", "38", "chirping_birds"), ("5", "9", "dog")]
    write(table, "path,label\n")
    with pytest.raises(UserError, match="line 1: not ESC-50's table"):
        rows_of("esc50", tmp_path)

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
        rows_of("speechcommands", tmp_path / "sc")

def test_speech_commands_of_superb(tmp_path, write_wav):
    def percent(speaker):           # the function that the data set was published with, written once more
        return int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 134217728 * (100.0 / 134217727)
    names = sorted((f"{i:08x}" for i in range(99)), key=percent)
    valid, nobody, train = (next(name for name in names if percent(name) >= low) for low in (0, 10, 20))
    for name in (valid, nobody, train):
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
    for split, name in (("train", train), ("valid", valid)):
        wanted += [(split, name, "yes"), (split, name, "_unknown_"), *2 * [(split, "tap", "_silence_")]]
    assert sorted(clips) == sorted(wanted)
    assert (pack.samples == 16000).all()                                # also of the silence
    for label in ("_silence_", "_unknown_"):                            # a test archive that is not whole
        (tmp_path / f"test/{label}/x_nohash_0.wav").unlink()
        with pytest.raises(UserError, match=f"test/{label}: no wav files"):
            rows_of(*command)
    with pytest.raises(UserError, match="--test_root None.*archive of its own"):
        rows_of(*command[:4])

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
    assert not pack.skipped()
    assert [label for _, _, label in clips] == 5 * ["neu", "hap", "hap", "ang", "sad"]
    assert clips[4:7] == [("1", "Ses01F", "sad"), ("2", "Ses02F", "neu"), ("2", "Ses02M", "hap")]
    assert len(rows_of("iemocap", root)[0]) == 25                       # with or without the extra level
    shutil.rmtree(root / "Session5")
    for where, session in ((root, "Session5"), (tmp_path / "nowhere", "Session1")):
        with pytest.raises(UserError, match=f"{session}.*all needed"):
            rows_of("iemocap", where)
