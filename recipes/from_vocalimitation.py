"""Vocal Imitation Set: which of 302 sounds a voice imitates.

Kim et al. 2018; the imitations that the raters let pass (included/). There are no official folds, and those
of X-ARES are only in its archives: here the three folds are a function of the participant, so that nobody
is heard in two. Classes are named as the files are, 000Animal_..., in that order.
"""

import csv
import zlib

from recipes.tables import parts_of_name, read_records, recordings, row_of, unpacked


def add_flags(parser):
    parser.add_argument("source", help="folder of the data set, unpacked")


def rows(args):
    root = unpacked(args.source, "VocalImitationSet")
    files = recordings(root, "vocal_imitations/included/*.wav")

    # what participants wrote is in there, with quotation marks as they come
    table = read_records(
        root / "vocal_imitations.txt",
        "imitation_filename participant_id",
        delimiter="\t",
        quoting=csv.QUOTE_NONE
    )
    participants = {cells["imitation_filename"]: cells["participant_id"] for cells in table}

    all_rows = []
    for file in files:
        # class and number; a class may have hyphens: 010Animal_..._ cock-a-doodle-doo-5192735183077376
        [label] = parts_of_name(file, r"(.+)-\d+", "000Animal_Cat_Growling-4808")
        participant = participants.get(file.name, file.stem)
        fold = zlib.crc32(participant.encode()) % 3
        all_rows.append(row_of(file, root, [label], str(fold), participant))
    return all_rows, None
