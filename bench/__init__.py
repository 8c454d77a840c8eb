"""The benchmark suite: `python -m bench --help` from the root of the repository."""

import io
import sys

for _stream in (sys.stdout, sys.stderr):  # tables hold more than ASCII, which not every terminal shows
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="replace")
