"""The command line that the scripts of packages share: `make FOLDER …`, `bytes FOLDER`, `prefill|decode FOLDER …`.

The last two go on with TOKENS THREADS REPEATS. It runs in the packages' environments, with Python's own library alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

# One timed call of a loaded model, in seconds.
Timed = Callable[[], float]


def run(
    make: Callable[..., None], bytes_of: Callable[[str], int], timed: Callable[[str, str, int, int], Timed]
) -> None:
    """Do what the command line says; `timed(what, folder, tokens, threads)` loads a model once for all calls.

    Rates are tokens per second of the median call, after one that is not counted.
    """
    what, folder, *rest = sys.argv[1:]
    if what == "make":
        make(folder, *rest)
        print("made")
    elif what == "bytes":
        print(bytes_of(folder))
    else:
        tokens, threads, repeats = map(int, rest)
        seconds = timed(what, folder, tokens, threads)
        seconds()
        print(tokens / statistics.median(seconds() for _ in range(repeats)))
