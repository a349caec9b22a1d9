"""What holds for any input: contracts on random lengths, packs, folds, masks and mixtures, each from a seed.

The last is a fuzz: whatever is done to sounds, checkpoints and packs, they are read or refused in a line.
"""
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

import data
import model as models
from audio import (
    BANDS, MIN_SAMPLES, ROW, fbank, patchify, read_audio, rows_in, samples_of, valid_tokens, windows)
from common import UserError
from conftest import row_of
from data import Clips, Pack, Sounds
from evaluate import over_recordings, splits_of
from model import masked_mean, random_mask
from tokenizer import load_tokenizer

CPU = torch.device("cpu")
seeds = pytest.mark.parametrize("seed", range(6))

def noise_of(row):
    """Return the sound of a row: noise of its own, of row["samples"], at a level of its own."""
    random = np.random.default_rng(int(row["path"]))
    return (10 ** random.uniform(-3, 0) * random.uniform(-1, 1, row["samples"])).astype(np.float32)

def random_pack(path, seed, recordings=40):
    """Write a pack of recordings of 0.2 to 3 s, some cut, of random splits and classes: it and its rows."""
    random = np.random.default_rng(seed)
    splits = ["1", "2", "3"] if seed % 2 else ["train", "test", "valid", "dev", ""]
    rows = []
    for i in range(recordings):
        labels = random.choice(list("abc"), random.integers(1, 3), replace=False)
        rows.append(row_of(i, labels, random.choice(splits), samples=int(random.integers(3200, 48000))))
    return data.write_pack(path, rows, noise_of, max_seconds=float(random.uniform(0.3, 2))), rows

@seeds
def test_windows_of_any_length_hold_every_token_where_it_is(seed):
    random = np.random.default_rng(seed)
    n, rows = int(random.integers(1, 300_000)), int(random.integers(1, 90))
    hop = int(random.integers(1, rows + 1))
    wav = torch.arange(n)                                               # each sample says where it is
    cuts = np.sort(random.integers(0, n + 1, 5))
    seen = Counter()
    for first, samples in windows(np.split(wav.numpy(), cuts), rows, hop):
        count = rows_in(len(samples))
        assert len(samples) == samples_of(count)
        if n >= MIN_SAMPLES:
            assert torch.equal(samples, wav[first * ROW : first * ROW + len(samples)])
        seen.update(range(first, first + count))
    assert sorted(seen) == list(range(max(1, rows_in(n))))
    if hop == rows:
        assert set(seen.values()) == {1}

@seeds
def test_a_clip_gives_the_same_in_any_batch(seed, random_encoder, distilled):
    random = np.random.default_rng(seed)
    lengths = torch.from_numpy(random.integers(1, 30_000, 5))
    wav = torch.randn(5, int(lengths.max()) + int(random.integers(0, 9000)))
    x, valid = random_encoder.features(wav, lengths)                    # whatever stands behind a clip
    codes = distilled.encode(wav, lengths)
    for i, n in enumerate(lengths):
        alone, _ = random_encoder.features(wav[i : i + 1, :n])
        torch.testing.assert_close(x[i][valid[i]], alone[0], rtol=0, atol=1e-5)
        assert torch.equal(codes[i][codes[i] >= 0], distilled.encode(wav[i : i + 1, :n])[0])

@seeds
def test_a_mask_cuts_the_tokens_of_every_clip_in_two(seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 100, 6) * BANDS
    tokens[0], share = 99 * BANDS, random.uniform(0.01, 0.99)
    valid = torch.arange(tokens.max()) < torch.from_numpy(tokens)[:, None]
    keep, masked = random_mask(torch.from_numpy(random.random(valid.shape)), valid, share)
    for i, n in enumerate(tokens):
        kept, hidden = (index[i][index[i] < valid.shape[1]].tolist() for index in (keep, masked))
        assert sorted(kept + hidden) == list(range(n))
        assert len(kept) == (max(1, round((1 - share) * n)) if n else 0)

@seeds
def test_a_pack_holds_every_recording_and_no_other(seed, tmp_path, capsys):
    pack, rows = random_pack(tmp_path / "pack", seed)
    for number, row in enumerate(rows):
        clips = [pack.wav(i) for i in np.flatnonzero(pack.index["row"] == number)]
        heard, sound = torch.cat(clips).numpy(), noise_of(row)
        assert len(sound) - len(heard) < MIN_SAMPLES
        assert np.abs(heard - sound[: len(heard)]).max() <= 2.0**-16    # half a step of 16 bits
    labels, splits = pack.table
    assert splits.tolist() == [row["split"] for row in rows]
    for table, row in zip(labels[np.arange(len(rows))].numpy(), rows):
        assert {pack.classes[k] for k in np.flatnonzero(table)} == set(row["labels"])

@seeds
def test_splits_share_no_recording_and_folds_test_each_once(seed, tmp_path, capsys):
    pack, rows = random_pack(tmp_path / "pack", seed)
    tested = Counter()
    for train, valid, test in splits_of(pack, valid_share=0.2).values():
        parts = np.concatenate([train, valid, test])
        assert len(parts) == len(set(parts))
        tested.update(test.tolist())
    due = [i for i, row in enumerate(rows) if row["split"] == "test" or row["split"].isdigit()]
    assert tested == Counter(due)

@seeds
def test_training_hears_each_clip_once_an_epoch_and_none_to_test_by(seed, tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(seed)
    pack, rows = random_pack(tmp_path / "pack", seed)
    ranks, seconds = int(random.integers(1, 4)), float(random.uniform(1, 20))
    sounds, heard = Sounds(str(tmp_path / "pack"), 0.0, seconds, seed), []
    monkeypatch.setattr(data, "world", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(data, "rank", lambda: rank)
        for batch in sounds.batches():
            heard += batch["clip"].tolist()
            if batch["next"][0] == 1:
                break
    held = set(np.concatenate(sounds.valid).tolist())
    splits = [rows[recording]["split"] for recording in pack.index["row"][[*heard, *held]]]
    assert not {"test", "valid", "dev"} & set(splits) and not held & set(heard)
    recordings = [set(pack.index["row"][sorted(clips)].tolist()) for clips in (set(heard), held)]
    assert not recordings[0] & recordings[1]
    assert max(Counter(heard).values()) == 1 or len(set(heard)) < ranks

@seeds
def test_any_run_of_batches_has_the_shares_of_its_mixture(seed):
    random = np.random.default_rng(seed)
    samples = random.integers(3200, 160_000, 300)
    subsets = np.split(np.arange(300), np.sort(random.choice(np.arange(20, 280), 2, replace=False)))
    weights = random.dirichlet([2, 2, 2])
    batches = data.mixed_batches(samples, 1_600_000, (seed, 0), subsets, weights)
    first, last = np.sort(random.choice(len(batches) + 1, 2, replace=False))
    heard = np.concatenate(batches[first:last])
    seconds = np.array([samples[heard[np.isin(heard, subset)]].sum() for subset in subsets])
    assert np.abs(seconds - weights * seconds.sum()).max() <= 2 * 160_000

@seeds
def test_a_batch_is_the_same_for_any_threads_and_from_any_place(seed, tmp_path, capsys):
    random = np.random.default_rng(seed)
    random_pack(tmp_path / "pack", seed)
    crop = float(random.choice([0.0, 0.32, 0.64]))
    def batches(workers, place=(0, 0)):
        return Sounds(str(tmp_path / "pack"), crop, 8.0, seed, workers).batches(place)
    several = [batch for batch, _ in zip(batches(3), range(9))]
    number = int(random.integers(1, 9))
    rest = batches(0, several[number - 1]["next"])
    for expected, batch in zip(several[number:], rest):
        assert all(torch.equal(batch[name], expected[name]) for name in ("wav", "clip", "noise", "lengths"))

@seeds
def test_a_recording_is_scored_as_the_mean_over_its_tokens(seed, tmp_path, capsys):
    pack, rows = random_pack(tmp_path / "pack", seed, recordings=12)
    chosen = np.flatnonzero(np.random.default_rng(seed).random(12) < 0.6)
    def loudness(wav, lengths):
        return masked_mean(patchify(fbank(wav)).mean(-1, keepdim=True), valid_tokens(lengths, wav.shape[1]))
    values = over_recordings(pack, chosen, loudness, CPU)
    for recording, value in zip(chosen, values):
        clips = [pack.wav(i) for i in np.flatnonzero(pack.index["row"] == recording)]
        tokens = np.concatenate([patchify(fbank(clip[None]))[0].mean(-1) for clip in clips])
        assert value.item() == pytest.approx(tokens.mean(), rel=1e-5)

# ---- mutations

def mutate(path, random):
    """Do to a file what disks, downloads and editors do."""
    content = bytearray(path.read_bytes())
    first = int(random.integers(len(content)))
    if random.random() < 0.5:
        first %= 200                                        # headers are where it hurts
    what = random.integers(6)
    if what == 0:
        content[first] ^= 1 << int(random.integers(8))
    elif what == 1:
        content[first : first + 4] = random.bytes(4)
    elif what == 2:
        content = content[:first]
    elif what == 3:
        content[first : first + 64] = bytes(64)
    elif what == 4:
        content[first:first] = random.bytes(int(random.integers(1, 99)))
    else:
        content = content + content[:first]
    path.write_bytes(content)

@pytest.mark.slow
def test_files_with_any_damage_are_read_or_refused_in_one_line(official, distilled, tmp_path, capsys):
    outcomes, random = Counter(), np.random.default_rng(0)
    def count(kind, path, read, whole=None):
        try:
            value = read(path)
            assert np.isfinite(np.asarray(value)).all() and (whole is None or torch.equal(value, whole))
            outcomes[kind, "read"] += 1
        except UserError as error:
            assert str(path.name) in str(error) and len(str(error).splitlines()) == 1, error
            outcomes[kind, "refused"] += 1

    formats = ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64", "NIST"]
    for i in range(300):
        path = tmp_path / f"sound.{formats[i % 10].lower()}"
        soundfile.write(path, 0.1 * random.standard_normal((9000, 1 + i % 2)), 16000, format=formats[i % 10])
        mutate(path, random)
        count("sound", path, read_audio)

    torch.save(distilled.state(), tmp_path / "tokenizer")
    files = [official("encoder"), official("finetuned"), official("tokenizer"), tmp_path / "tokenizer"]
    wav = torch.randn(1, 8000)
    def embed(path):
        return models.load_encoder(path).embed(wav).detach()
    def encode(path):
        return load_tokenizer(path).encode(wav)
    for i in range(100):
        path = tmp_path / f"checkpoint{i}.pt"
        shutil.copy(files[i % 4], path)
        mutate(path, random)
        use = embed if i % 4 < 2 else encode
        count("checkpoint", path, use, use(files[i % 4]))       # what is read is what it was

    whole, _ = random_pack(tmp_path / "whole", 0, recordings=8)
    names = ["pack.json", "index.npy", "clips.csv", "audio-00000.bin", "skipped.csv"]
    for i in range(100):
        path = tmp_path / f"pack{i}"
        shutil.copytree(tmp_path / "whole", path)
        mutate(path / names[i % 5], random)
        def read(path):
            pack = Pack(path)
            pack.table, pack.skipped(), pack.rows()
            return Clips([pack])[[(i, 0) for i in range(len(pack))]]["wav"]
        count("pack", path, read)
        shutil.rmtree(path)

    print(json.dumps({" ".join(key): value for key, value in sorted(outcomes.items())}))
    assert sum(outcomes.values()) == 500 and len(outcomes) == 6
