"""Reads the machine code of GPUs as nvdisasm prints it: instructions, branches, and the loops that they make."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Of global memory, 16 bytes or more at a time. LDGSTS goes to shared memory.
WIDE_LOAD = re.compile(r"(LDG|LDGSTS)\b.*\.(128|256)\b")
WIDE_STORE = re.compile(r"STG\b.*\.(128|256)\b")
LOCAL = re.compile(r"(LDL|STL)\b")


@dataclass(frozen=True)
class Instruction:
    text: str  # without its predicate
    predicated: bool

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> str | None:
        """The label that a branch goes to."""
        found = re.search(r"`\(([^)]+)\)", self.text) if self.opcode.startswith("BRA") else None
        return found[1] if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow; BRA P0 and BRA.U UP0 are conditions too."""
        if self.predicated or not re.match(r"BRA|EXIT|RET|BRX|JM[PX]", self.opcode):
            return True
        return self.target is not None and not re.match(r"BRA(\.U)? `", self.text)


@dataclass(frozen=True)
class Code:
    """One kernel, disassembled; labels say before which instruction they stand."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def successors(self, i: int) -> list[int]:
        instruction = self.instructions[i]
        following = [i + 1] if instruction.goes_on else []
        if instruction.target in self.labels:
            following.append(self.labels[instruction.target])
        return [j for j in following if j < len(self.instructions)]

    def loops(self) -> list[set[int]]:
        """Of every natural loop the instructions that are in no loop inside it."""
        before: dict[int, list[int]] = {i: [] for i in range(len(self.instructions))}
        back: list[tuple[int, int]] = []
        for i in before:
            for j in self.successors(i):
                before[j].append(i)
                if j <= i:
                    back.append((i, j))
        bodies: dict[int, set[int]] = {}
        for end, head in back:
            body, waiting = {head, end}, [end] if end != head else []
            while waiting:
                new = set(before[waiting.pop()]) - body
                body |= new
                waiting += new
            if head == 0 or 0 not in body:  # else there is a way in beside the head: no loop of the source
                bodies[head] = bodies.get(head, set()) | body
        return [
            body.difference(*(inner for start, inner in bodies.items() if start != head and start in body))
            for head, body in bodies.items()
        ]


def codes(listing: str) -> dict[str, Code]:
    """By mangled name, from what nvdisasm prints."""
    by_name: dict[str, Code] = {}
    code = Code([], {})
    for line in listing.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            code = by_name[found[1]] = Code([], {})
        elif found := re.match(r"([.$\w]+):", line):
            code.labels[found[1]] = len(code.instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@\S+\s+)?(\S[^;]*?)\s*;", line):
            code.instructions.append(Instruction(found[2], found[1] is not None))
    return by_name
