"""FMA small: music of eight genres.

Defferrard et al. 2017. The splits are the authors' (set.split), groups the artists. X-ARES, too, cuts the
30 s into pieces of 10 s. Six tracks are known to be damaged or nearly empty.
"""

import csv
import io
from pathlib import Path

from common import UserError, check
from recipes.tables import read_text, row_of

COLUMNS = [("set", "subset"), ("set", "split"), ("track", "genre_top"), ("artist", "id")]
SPLITS = dict(training="train", validation="valid", test="test")


def add_flags(parser):
    parser.add_argument("source", help="folder with fma_small and fma_metadata")


def rows(args):
    root = Path(args.source)
    table = root / "fma_metadata/tracks.csv"
    check(table.is_file(), f"{table}: no such file; it is in fma_metadata.zip")

    # cells go over several lines, biographies, and are of any length
    csv.field_size_limit(2**30)
    lines = csv.reader(io.StringIO(read_text(table), newline=""))
    # three rows of header: what a column is about, its name, and the name of the first
    about, names, _ = (next(lines, []) for _ in range(3))
    header = list(zip(about, names))
    missing = set(COLUMNS).difference(header)
    check(not missing, f"{table}: no column {missing} in the first two rows of its header")

    all_rows = []
    try:
        for fields in lines:
            cells = dict(zip(header, fields))
            subset, split, genre, artist = (cells.get(column, "") for column in COLUMNS)
            if subset == "small":
                where = f"{table}, line {lines.line_num}"
                check(split in SPLITS, f"{where}: {split!r} is none of the splits {list(SPLITS)}")
                check(genre, f"{where}: has no genre, as all tracks of fma_small have")
                number = fields[0].zfill(6)
                path = root / f"fma_small/{number[:3]}/{number}.mp3"
                all_rows.append(row_of(path, root, [genre], SPLITS[split], artist))
    except csv.Error as error:
        raise UserError(f"{table}: cannot be read as a table ({error})") from None
    return all_rows, None
