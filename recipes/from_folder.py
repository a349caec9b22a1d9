"""Class per folder, or an unlabelled tree: every audio file below a folder.

If all files lie one folder deep, the folder is the class.
"""

from audio import audio_files
from recipes.tables import row_of


def add_flags(parser):
    parser.add_argument("source", help="folder of the audio files")


def rows(args):
    root = args.source
    files = audio_files(root)
    stray = [file for file in files if len(file.relative_to(root).parts) != 2]
    if not stray:
        return [row_of(file, root, [file.parent.name]) for file in files], None

    if len(stray) < len(files):
        print(f"{root}: no labels, for not every file is one folder deep ({stray[0]} is not)")
    return [row_of(file, root, []) for file in files], None
