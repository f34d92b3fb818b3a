"""The innermost loops of the micro-kernels keep to vector registers.

Some compilers spill accumulators when they inline or hoist, which costs half the speed and fails no other test. A
constant that found no register, or one value out and back, hides behind the multiplications and is let pass.
Functions are the tile_... of kernels_, decoder_ and solve_avx2, _avx512, _avx512_bf16 and _amx (but not of
_amx_bf16, whose sums are in tiles); loops are backward
jumps over one basic block that holds a multiplication. A function without such a loop fails too: then this script no
longer sees what it has to watch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OBJECTS = (
    "decoder_avx2.cpp",
    "decoder_avx512.cpp",
    "decoder_avx512_bf16.cpp",
    "kernels_amx.cpp",
    "kernels_amx_int16.cpp",
    "kernels_avx2.cpp",
    "kernels_avx512.cpp",
    "kernels_avx512_bf16.cpp",
    "kernels_avx512_int16.cpp",
    "solve_avx2.cpp",
    "solve_avx512.cpp",
)
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)\b")
MULTIPLY = re.compile(r"^vpdpbusd|^vpdpwssd|^vpmaddubsw|^vpmaddwd|^vfn?m(?:add|sub)\d+ps|^vdpbf16ps")
VECTOR = re.compile(r"%[xyz]mm\d+")
STACK = re.compile(r"\(%rsp[,)]")
FRAME = re.compile(r"\(%rbp[,)]")
FRAME_POINTER = re.compile(r"^(?:mov\s+%rsp,%rbp|lea\s+\S*\(%rsp\),%rbp)")
MAX_SHARE = 0.05  # of the instructions of a loop; so few cost no time that could be measured


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str


@dataclass(frozen=True)
class Loop:
    function: str
    body: list[Instruction]
    spills: list[Instruction]

    @property
    def bad(self) -> bool:
        return not self.body or len(self.spills) > MAX_SHARE * len(self.body)


def functions(objdump: str, path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and instructions of every function of an object."""
    command = [objdump, "-d", "-C", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name, body = "", list[Instruction]()
    for line in listing.splitlines():
        if header := FUNCTION.match(line):
            if body:
                yield name, body
            name, body = header[1], []
        elif found := INSTRUCTION.match(line):
            body.append(Instruction(int(found[1], 16), found[2]))
    if body:
        yield name, body


def innermost_ranges(body: list[Instruction]) -> list[tuple[int, int]]:
    """First and last address of the loops that hold a multiplication and are one basic block.

    Blocks that the compiler moves out of line make other backward jumps span code that is no loop.
    """
    jumps = [(line.address, int(found[1], 16)) for line in body if (found := JUMP.match(line.text))]
    multiplications = [line.address for line in body if MULTIPLY.match(line.text)]
    ranges = []
    for end, begin in jumps:
        if not any(begin <= address < end for address in multiplications):
            continue
        left_early = any(begin <= source < end for source, _ in jumps)
        entered_late = any(begin < target <= end for _, target in jumps)
        if not left_early and not entered_late:
            ranges.append((begin, end))
    return ranges


def loops(objdump: str, path: Path) -> Iterator[Loop]:
    """The loops that count with their vector instructions on the stack; an empty one for a function without any."""
    for name, body in functions(objdump, path):
        if "::tile_" not in name:
            continue
        has_frame = any(FRAME_POINTER.match(line.text) for line in body)
        short_name = re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", ""))
        ranges = innermost_ranges(body)
        if not ranges:
            yield Loop(short_name, [], [])
        for begin, end in ranges:
            inside = [line for line in body if begin <= line.address <= end]
            spills = [
                line
                for line in inside
                if VECTOR.search(line.text) and (STACK.search(line.text) or (has_frame and FRAME.search(line.text)))
            ]
            yield Loop(short_name, inside, spills)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objdump", required=True)
    parser.add_argument("--verbose", action="store_true", help="list every loop")
    parser.add_argument("objects", nargs="+", type=Path)
    args = parser.parse_args()
    failed = False
    for wanted in OBJECTS:
        found = [loop for path in args.objects if path.name.startswith(wanted) for loop in loops(args.objdump, path)]
        bad = [loop for loop in found if loop.bad]
        failed |= not found or bool(bad)
        print(f"{wanted}: {len(found)} inner loops of tile_ functions, {len(bad)} bad")
        for loop in found if args.verbose else bad:
            print(f"  {loop.function}: {len(loop.spills)} of {len(loop.body)} instructions use vectors on the stack")
            for line in loop.spills:
                print(f"    {line.address:x}: {line.text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
