"""
How known data sets lie on disk: one file each, from_<name>.py, is the command `python data.py <name>`.

To add a data set, write one such file; nothing else has to know of it. It holds

    a docstring         whose first line is the help of the command
    add_flags(parser)   adds its arguments to argparse; `source` is the one that names the data
    rows(args)          returns (rows, classes) or raises common.UserError; classes None = the labels, sorted
    read(row)           if the sounds are no files: returns one as (n,) float32 at 16 kHz

from_esc50.py is a short one to copy; recipes/tables.py holds what they share. A row is a dict:

    path                its name in the pack
    labels              list of class names
    split, group        train, valid, test or a fold; what has to stay together, as a speaker ("" = none)
    file, start, end    where its audio is, start and end in seconds; end None = the end of the file
    max_seconds         if it is there: the length of the clips, where the pack's will not do

A row whose file is not there, or cannot be read, is listed as skipped. DESED (times of events) and Clotho
(captions), which X-ARES has as well, are no classification of recordings and not done.
"""

import importlib
import pkgutil


def commands():
    """Return {name: module} of every from_<name>.py in this folder."""
    files = pkgutil.iter_modules(__path__)
    names = [file.name.removeprefix("from_") for file in files if file.name.startswith("from_")]
    return {name: importlib.import_module(f"recipes.from_{name}") for name in names}
