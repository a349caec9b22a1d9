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
from recipes.tables import read_classes

TONE = (0.3 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)

def packed(tmp_path, *arguments):
    """Return the pack that a command makes, and (split, group, *labels) of each clip."""
    data.main([*map(str, arguments), "--out", str(tmp_path / "pack")])
    pack = data.Pack(tmp_path / "pack")
    rows = pack.rows()
    clips = [rows[i] for i in pack.index["row"]]
    return pack, [(row["split"], row["group"], *row["labels"].split(";")) for row in clips]

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

def test_audioset_with_tables_for_validation(tmp_path, write_wav):
    for name in ("abcdefghijk", "ABCDEFGHIJK"):
        write_wav(f"audio/{name}.wav", TONE)
    tables = [write(tmp_path / f"{name}.csv", f'{name}, 0.000, 10.000, "/m/09x0r"\n')
              for name in ("abcdefghijk", "ABCDEFGHIJK")]
    _, clips = audioset(tmp_path, "--train", tables[0], "--valid", tables[1])
    assert clips == [("train", "abcdefghijk", "Speech"), ("valid", "ABCDEFGHIJK", "Speech")]
    with pytest.raises(UserError, match="abcdefghijk stands in"):
        audioset(tmp_path, "--train", tables[0], "--valid", tables[0])

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

def test_speech_commands_of_30_words_are_split_by_their_lists(tmp_path, write_wav):
    for name in ("sheila/0a7c_nohash_0", "bed/a69b_nohash_0", "bed/c0de_nohash_1", "_background_noise_/x"):
        write_wav(f"sc/{name}.wav", TONE)
    write(tmp_path / "sc/validation_list.txt", "bed/a69b_nohash_0.wav\n")
    write(tmp_path / "sc/testing_list.txt", "bed/c0de_nohash_1.wav\n")
    pack, clips = packed(tmp_path, "speechcommands", tmp_path / "sc", "--version", 1, "--words", 30)
    assert pack.classes == ["bed", "sheila"]
    assert clips == [("valid", "a69b", "bed"), ("test", "c0de", "bed"), ("train", "0a7c", "sheila")]

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
    for flags, message in ((command, "test/_silence_: no"), (command[:4], "needs a --test_root")):
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

def unpack(tmp_path, write_wav, files, sound=TONE):
    """Make the files of a data set; those without a text are sounds."""
    for path, text in files.items():
        write(tmp_path / path, text) if text else write_wav(path, sound)

# name: ({file: its text}, what the pack has of it: path, split, group, labels; classes)
VIS, NO_SOUND = "vocal_imitations/included/", "version https://git-lfs.github.com/spec/v1"
ARCHIVES = {
    "fsd50k": ({
        "FSD50K.ground_truth/vocabulary.csv": "0,Bark,/m/05tny_\n1,Animal,/m/0jbk\n2,Run,/m/06h7j\n",
        "FSD50K.ground_truth/dev.csv": "fname,labels,mids,split\n"
                                       '64760,"Bark,Animal","/m/05tny_,/m/0jbk",train\n'
                                       "16399,Run,/m/06h7j,val\n",
        "FSD50K.ground_truth/eval.csv": 'fname,labels,mids\n37199,"Animal,Run","/m/0jbk,/m/06h7j"\n',
        "FSD50K.dev_audio/64760.wav": "", "FSD50K.dev_audio/16399.wav": "", "FSD50K.eval_audio/37199.wav": ""
    }, """
        FSD50K.dev_audio/64760.wav, train, , Bark;Animal
        FSD50K.dev_audio/16399.wav, valid, , Run
        FSD50K.eval_audio/37199.wav, test, , Animal;Run
    """, "Bark Animal Run"),
    "vocalimitation": ({
        VIS + "010Animal_ cock-a-doodle-doo-5192.wav": "", VIS + "000Animal_Cat_Growling-4808.wav": "",
        VIS + "000Animal_Cat_Growling-4815.wav": "", "vocal_imitations/excluded/000Animal_Cat_Hiss-1.wav": "",
        "vocal_imitations.txt": "\timitation_id\timitation_filename\tincluded\tparticipant_id\tdescription\n"
                                '0\t7\t010Animal_ cock-a-doodle-doo-5192.wav\tTrue\t573.0\t"Cock" he said\n'
                                "1\t8\t000Animal_Cat_Growling-4808.wav\tTrue\t573.0\tan \"atv\n"
                                "2\t9\t000Animal_Cat_Growling-4815.wav\tTrue\t487.0\t\n"
    }, f"""
        {VIS}000Animal_Cat_Growling-4808.wav, 1, 573.0, 000Animal_Cat_Growling
        {VIS}000Animal_Cat_Growling-4815.wav, 1, 487.0, 000Animal_Cat_Growling
        {VIS}010Animal_ cock-a-doodle-doo-5192.wav, 1, 573.0, 010Animal_ cock-a-doodle-doo
    """, None),
    "fsdkaggle2018": ({
        "FSDKaggle2018.meta/train_post_competition.csv":
            "fname,label,manually_verified,freesound_id,license\n00044347.wav,Hi-hat,0,28739,CC0\n",
        "FSDKaggle2018.meta/test_post_competition_scoring_clips.csv":
            "fname,label,usage,freesound_id,license\n00326aa9.wav,Oboe,Private,355125,Attribution\n",
        "FSDKaggle2018.audio_train/00044347.wav": "", "FSDKaggle2018.audio_test/00326aa9.wav": ""
    }, """
        FSDKaggle2018.audio_train/00044347.wav, train, , Hi-hat
        FSDKaggle2018.audio_test/00326aa9.wav, test, , Oboe
    """, None),
    "urbansound8k": ({
        "UrbanSound8K/metadata/UrbanSound8K.csv":
            "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
            "100032-3-0-0.wav,100032,0.0,0.317551,1,10,3,dog_bark\n"
            "100263-2-0-117.wav,100263,58.5,62.5,1,5,2,street_music\n",
        "UrbanSound8K/audio/fold10/100032-3-0-0.wav": "", "UrbanSound8K/audio/fold5/100263-2-0-117.wav": ""
    }, """
        audio/fold10/100032-3-0-0.wav, 10, 100032, dog_bark
        audio/fold5/100263-2-0-117.wav, 5, 100263, street_music
    """, "street_music dog_bark"),
    "nsynth": ({
        "nsynth-train/audio/synth_lead_synthetic_000-060-100.wav": "", "nsynth-train/examples.json": "{}",
        "nsynth-valid/audio/bass_electronic_018-022-100.wav": "",
        "nsynth-test/audio/vocal_acoustic_000-050-127.wav": ""
    }, """
        nsynth-train/audio/synth_lead_synthetic_000-060-100.wav, train, synth_lead_synthetic_000, synth_lead
        nsynth-valid/audio/bass_electronic_018-022-100.wav, valid, bass_electronic_018, bass
        nsynth-test/audio/vocal_acoustic_000-050-127.wav, test, vocal_acoustic_000, vocal
    """, "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal"),
    "gtzan": ({
        "genres/blues/blues.00000.au": "", "genres/blues/blues.00099.wav": "",
        "genres/bextract_single.mf": "x", "genres/jazz/jazz.00054.wav": NO_SOUND,
        "genres/jazz/jazz.00010.wav": ""
    }, """
        blues/blues.00000.au, 0, , blues
        blues/blues.00099.wav, 9, , blues
        jazz/jazz.00010.wav, 0, , jazz
    """, "blues jazz"),
    "fma": ({
        "fma_metadata/tracks.csv": ",album,artist,artist,set,set,track\n,id,bio,id,split,subset,genre_top\n"
                                   'track_id,,,,,,\n2,1,"<p>One\n""A""</p>",7,training,small,Hip-Hop\n'
                                   "3,1,,7,training,medium,Rock\n140,61,,54,validation,small,Folk\n"
                                   "098565,62,,55,test,small,Pop\n154303,63,,56,test,small,Pop\n",
        "fma_small/000/000002.mp3": "", "fma_small/000/000003.mp3": "", "fma_small/000/000140.mp3": "",
        "fma_small/098/098565.mp3": NO_SOUND, "fma_small/154/154303.mp3": ""
    }, """
        fma_small/000/000002.mp3, train, 7, Hip-Hop
        fma_small/000/000140.mp3, valid, 54, Folk
        fma_small/154/154303.mp3, test, 56, Pop
    """, "Folk Hip-Hop Pop"),
    "libricount": ({
        "test/10_1234.wav": "", "test/1_42.wav": "", "test/1_42.json": "[]", "test/0_7.wav": ""
    }, """
        test/0_7.wav, 2, , 0
        test/10_1234.wav, 2, , 10
        test/1_42.wav, 4, , 1
    """, "0 1 2 3 4 5 6 7 8 9 10"),
    "cremad": ({
        "CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav": "", "CREMA-D/AudioWAV/1002_IEO_NEU_XX.wav": "",
        "CREMA-D/AudioWAV/1040_ITH_SAD_X.wav": "", "CREMA-D/AudioWAV/1091_WSI_HAP_XX.wav": NO_SOUND
    }, """
        AudioWAV/1001_DFA_ANG_XX.wav, test, 1001, ANG
        AudioWAV/1002_IEO_NEU_XX.wav, valid, 1002, NEU
        AudioWAV/1040_ITH_SAD_X.wav, train, 1040, SAD
    """, "ANG DIS FEA HAP NEU SAD"),
    "ravdess": ({
        "Actor_01/03-01-01-01-01-01-01.wav": "", "Actor_06/03-01-08-02-02-02-06.wav": "",
        "Actor_24/03-01-06-01-02-01-24.wav": "", "Actor_24/03-02-06-01-02-01-24.wav": ""
    }, """
        Actor_01/03-01-01-01-01-01-01.wav, 0, Actor_01, neutral
        Actor_06/03-01-08-02-02-02-06.wav, 0, Actor_06, surprised
        Actor_24/03-01-06-01-02-01-24.wav, 3, Actor_24, fearful
    """, "neutral calm happy sad angry fearful disgust surprised"),
    "fluentspeechcommands": ({
        **{f"fluent_speech_commands_dataset/data/{split}_data.csv":
           f",path,speakerId,transcription,action,object,location\n{line}\n"
           for split, line in (("train", '0,wavs/a/1.wav,a,"Too loud, stop",decrease,volume,none'),
                               ("valid", "0,wavs/b/2.wav,b,Louder,increase,volume,none"),
                               ("test", "0,wavs/c/3.wav,c,Louder,increase,volume,none"))},
        **{f"fluent_speech_commands_dataset/wavs/{name}.wav": "" for name in ("a/1", "b/2", "c/3")}
    }, """
        wavs/a/1.wav, train, a, Too loud, stop
        wavs/b/2.wav, valid, b, Louder
        wavs/c/3.wav, test, c, Louder
    """, None),
    "librispeechmalefemale": ({
        "LibriSpeech/SPEAKERS.TXT": ";ID  |SEX| SUBSET           |MINUTES| NAME\n"
                                    "14   | F | train-clean-360  | 25.03 | Kristin LeMoine\n"
                                    "60   | M | train-clean-100  | 20.18 | |CBW|Simon\n"
                                    "84   | F | dev-clean        | 8.02  | Christie\n"
                                    "61   | M | test-clean       | 8.08  | Paul\n",
        "LibriSpeech/train-clean-100/60/121082/60-121082-0000.flac": "",
        "LibriSpeech/dev-clean/84/121123/84-121123-0000.flac": "",
        "LibriSpeech/dev-clean/84/121123/84-121123.trans.txt": "84-121123-0000 GO",
        "LibriSpeech/test-clean/61/70968/61-70968-0000.flac": ""
    }, """
        train-clean-100/60/121082/60-121082-0000.flac, train, 60, M
        dev-clean/84/121123/84-121123-0000.flac, valid, 84, F
        test-clean/61/70968/61-70968-0000.flac, test, 61, M
    """, "M F"),
    "vocalsound": ({
        "meta/tr_meta.csv": "f0003,female,28,USA,English,no\n",
        "meta/val_meta.csv": "m0006,male,30,India,Hindi,no\n",
        "meta/te_meta.csv": "m0010,male,60,USA,English,\"cold, cough\"\n", "audio_16k/f0003_0_cough.wav": "",
        "audio_16k/f0003_1_throatclearing.wav": "", "audio_16k/m0006_0_sniff.wav": "",
        "audio_16k/m0010_0_laughter.wav": ""
    }, """
        audio_16k/f0003_0_cough.wav, train, f0003, cough
        audio_16k/f0003_1_throatclearing.wav, train, f0003, throatclearing
        audio_16k/m0006_0_sniff.wav, valid, m0006, sniff
        audio_16k/m0010_0_laughter.wav, test, m0010, laughter
    """, "laughter sigh throatclearing cough sneeze sniff")
}

@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_as_they_unpack(tmp_path, write_wav, name):
    files, expected, classes = ARCHIVES[name]
    unpack(tmp_path, write_wav, files)
    for file in [*tmp_path.rglob("*.wav"), *tmp_path.rglob("*.flac")]:
        write(file.with_name(f"._{file.name}"), "what Macs leave")
    pack, _ = packed(tmp_path, name, tmp_path)
    skipped = dict(pack.skipped())
    lines = ["{path}, {split}, {group}, {labels}".format(**row) for row in pack.rows()
             if row["path"] not in skipped]
    assert lines == [line.strip() for line in expected.strip().splitlines()]
    assert classes is None or pack.classes == classes.split()
    assert len(skipped) == sum(text == NO_SOUND for text in files.values())

def test_intents_of_fluent_speech_commands(tmp_path, write_wav):
    unpack(tmp_path, write_wav, ARCHIVES["fluentspeechcommands"][0])
    pack, _ = packed(tmp_path, "fluentspeechcommands", tmp_path, "--label", "intent")
    assert pack.classes == ["decrease volume none", "increase volume none"]

def test_librispeech_is_cut_into_pieces_of_5_s(tmp_path, write_wav):
    unpack(tmp_path, write_wav, ARCHIVES["librispeechmalefemale"][0], np.tile(TONE, 12))
    pack, _ = packed(tmp_path, "librispeechmalefemale", tmp_path)
    assert pack.samples.tolist() == 3 * [80000, 80000, 32000]

def test_voxlingua_33_has_the_languages_of_dev_and_as_many_recordings_as_wanted(tmp_path, write_wav):
    languages = ("ar az da de el en es et fa fi fr hr hu hy is it ja "
                 "lt lv mk nl nn no pl pt ru sl sr sv tr uk ur zh").split()
    for folder in [*languages, "aa"]:
        for name in ("aaaaaaaaaaa__U__S0---0000.2-0007.1", "bbbbbbbbbbb__U__S1---0101.2-0108.0"):
            write_wav(f"{folder}/{name}.wav", TONE)
        write_wav(f"dev/{folder}/ccccccccccc__U__S3---0101.220-0108.010.wav", TONE)
    pack, clips = packed(tmp_path, "voxlingua33", tmp_path, "--most", 1)
    assert pack.classes == languages
    assert clips[:2] == [("train", "aaaaaaaaaaa", "ar"), ("test", "ccccccccccc", "ar")]
    assert len(clips) == 66
    shutil.rmtree(tmp_path / "pack")
    assert len(packed(tmp_path, "voxlingua33", tmp_path)[1]) == 99

def test_a_folder_that_is_something_else_is_refused_in_one_line(tmp_path, write_wav):
    write_wav("other/a.wav", TONE)
    for name in set(recipes.commands()) - {"folder", "csv", "toy", "audioset"}:
        with pytest.raises(UserError, match=rf"^{tmp_path}[^\n]*[Nn]o [^\n]*\Z"):
            packed(tmp_path, name, tmp_path)

# ---- tables as people have them

def table(tmp_path, write_wav, text, *flags, encoding="utf-8"):
    """Return the pack of a table about a.wav and b.wav, and the labels of each recording."""
    for name in "ab":
        write_wav(f"{name}.wav", TONE)
    (tmp_path / "meta.csv").write_bytes(text.encode(encoding))
    shutil.rmtree(tmp_path / "pack", ignore_errors=True)
    pack, _ = packed(tmp_path, "csv", tmp_path / "meta.csv", *flags)
    return pack, [row["labels"] for row in pack.rows()]

@pytest.mark.parametrize("cell, labels", [
    ("\"['x', 'y']\"", "x;y"), ('"[""x"", ""y""]"', "x;y"), ("['x']", "x"), ("[]", ""),
    ("\"('x', 'y')\"", "x;y"), ('"[""it\'s"", \'a, b\']"', "it's;a, b"), ('"[1, 2]"', "1;2"), ("x|y", "x;y"),
    ("x; y", "x;y"), ('"x, y"', "x;y"), ("x;;y;", "x;y"), ("x;x", "x"), ("(noise)", "(noise)"), (" x ", "x"),
    ("x y", "x y")])
def test_a_cell_of_labels_is_read_as_it_is_meant(tmp_path, write_wav, cell, labels):
    assert table(tmp_path, write_wav, f"path,label\na.wav,{cell}\nb.wav,z\n")[1] == [labels, "z"]

@pytest.mark.parametrize("cell", ["\"['x' 'y']\"", "[x]", "\"[x, y]\"", "\"['x', ['y']]\"", "\"['x', None]\"",
                                  "[1 2]", "\"['x', 'y'\"", "\"{'x', 'y'}\"", '"{""x"": 1}"'])
def test_a_list_that_is_none_of_names_is_refused_with_its_line(tmp_path, write_wav, cell):
    with pytest.raises(UserError, match=r"meta.csv, line 3: .* begins like a list, but is none of names, as"):
        table(tmp_path, write_wav, f"path,label\na.wav,z\nb.wav,{cell}\n")

def test_names_with_commas_are_whole_beside_semicolons_and_in_a_class_list(tmp_path, write_wav):
    speech = "Male speech, man speaking"
    text = f'path,label\na.wav,"{speech}"\nb.wav,'
    assert table(tmp_path, write_wav, f'{text}"Dog;{speech}"\n')[1] == [speech, f"Dog;{speech}"]
    classes = write(tmp_path / "classes.txt", f"Dog\n{speech}\n")
    assert table(tmp_path, write_wav, f"{text}Dog\n", "--classes", classes)[1] == [speech, "Dog"]

@pytest.mark.parametrize("text, encoding", [
    ("path,label\na.wav,café\nb.wav,y\n", "utf-8-sig"), ("path,label\na.wav,café\nb.wav,y\n", "utf-16"),
    ("path,label\na.wav,café\nb.wav,y\n", "latin-1"),
    ("path\tlabel\r\na.wav\tcafé\r\nb.wav\ty\r\n", "utf-8"),
    ("path;label\na.wav;café\nb.wav;y", "utf-8"), ("path|label\na.wav|café\nb.wav|y", "utf-8"),
    ("\r\npath,label\r\n\r\na.wav,café\r\n  \r\n,\r\nb.wav,y\r\n\r\n", "utf-8"),
    (" Path , LABEL \n a.wav , café \n b.wav , y \n", "utf-8"),
    ("path,label\ra.wav,café\rb.wav,y\r", "utf-8"), ("path,label,,\na.wav,café,,\nb.wav,y,,\n", "utf-8"),
    ('"path","label"\n"a.wav","café"\n"b.wav","y"\n', "utf-8")])
def test_tables_of_all_programs_are_read_alike(tmp_path, write_wav, text, encoding):
    assert table(tmp_path, write_wav, text, encoding=encoding)[1] == ["café", "y"]

@pytest.mark.parametrize("text, message", [
    ("path,label,label\na.wav,x,y\n", "two columns are named label"),
    ("path,Label,label\na.wav,x,y\n", "two columns are named label"),
    ("path,label\na.wav,x,y\n", "line 2: more cells than the header has"),
    ("path,label\na.wav,['x', 'y']\n", "line 2: more cells than the header has"),
    ("path,label\n,x\n", "line 2: no path"), ("path,label\n", "no row to keep"), ("", "no column named path"),
    ("p\0a\0t\0h\0", "no text in UTF-8"), ('path,label\n"a.wav"x,y\n', "line 2: cannot be read as a table")])
def test_a_table_that_cannot_be_meant_is_refused_in_one_line(tmp_path, write_wav, text, message):
    with pytest.raises(UserError, match=rf"^{tmp_path}/meta.csv[^\n]*{message}[^\n]*$"):
        table(tmp_path, write_wav, text)

@pytest.mark.parametrize("written, name", [
    ("1.0", "1"), ("fold_02", "2"), ("Fold3", "3"), ("0", "0"), ("Training", "train"), ("TEST", "test"),
    ("Validation", "validation"), ("train-clean", "train-clean"), ("1.5", "1.5"), ("", "")])
def test_splits_and_folds_have_one_name_however_they_are_written(tmp_path, write_wav, written, name):
    pack, _ = table(tmp_path, write_wav, f"path,label,split\na.wav,x,{written}\n")
    assert pack.rows()[0]["split"] == name

def test_labels_that_may_be_none_and_classes_written_in_two_ways_are_said(tmp_path, write_wav, capsys):
    for name in "abc":
        write_wav(f"{name}.wav", TONE)
    text = "path,label\na.wav,nan\nb.wav,Dog\nc.wav,dog\n"
    pack, _ = packed(tmp_path, "csv", write(tmp_path / "meta.csv", text))
    assert pack.classes == ["Dog", "dog", "nan"]
    said = capsys.readouterr().out
    assert "a class is named nan; where that means no label, leave its cells empty" in said
    assert "Dog and dog are two classes" in said

def test_a_table_whose_files_lie_elsewhere_says_how_to_name_the_folder(tmp_path):
    table = write(tmp_path / "lists/meta.csv", "path,label\naudio/a.wav,x\n")
    with pytest.raises(UserError, match="meta.csv: none of its files is there, .*a.wav the first; --root"):
        packed(tmp_path, "csv", table)

def test_a_split_to_keep_that_no_row_has_is_named(tmp_path, write_wav):
    with pytest.raises(UserError, match="no row to keep; its splits are 1, 2"):
        table(tmp_path, write_wav, "path,fold\na.wav,1\nb.wav,2\n", "--keep", "3")

def test_times_in_another_file_are_said_and_can_be_ignored(tmp_path, write_wav, capsys):
    text = "path,start,end\na.wav,0.5,4.5\nb.wav,58.5,62.5\n"       # as UrbanSound8K's table has them
    pack, _ = table(tmp_path, write_wav, text)
    out = capsys.readouterr().out
    assert "1 end beyond the file (times in another file? see csv --no_times)" in out
    assert "1 left out" in out and "b.wav: no audio between 58.5 s and 62.5 s" in out
    pack, _ = table(tmp_path, write_wav, text, "--no_times")
    assert pack.samples.tolist() == [16000, 16000]
    assert pack.notes() == []
    pack, _ = table(tmp_path, write_wav, "path,start,end\na.wav,0,1.004\nb.wav,0.25,1.0\n")
    assert pack.notes() == []                                   # rounding

@pytest.mark.parametrize("text, names", [
    ("0,Bark,/m/05tny_\n1,Animal,/m/0jbk\n", ["Bark", "Animal"]),           # FSD50K's vocabulary.csv
    ("index,mid,display_name\n0,/m/05tny_,Bark\n1,/m/0jbk,Animal\n", ["Bark", "Animal"]),
    ("display_name,mid,index\nBark,/m/05tny_,0\nAnimal,/m/0jbk,1\n", ["Bark", "Animal"]),
    ("/m/05tny_,Bark\n/m/0jbk,Animal\n", ["Bark", "Animal"]), ("Bark,0\nAnimal,1\n", ["Bark", "Animal"]),
    ("0\tBark\n1\tAnimal, wild\n", ["Bark", "Animal, wild"]),
    ("id,name\n0,Bark\n1,Animal\n", ["Bark", "Animal"]),
    ("Bark\r\n\r\nAnimal\r\n", ["Bark", "Animal"]), ("\ufeffBark\nAnimal\n", ["Bark", "Animal"]),
    ("Bark, loud\nAnimal, wild\n", ["Bark, loud", "Animal, wild"]),
    ('"Bark, loud"\nAnimal\n', ["Bark, loud", "Animal"]),
    ("1\n0\n", ["1", "0"]), ('["Bark", "Animal"]\n', ["Bark", "Animal"]), ("0,Bark\n", ["Bark"])])
def test_a_class_list_has_names_alone_or_beside_numbers_and_mids(tmp_path, text, names):
    assert list(read_classes(write(tmp_path / "classes.csv", text)).values()) == names

def test_labels_may_be_mids_and_one_that_is_not_listed_is_shown_the_nearest(tmp_path, write_wav):
    classes = write(tmp_path / "vocabulary.csv", ARCHIVES["fsd50k"][0]["FSD50K.ground_truth/vocabulary.csv"])
    text = 'path,label\na.wav,"Bark,Animal"\nb.wav,/m/06h7j\n'
    pack, labels = table(tmp_path, write_wav, text, "--classes", classes)
    assert pack.classes == ["Bark", "Animal", "Run"]
    assert labels == ["Bark;Animal", "Run"]
    with pytest.raises(UserError, match=r"not in the class list: \['animals'\]; the nearest .* is 'Animal'$"):
        table(tmp_path, write_wav, "path,label\na.wav,animals\n", "--classes", classes)

# ---- folders that are no classes

FOLDERS = {
    "splits": ["fold1 fold2 fold10", "1 2 3", "train test", "Training Validation Testing", "train dev eval",
               "Fold_01 Fold_02"],
    "groups": ["Actor_01 Actor_24", "Session1 Session2", "speaker1 speaker2", "p225 p226"],
    "nothing": ["AudioWAV", "dog"]}

@pytest.mark.parametrize("kind, names", [(kind, names) for kind in FOLDERS for names in FOLDERS[kind]])
def test_folders_that_look_like_something_else_than_classes_are_asked_about(tmp_path, write_wav, kind, names):
    for name in names.split():
        write_wav(f"sounds/{name}/a.wav", TONE)
    asked = rf"^{tmp_path}/sounds: are folders named .*--folders {kind}, or [^\n]*$"
    with pytest.raises(UserError, match=asked):
        packed(tmp_path, "folder", tmp_path / "sounds")
    pack, _ = packed(tmp_path, "folder", tmp_path / "sounds", "--folders", kind)
    assert pack.classes == []
    shutil.rmtree(tmp_path / "pack")
    pack, _ = packed(tmp_path, "folder", tmp_path / "sounds", "--folders", "classes")
    assert pack.classes == sorted(names.split())

@pytest.mark.parametrize("names, recipe", [("fold1 fold2", "urbansound8k"), ("Actor_01 Actor_02", "ravdess"),
                                           ("AudioWAV", "cremad"),
                                           ("FSD50K.dev_audio FSD50K.eval_audio", "fsd50k")])
def test_a_data_set_with_a_recipe_is_named(tmp_path, write_wav, names, recipe):
    for name in names.split():
        write_wav(f"sounds/{name}/a.wav", TONE)
    with pytest.raises(UserError, match=f"python data.py {recipe} may know this data set"):
        packed(tmp_path, "folder", tmp_path / "sounds")
    assert recipe in recipes.commands()

def test_folders_may_be_splits_or_groups_of_classes(tmp_path, write_wav, capsys):
    for name in ("Training/dog", "Training/cat", "test/dog", "fold02/cat", "dev/cat"):
        write_wav(f"sounds/{name}/a.wav", TONE)
    pack, clips = packed(tmp_path, "folder", tmp_path / "sounds", "--folders", "splits")
    assert clips == [("train", "", "cat"), ("train", "", "dog"), ("dev", "", "cat"), ("2", "", "cat"),
                     ("test", "", "dog")]
    shutil.rmtree(tmp_path / "pack")
    _, clips = packed(tmp_path, "folder", tmp_path / "sounds", "--folders", "groups")
    assert clips[0] == ("", "Training", "cat")
    shutil.rmtree(tmp_path / "pack")
    pack, clips = packed(tmp_path, "folder", tmp_path / "sounds")
    assert "no labels, for not every file is one folder deep; see --folders" in capsys.readouterr().out
    assert pack.classes == []

def test_a_tree_of_a_known_data_set_is_named(tmp_path, write_wav, capsys):
    for name in ("audio/fold1/a", "audio/fold2/b"):
        write_wav(f"UrbanSound8K/{name}.wav", TONE)
    packed(tmp_path, "folder", tmp_path / "UrbanSound8K")
    assert "python data.py urbansound8k may know this data set" in capsys.readouterr().out

# ---- archives that are wrong or incomplete

TRACKS = ",set,set,track,artist\n,split,subset,genre_top,id\n,,,,\n"

@pytest.mark.parametrize("name, file, text, message", [
    ("fma", "fma_metadata/tracks.csv", TRACKS + "2,extra,small,Pop,1\n",
     "line 4: 'extra' is none of the splits"),
    ("fma", "fma_metadata/tracks.csv", TRACKS + "2,test,small\n",
     "line 4: has no genre"),
    ("cremad", "CREMA-D/AudioWAV/1x01_DFA_ANG_XX.wav", "", "not named as 1001_DFA_ANG_XX is"),
    ("gtzan", "genres/blues/blues.000x.wav", "", "not named as blues.00000 is"),
    ("libricount", "test/many_1.wav", "", "not named as 10_1234 is"),
    ("nsynth", "nsynth-train/audio/a-b_c_d-e.wav", "", "not named as synth_lead"),
    ("ravdess", "Actor_01/03-01-09-01-01-01-01.wav", "", "not named as 03-01-05"),
    ("ravdess", "Actor_xx/03-01-x.wav", "", "not named as 03-01-05"),
    ("vocalsound", "audio_16k/f0003_0_cough_2_x_.wav", "", "not named as f0003_0_cough is"),
    ("vocalimitation", VIS + "dog.wav", "", "not named as 000Animal_Cat_Growling-4808 is"),
    ("urbansound8k", "UrbanSound8K/metadata/UrbanSound8K.csv",
     "slice_file_name,fsID,fold,classID,class\na.wav,1\n", "a row is incomplete"),
    ("fsd50k", "FSD50K.ground_truth/vocabulary.csv", "number,class,mid\n", "not in the class list"),
    ("fsd50k", "FSD50K.ground_truth/vocabulary.csv", "0\n", "line 1: not number,class,mid"),
    ("fsd50k", "FSD50K.ground_truth/dev.csv", "fname,labels,mids,split\n1,Cat,/m/1,train\n",
     "not in the class list: .'Cat'"),
    ("esc50", "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take\n",
     "no recordings to pack"),
    ("fluentspeechcommands", "fluent_speech_commands_dataset/data/train_data.csv",
     "path,speakerId,transcription\na,b\n", "a class has no name"),
    ("fsdkaggle2018", "FSDKaggle2018.meta/train_post_competition.csv", "fname,label,label\n",
     "no column label, or several"),
    ("librispeechmalefemale", "LibriSpeech/SPEAKERS.TXT", "caf\xe9", "speaker 60 is not in")])
def test_a_wrong_archive_is_refused_in_one_line(tmp_path, write_wav, name, file, text, message):
    unpack(tmp_path, write_wav, ARCHIVES.get(name, ({},))[0] | {file: text})
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        packed(tmp_path, name, tmp_path)

@pytest.mark.parametrize("text", ["[]", "{", '{"data": 1}', '{"data": [1]}',
                                  '{"data": [{"wav": 1, "labels": "x"}]}',
                                  '{"data": [{"wav": "x", "labels": ["x"]}]}', "[" * 100_000, "\xe9"])
def test_a_wrong_list_of_ast_is_refused_in_one_line(tmp_path, write_wav, text):
    write_wav("audio/abcdefghijk.wav", TONE)
    with pytest.raises(UserError, match=r"train.json: wants [^\n]*$"):
        audioset(tmp_path, "--train", write(tmp_path / "train.json", text))

# ---- built-in sounds

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
    y = torch.tensor([[row["labels"] == name for name in pack.classes] for row in pack.rows()])
    train, _, test = evaluate.splits_of(pack)[""]
    scores = evaluate.linear_probe(x[train], y[train], x[test], False)
    assert 0.1 < evaluate.score(scores, y[test], False) < 0.6
