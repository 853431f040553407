"""Reads the machine code of GPUs, in nvdisasm's words: instructions, branches, and the loops that they make.

nvdisasm is slow, and in kernels out of few templates most instructions differ in registers and constants alone. It is
asked about one of a kind: `recognize` reads a million instructions by the names of some thousand.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from itertools import pairwise

import numpy as np

# Of global memory, 16 bytes or more at a time. LDGSTS goes to shared memory.
WIDE_LOAD = re.compile(r"(LDG|LDGSTS)\b.*\.(128|256)\b")
WIDE_STORE = re.compile(r"STG\b.*\.(128|256)\b")
LOCAL = re.compile(r"(LDL|STL)\b")

SIZE = 16  # bytes of an instruction, from Volta on
ORIGIN = 1 << 24  # bytes; an address for the first instruction, so that branches before it have one too
NOWHERE = np.iinfo(np.int32).max  # as a jump: none
KIND = np.dtype(
    [
        ("padding", bool),
        ("wide_load", bool),
        ("wide_store", bool),
        ("local", bool),
        ("goes_on", bool),  # whether the next instruction may follow
        ("jump", np.int32),  # of a branch, in instructions: 0 leads to itself
    ]
)


def parse(listing: str) -> np.ndarray:
    """The KIND of every instruction that `nvdisasm --binary` printed: branches go to addresses there, not to labels."""
    found = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(@\S+\s+)?(\S[^;]*?)\s*;", listing, re.MULTILINE)
    return np.array([_kind(int(address, 16), bool(on), text) for address, on, text in found], KIND)


def _kind(address: int, predicated: bool, text: str) -> tuple[bool | int, ...]:
    target = re.search(r"\b0x([0-9a-f]+)$", text) if text.startswith("BRA") else None
    # BRA P0 and BRA.U UP0 are conditions too
    goes_on = predicated or not re.match(r"BRA(\.U)? 0x" if target else r"BRA|EXIT|RET|BRX|JM[PX]", text)
    jump = (int(target[1], 16) - address) // SIZE if target else NOWHERE
    patterns = (WIDE_LOAD, WIDE_STORE, LOCAL)
    return text.startswith("NOP"), *(bool(pattern.match(text)) for pattern in patterns), goes_on, jump


def recognize(words: np.ndarray, disassemble: Callable[[np.ndarray], str]) -> np.ndarray:
    """The KIND of every instruction, as `parse` gives it for what `disassemble` prints.

    Instructions are alike if bits 0 to 15 and 72 to 104 are: operation, modifiers and predicates. The others are
    registers, constants and scheduling, and matter in branches alone, as a constant says how far they go. Of those
    alike the first and the last are disassembled, and have to be of one kind; of branches, all that differ.
    """
    low, high = words.T
    alike = (low & 0xFFFF) | (high >> 8 & 0x1FFFFFFFF) << 16
    _, first, which = np.unique(alike, return_index=True, return_inverse=True)
    _, last = np.unique(alike[::-1], return_index=True)
    kinds, others = np.split(_ask(disassemble, np.concatenate([words[first], words[::-1][last]])), 2)
    branches = kinds["jump"] != NOWHERE
    if any((kinds != others) & ~branches):
        raise ValueError(
            "instructions that differ in registers, constants or scheduling alone are of two kinds"
        )
    code = kinds[which]
    here = np.flatnonzero(branches[which])
    exact, which = np.unique(words[here], axis=0, return_inverse=True)
    code[here] = _ask(disassemble, exact)[which.reshape(-1)]  # NumPy 2.0 has a second dimension
    return code


def _ask(disassemble: Callable[[np.ndarray], str], words: np.ndarray) -> np.ndarray:
    kinds = parse(disassemble(words) if len(words) else "")
    if len(kinds) != len(words):
        raise ValueError(f"of {len(words)} instructions {len(kinds)} were disassembled")
    return kinds


def sections(cubin: bytes) -> dict[str, np.ndarray]:
    """Every kernel's instructions, two numbers of 64 bits each, by mangled name: .text.NAME of the ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<2H", cubin, 60)
    headers = [struct.unpack_from("<2I4Q", cubin, table + 64 * i) for i in range(count)]
    by_name = {}
    for name, _, _, _, start, size in headers:
        begin = headers[names][4] + name
        title = cubin[begin : cubin.index(b"\0", begin)].decode()
        if title.startswith(".text."):
            words = np.frombuffer(cubin, "<u8", size // 8, start)
            by_name[title.removeprefix(".text.")] = words.reshape(-1, 2)
    return by_name


def loops(code: np.ndarray) -> list[list[range]]:
    """Of every natural loop of a kernel the straight runs of instructions that are in no loop inside it."""
    targets = np.arange(len(code)) + code["jump"]
    jumps = (targets >= 0) & (targets < len(code))
    parted = np.flatnonzero(jumps | ~code["goes_on"]) + 1
    bounds = np.unique(np.concatenate([[0], targets[jumps], parted, [len(code)]]))
    runs = [range(start, stop) for start, stop in pairwise(bounds.tolist())]
    ends = bounds[1:] - 1
    before: list[list[int]] = [[] for _ in runs]
    for i in np.flatnonzero(code["goes_on"][ends[:-1]]).tolist():
        before[i + 1].append(i)
    back: list[tuple[int, int]] = []
    branches = np.flatnonzero(jumps[ends])
    heads = np.searchsorted(bounds, targets[ends[branches]])
    for end, head in zip(branches.tolist(), heads.tolist(), strict=True):
        before[head].append(end)
        if head <= end:
            back.append((end, head))
    bodies: dict[int, set[int]] = {}
    for end, head in back:
        body, waiting = {head, end}, [end] if end != head else []
        while waiting:
            new = set(before[waiting.pop()]) - body
            body |= new
            waiting += new
        if head == 0 or 0 not in body:  # else there is a way in beside the head: no loop of the source
            bodies[head] = bodies.get(head, set()) | body
    own = (
        body.difference(*(inner for start, inner in bodies.items() if start != head and start in body))
        for head, body in bodies.items()
    )
    return [[runs[i] for i in sorted(loop)] for loop in own]
