"""What the compiler made of the CUDA kernels: registers, spills and the width of their loads, without a GPU.

    python -m benchmarks.kernels                         every file of csrc/cuda for every architecture
    python -m benchmarks.kernels --arch 9.0 --json report.json

Needs nvcc and nvdisasm (the latter is in the `bench` extra). The exit code is 1 if a kernel uses local memory or loads
no 16 bytes at a time in any of its loops, or if a file does not compile without a warning.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import sass
from build_backend import nvcc

ROOT = Path(__file__).resolve().parents[1]
# Kernels, without template arguments, that may do what the others may not, and why.
EXEMPT: dict[str, str] = {}

MINIMUM_WIDTH = 150  # columns, where output goes to a file


class Unavailable(RuntimeError):
    """A tool is missing, and how to get it."""


class CompilationFailed(RuntimeError):
    """What the compiler said."""


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = 0
    stack: int = 0  # bytes, as the next three
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    instructions: int = 0
    wide_loads: int = (
        0  # instructions that load 16 bytes or more of global memory, to registers or shared memory
    )
    wide_stores: int = 0
    local: int = 0  # instructions that access local memory
    loop_instructions: int = 0  # of the loop with the most wide loads, without loops inside it
    loop_loads: int = 0  # its wide loads

    def faults(self) -> list[str]:
        if self.name.split("<")[0] in EXEMPT:
            return []
        found = {
            f"spills {self.spill_stores} bytes and loads {self.spill_loads}": self.spill_stores
            or self.spill_loads,
            f"has a stack frame of {self.stack} bytes": self.stack,
            f"accesses local memory in {self.local} instructions": self.local,
            "loads no 16 bytes at a time in any loop": not self.loop_loads,
        }
        return [f"{self.name} for {self.architecture} {fault}" for fault, is_so in found.items() if is_so]


def find_disassembler() -> str:
    """The nvdisasm on PATH, else that of the package."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    raise Unavailable("nvdisasm is not on PATH: pip install '.[bench]' brings it")


def find_compiler() -> str:
    if found := nvcc.find():
        return found
    raise Unavailable("nvcc is neither under CUDA_HOME nor on PATH")


def resources(log: str, architecture: str) -> dict[str, Kernel]:
    """By mangled name, from what `ptxas -v` says."""
    kernels: dict[str, Kernel] = {}
    for block in re.split(r"Compiling entry function ", log)[1:]:
        mangled = block.split("'")[1]
        kernel = kernels[mangled] = Kernel(mangled, architecture)
        for stack, stores, loads in re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ):
            kernel.stack += int(stack)
            kernel.spill_stores += int(stores)
            kernel.spill_loads += int(loads)
        for count in re.findall(r"Used (\d+) registers", block):
            kernel.registers = max(kernel.registers, int(count))
        for count in re.findall(r"(\d+) bytes smem", block):
            kernel.shared = max(kernel.shared, int(count))
    return kernels


def read(kernel: Kernel, code: sass.Code) -> None:
    """What the instructions say."""
    texts = [instruction.text for instruction in code.instructions]
    wide = {i for i, text in enumerate(texts) if sass.WIDE_LOAD.match(text)}
    kernel.instructions = sum(not text.startswith("NOP") for text in texts)
    kernel.wide_loads = len(wide)
    kernel.wide_stores = sum(bool(sass.WIDE_STORE.match(text)) for text in texts)
    kernel.local = sum(bool(sass.LOCAL.match(text)) for text in texts)
    loops = [(len(loop & wide), len(loop)) for loop in code.loops()]
    kernel.loop_loads, kernel.loop_instructions = max(
        loops, key=lambda loop: (loop[0], -loop[1]), default=(0, 0)
    )


def short_names(mangled: Iterable[str]) -> list[str]:
    """As in the source, with template arguments, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for line in text.stdout.splitlines():
        line = re.sub(r"\b(?:bnext|cuda)::|\(anonymous namespace\)::", "", line.removeprefix("void "))
        depth, end = 0, len(line)
        for i, character in enumerate(line):
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                end = i
                break
        names.append(line[:end])
    return names


def _said(what: str, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        raise CompilationFailed(f"{what} does not compile:\n{log.strip()}")
    return log


def examine(source: Path, ptx: str, architectures: Sequence[str]) -> list[Kernel]:
    """Every kernel of a file for the architectures that share their PTX, compiled as setup.py compiles it."""
    found: list[Kernel] = []
    with TemporaryDirectory() as folder:
        assembly, cubin = str(Path(folder, "kernels.ptx")), str(Path(folder, "kernels.cubin"))
        nvcc_with = [find_compiler(), *nvcc.FLAGS, "-Werror=all-warnings"]
        _said(f"{source.name} for {ptx}", *nvcc_with, f"-arch={ptx}", "-ptx", "-o", assembly, str(source))
        for name in architectures:
            target = [f"-arch={nvcc.real(name)}", "-cubin", "-Xptxas=-v", "-o", cubin]
            log = _said(f"{source.name} for {name}", *nvcc_with, *target, assembly)
            listing = subprocess.run(
                [find_disassembler(), "-c", cubin], capture_output=True, text=True, check=True
            )
            kernels, codes = resources(log, name), sass.codes(listing.stdout)
            for mangled, kernel in kernels.items():
                read(kernel, codes[mangled])
            for kernel, short in zip(kernels.values(), short_names(kernels), strict=True):
                kernel.name = short
            found += kernels.values()
    return sorted(found, key=lambda kernel: kernel.name)


def show(kernels: Sequence[Kernel], console: Console) -> None:
    titles = [
        "arch",
        "registers",
        "stack",
        "spills",
        "shared",
        "16-byte loads",
        "stores",
        "instructions",
        "loop",
    ]
    table = Table("kernel", *(title for title in titles))
    for column in table.columns[1:]:
        column.justify = "right"
    shown = ""
    for kernel in sorted(kernels, key=lambda kernel: kernel.name):  # stable: architectures stay in order
        if shown and kernel.name != shown:
            table.add_section()
        numbers = [kernel.registers, kernel.stack, kernel.spill_stores + kernel.spill_loads, kernel.shared]
        numbers += [kernel.wide_loads, kernel.wide_stores, kernel.instructions]
        loop = f"{kernel.loop_instructions} with {kernel.loop_loads} loads"
        name = kernel.name if kernel.name != shown else ""
        style = "red" if kernel.faults() else None
        table.add_row(name, kernel.architecture, *map(str, numbers), loop, style=style)
        shown = kernel.name
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", nargs="+", default=nvcc.ARCHITECTURES, help=f"default: {' '.join(nvcc.ARCHITECTURES)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything that was read")
    options = parser.parse_args(arguments)
    try:
        tools = [find_compiler(), find_disassembler()]
    except Unavailable as reason:
        parser.error(str(reason))

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, MINIMUM_WIDTH)
    sharing: dict[str, list[str]] = {}
    for name in options.arch:
        sharing.setdefault(nvcc.virtual(name), []).append(name)
    work = [(source, *shared) for source in sorted(ROOT.glob(nvcc.SOURCES)) for shared in sharing.items()]
    kernels: list[Kernel] = []
    faults: list[str] = [] if work else [f"there is no {nvcc.SOURCES}"]
    with ThreadPoolExecutor(nvcc.jobs()) as pool:
        running = [pool.submit(examine, *one) for one in work]
        for result in track(running, description="compiling", console=Console(stderr=True)):
            try:
                kernels += result.result()
            except CompilationFailed as error:
                faults.append(str(error))
    faults += [fault for kernel in kernels for fault in kernel.faults()]
    show(kernels, console)
    for fault in faults:
        console.print(f"fault: {fault}", style="red", soft_wrap=True, markup=False, highlight=False)
    print(f"{len(kernels)} kernels, {len(faults)} faults")
    if options.json:
        versions = {Path(tool).name: _version(tool) for tool in tools}
        kept = {"versions": versions, "kernels": [asdict(kernel) for kernel in kernels], "faults": faults}
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if faults else 0


def _version(tool: str) -> str:
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V[\d.]+", said)
    return found[0] if found else said.strip()


if __name__ == "__main__":
    sys.exit(main())
