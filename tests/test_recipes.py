"""Known data sets: miniature trees of the exact layout on disk, with its traps."""
import json
import shutil

import numpy as np
import pytest

import data
import recipes
from common import UserError
from data import Pack

TONE = (0.3 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)

def packed(tmp_path, *arguments):
    data.main([*map(str, arguments), "--out", str(tmp_path / "pack")])
    pack = Pack(tmp_path / "pack")
    labels, split, group = pack.table()
    return pack, [[pack.classes[c] for c in row] for row in labels], split.tolist(), group.tolist()

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

# ---- AudioSet

CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00088,"Gargling"\n'
SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
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

def test_audioset(tmp_path, write_wav):
    for name in ("--PJHxphWEs", "a/YaBcDeFgHiJ0", "a/AbCdEfGhIj0", "b/with_under__110.000", "b/Y-startsdash_20_30",
                 "b/millisecond_12500_22500"):
        write_wav(f"audio/{name}.wav", TONE)
    write_wav("audio/EVALUATION0_30.flac", TONE)
    (tmp_path / "audio/emptyfile00.wav").touch()
    train, classes = write(tmp_path / "balanced_train_segments.csv", SEGMENTS), write(tmp_path / "class_labels_indices.csv", CLASSES)
    test = write(tmp_path / "eval_segments.csv", '# a\n# b\n# c\nEVALUATION0, 30.000, 40.000, "/t/dd00088,/m/05zppz"\n')
    pack, labels, split, group = packed(tmp_path, "audioset", tmp_path / "audio", "--train", train, "--test", test,
                                        "--class_csv", classes)
    assert pack.classes == ["Speech", "Male speech, man speaking", "Gargling"]                       # by index, never by alphabet
    assert labels == [["Speech", "Gargling"], ["Male speech, man speaking"], ["Gargling"], ["Speech"], ["Speech"], ["Speech"],
                      ["Gargling", "Male speech, man speaking"]]
    assert split == ["train"] * 6 + ["test"] and group[1:3] == ["aBcDeFgHiJ0", "AbCdEfGhIj0"]         # ids differ by case alone
    reasons = [reason for _, reason in pack.skipped()]
    assert len(reasons) == 3 and "line 10: #NAME? is no YouTube id" in reasons[0] and "no file for notdownload below" in reasons[1]
    assert "emptyfile00.wav: cannot be read" in reasons[2]

def test_audioset_as_ast_lists_it(tmp_path, write_wav):
    write_wav("audio/Yabc.wav", TONE)
    listing = write(tmp_path / "train.json", "# a comment, as in AST's samples\n" + json.dumps(
        {"data": [{"wav": "/somewhere/else/Yabc.wav", "labels": "/m/09x0r,/t/dd00088", "video_id": "x"},
                  {"wav": "/gone/b.wav", "labels": "/m/09x0r"}]}))
    classes = write(tmp_path / "classes.csv", CLASSES)
    pack, labels, split, _ = packed(tmp_path, "audioset", tmp_path / "audio", "--train", listing, "--class_csv", classes)
    assert labels == [["Speech", "Gargling"]] and split == ["train"] and "no file for b" in pack.skipped()[0][1]

def test_one_recording_in_two_audioset_tables_is_refused(tmp_path, write_wav):
    write_wav("audio/abcdefghijk.wav", TONE)
    table, classes = write(tmp_path / "t.csv", 'abcdefghijk, 30.000, 40.000, "/m/09x0r"\n'), write(tmp_path / "classes.csv", CLASSES)
    with pytest.raises(UserError, match="line 1: abcdefghijk stands in .*t.csv already"):
        packed(tmp_path, "audioset", tmp_path / "audio", "--train", table, "--test", table, "--class_csv", classes)
    write_wav("audio/other/Yabcdefghijk.flac", TONE)
    write_wav("audio/Yabcdefghijk.wav", TONE)
    (tmp_path / "audio/abcdefghijk.wav").unlink()
    with pytest.raises(UserError, match="have one name"):
        packed(tmp_path, "audioset", tmp_path / "audio", "--train", table, "--class_csv", classes)

@pytest.mark.parametrize("row, message", [('abcdefghijk, 30.000, 20.000, "/m/09x0r"', "line 1: a clip cannot go from 30.0 s to 20.0 s"),
    ('abcdefghijk, 30.000, 40.000, "/m/nobody"', "line 1: label '/m/nobody' is not in"), ("path,label", "line 1: wants YTID")])
def test_bad_audioset_tables(tmp_path, write_wav, row, message):
    write_wav("audio/a.wav", TONE)
    table, classes = write(tmp_path / "t.csv", row + "\n"), write(tmp_path / "classes.csv", CLASSES)
    with pytest.raises(UserError, match=message):
        packed(tmp_path, "audioset", tmp_path / "audio", "--train", table, "--class_csv", classes)

def test_class_lists_are_checked(tmp_path, write_wav):
    write_wav("a.wav", TONE)
    meta = write(tmp_path / "meta.csv", "path,label\na.wav,dog\n")
    names = write(tmp_path / "names.txt", "cat\ndog\n")
    assert packed(tmp_path, "csv", meta, "--classes", names)[0].classes == ["cat", "dog"]
    for text, message in (("cat\n", "line 2: label 'dog' is not in"), ("cat\ncat\n", "each once"),
                          ("index,mid,display_name\n1,/m/1,dog\n", "does not count")):
        with pytest.raises(UserError, match=message):
            data.main(["csv", str(meta), "--classes", str(write(names, text)), "--out", str(tmp_path / "other")])

# ---- ESC-50

def test_esc50(tmp_path, write_wav):
    names = ["1-100032-A-0.wav", "1-100038-A-14.wav", "5-9032-A-0.wav"]
    for name in names:
        write_wav(f"ESC-50-master/audio/{name}", np.tile(TONE, 5))
    write(tmp_path / "ESC-50-master/meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take\n" + "".join(
        f"{n},{n[0]},{n[:-4].split('-')[3]},{'dog' if n.endswith('-0.wav') else 'chirping_birds'},{'True'},{n.split('-')[1]},A\n"
        for n in names))
    pack, labels, split, group = packed(tmp_path, "esc50", tmp_path)
    assert pack.classes == ["dog", "chirping_birds"] and split == ["1", "1", "5"]                    # by target, not by alphabet
    assert labels == [["dog"], ["chirping_birds"], ["dog"]] and group == ["100032", "100038", "9032"]

# ---- Speech Commands

def test_speech_commands_of_35_words(tmp_path, write_wav):
    for name in ("right/a69b9b3e_nohash_0", "right/0a7c2a8d_nohash_0", "left/a69b9b3e_nohash_1", "_background_noise_/white_noise"):
        write_wav(f"sc/{name}.wav", TONE[:12000])
    write(tmp_path / "sc/validation_list.txt", "right/a69b9b3e_nohash_0.wav\nright/missing0_nohash_0.wav\n")
    write(tmp_path / "sc/testing_list.txt", "left/a69b9b3e_nohash_1.wav\n")
    pack, labels, split, group = packed(tmp_path, "speechcommands", tmp_path / "sc")
    assert pack.classes == ["left", "right"] and list(zip(labels, split, group)) == [
        (["left"], "test", "a69b9b3e"), (["right"], "train", "0a7c2a8d"), (["right"], "valid", "a69b9b3e")]
    assert (pack.samples == 12000).all()                        # short clips keep their length
    assert [path for path, _ in pack.skipped()] == ["right/missing0_nohash_0.wav"]
    (tmp_path / "sc/testing_list.txt").unlink()
    with pytest.raises(UserError, match="testing_list.txt: no such file"):
        recipes.from_speechcommands(tmp_path / "sc")

def test_speech_commands_of_superb(tmp_path, write_wav):
    # the function that the data set was published with, written once more
    import hashlib
    percent = lambda who: int(hashlib.sha1(who.encode()).hexdigest(), 16) % 134217728 * (100.0 / 134217727)
    speakers = {part: next(w for w in (f"{i:08x}" for i in range(999)) if low <= percent(w) < high)
                for part, low, high in (("valid", 0, 10), ("nobody", 10, 20), ("train", 20, 100))}
    for who in speakers.values():
        write_wav(f"sc/yes/{who}_nohash_0.wav", TONE)
        write_wav(f"sc/bed/{who}_nohash_3.wav", TONE)
    write_wav("sc/_background_noise_/running_tap.wav", np.tile(TONE, 3))
    for name in ("yes/x_nohash_0", "_unknown_/y_nohash_0", "_silence_/z"):
        write_wav(f"test/{name}.wav", TONE)
    for part in ("_silence_", "_unknown_"):                     # a test archive that is not whole
        (tmp_path / "test" / part).rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"test/{part}: no wav files"):
            recipes.from_speechcommands(tmp_path / "sc", 1, tmp_path / "test")
        (tmp_path / "away").rename(tmp_path / "test" / part)
    pack, labels, split, group = packed(tmp_path, "speechcommands", tmp_path / "sc", "--version", 1, "--test_root", tmp_path / "test")
    assert pack.classes == "yes no up down left right on off stop go _unknown_ _silence_".split()
    for part in ("train", "valid"):
        mine = [(row[0], who) for row, s, who in zip(labels, split, group) if s == part]
        assert sorted(mine) == sorted([("yes", speakers[part]), ("_unknown_", speakers[part])] + 3 * [("_silence_", "running_tap")])
    assert [row[0] for row, s in zip(labels, split) if s == "test"] == ["yes", "_unknown_", "_silence_"]
    assert speakers["nobody"] not in group and (pack.samples == 16000).all()
    with pytest.raises(UserError, match="--test_root None.*archive of its own"):
        data.main(["speechcommands", str(tmp_path / "sc"), "--version", "1", "--out", str(tmp_path / "x")])

# ---- IEMOCAP

def test_iemocap(tmp_path, write_wav):
    root = tmp_path / "IEMOCAP_full_release"
    line = "[6.2901 - 8.2357]\t{}\t{}\t[2.5000, 2.5000, 2.5000]\n"
    for n in range(1, 6):
        dialog = f"Ses0{n}F_impro01"
        codes = ["neu", "hap", "exc", "ang", "sad", "fru", "xxx"]
        names = [f"{dialog}_{'FM'[i % 2]}{i:03d}" for i in range(7)]
        folder = root / f"Session{n}/dialog/EmoEvaluation"
        write(folder / f"{dialog}.txt", "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n" + "".join(
            line.format(name, code) + "C-E2:\tNeutral;\t()\n" for name, code in zip(names, codes)))
        write(folder / f"._{dialog}.txt", line.format("Ses01F_mac", "neu"))
        write(folder / f"Categorical/{dialog}_e1_cat.txt", line.format("Ses01F_other", "neu"))
        for name in names:
            write_wav(f"IEMOCAP_full_release/Session{n}/sentences/wav/{dialog}/{name}.wav", TONE)
    for where in (tmp_path, root):                                  # with or without the extra level
        rows, classes = recipes.from_iemocap(where)
        assert classes == ["neu", "hap", "ang", "sad"] and len(rows) == 25
        assert [row["labels"][0] for row in rows[:5]] == ["neu", "hap", "hap", "ang", "sad"]
    pack, labels, split, group = packed(tmp_path, "iemocap", tmp_path)
    assert split == [str(n) for n in range(1, 6) for _ in range(5)] and group[:2] == ["Ses01F", "Ses01M"] and not pack.skipped()
    shutil.rmtree(root / "Session5")
    with pytest.raises(UserError, match="Session5.*all five"):
        recipes.from_iemocap(tmp_path)
    with pytest.raises(UserError, match="no Session1"):
        recipes.from_iemocap(tmp_path / "nowhere")
