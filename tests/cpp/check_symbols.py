"""Objects compiled for newer CPUs may share nothing but their tables.

A function with external or weak linkage in such an object could be the copy that the linker keeps for everybody, and
an older CPU would meet an illegal instruction in code that looks innocent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ISA_SUFFIXES = ("_avx2.cpp", "_avx512.cpp", "_avx512_bf16.cpp", "_amx.cpp", "_amx_bf16.cpp")
LOCAL_KINDS = frozenset("tbrdUN")  # nm prints local symbols in lower case; U needs another object
TABLE_SUFFIXES = ("_table", "_limits")


def isa_objects(paths: list[Path]) -> list[Path]:
    """Those objects whose source is compiled with flags of a newer CPU."""
    return [path for path in paths if path.name.removesuffix(".o").removesuffix(".obj").endswith(ISA_SUFFIXES)]


def shared_symbols(nm: str, path: Path) -> list[str]:
    """`kind name` of every symbol that other objects can see and that is no table of kernels or limits."""
    listing = subprocess.run([nm, "-C", str(path)], check=True, capture_output=True, text=True).stdout
    shared = []
    for line in listing.splitlines():
        kind, name = line[17:18], line[19:]
        is_table = kind in "DR" and name.startswith("qtale::cpu::") and name.endswith(TABLE_SUFFIXES)
        if kind not in LOCAL_KINDS and not is_table:
            shared.append(f"{kind} {name}")
    return shared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nm", required=True)
    parser.add_argument("objects", nargs="+", type=Path)
    args = parser.parse_args()
    objects = isa_objects(args.objects)
    if not objects:
        print("no object ends in " + " or ".join(ISA_SUFFIXES), file=sys.stderr)
        return 1
    failed = False
    for path in objects:
        shared = shared_symbols(args.nm, path)
        failed |= bool(shared)
        print(f"{path.name}: {len(shared)} shared symbols")
        for symbol in shared:
            print(f"  {symbol}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
