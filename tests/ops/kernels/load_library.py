"""Load the kernels, of another source: `python load_library.py SOURCE`."""

import sys
from pathlib import Path

from capsexp.ops.kernels import compiled

if __name__ == "__main__":
    compiled.SOURCES = [Path(sys.argv[1])]
    compiled.library()
    print("loaded")
