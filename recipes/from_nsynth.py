"""NSynth: notes of 11 instrument families.

Engel et al. 2017. The splits are the authors'; no instrument of train is in valid or test. Classes are in
the order of instrument_family, groups the instruments.
"""

from pathlib import Path

from recipes.tables import parts_of_name, recordings, row_of

FAMILIES = "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal".split()


def add_flags(parser):
    parser.add_argument("source", help="folder with nsynth-train, nsynth-valid and nsynth-test")


def rows(args):
    root = Path(args.source)
    all_rows = []
    for split in ("train", "valid", "test"):
        for file in recordings(root / f"nsynth-{split}", "audio/*_*_*-*.wav"):
            # instrument, pitch, velocity
            pattern = r"((\w+)_[a-z]+_\d+)-\d+-\d+"
            instrument, family = parts_of_name(file, pattern, "synth_lead_synthetic_000-060-100")
            all_rows.append(row_of(file, root, [family], split, instrument))
    return all_rows, FAMILIES
