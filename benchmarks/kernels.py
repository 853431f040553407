"""What the compiler made of the CUDA kernels: registers, stack and the width of their loads, without a GPU.

    python -m benchmarks.kernels                         those that setup.py builds: for every architecture
    python -m benchmarks.kernels --arch 9.0 --json report.json

Reads the objects of the last build, and makes those that are missing. Needs nvcc, and cuobjdump and nvdisasm of the
`bench` extra. The exit code is 1 if a kernel uses local memory, as spilled registers do, or loads no 16 bytes at a time
in any of its loops, or if nvcc had anything to say, a warning perhaps.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import sass
from build_backend import nvcc

ROOT = Path(__file__).resolve().parents[1]
MINIMUM_WIDTH = 150  # columns, where output goes to a file


class Unavailable(RuntimeError):
    """A tool is missing, and how to get it."""


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = 0
    stack: int = 0  # bytes, spilled registers among them
    shared: int = 0  # bytes
    instructions: int = 0
    wide_loads: int = (
        0  # instructions that load 16 bytes or more of global memory, to registers or shared memory
    )
    wide_stores: int = 0
    local: int = 0  # instructions that access local memory
    loop_instructions: int = 0  # of the loop with the most wide loads, without loops inside it
    loop_loads: int = 0  # its wide loads

    def faults(self) -> list[str]:
        found = {
            f"has a stack frame of {self.stack} bytes": self.stack,
            f"accesses local memory in {self.local} instructions": self.local,
            "loads no 16 bytes at a time in any loop": not self.loop_loads,
        }
        return [f"{self.name} for {self.architecture} {fault}" for fault, is_so in found.items() if is_so]


@functools.cache
def find_tool(name: str) -> str:
    """The one on PATH, else that of the package."""
    if found := shutil.which(name):
        return found
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return str(file.locate())
    raise Unavailable(f"{name} is not on PATH: pip install '.[bench]' brings it")


def find_toolkit(architectures: Sequence[str] | None) -> nvcc.Toolkit:
    try:
        return nvcc.toolkit(architectures)
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from None


def read(kernel: Kernel, code: np.ndarray) -> None:
    """What the instructions say."""
    wide = np.append(0, np.cumsum(code["wide_load"])).tolist()  # before each instruction, and in all
    kernel.instructions = int(np.sum(~code["padding"]))
    kernel.wide_loads = wide[-1]
    kernel.wide_stores = int(np.sum(code["wide_store"]))
    kernel.local = int(np.sum(code["local"]))
    loops = [
        (sum(wide[run.stop] - wide[run.start] for run in loop), sum(map(len, loop)))
        for loop in sass.loops(code)
    ]
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


def _said(*command: str, folder: Path | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def complaints(compiled: Iterable[nvcc.Compiled]) -> list[str]:
    """What nvcc said, where it said anything."""
    texts = {one.source.name: one.said.read_text().strip() for one in compiled}
    return [f"{name} does not compile in silence:\n{text}" for name, text in texts.items() if text]


def cubins(compiled: Iterable[nvcc.Compiled], folder: Path) -> dict[str, list[Path]]:
    """The machine code out of the objects, by architecture: a file for each source."""
    for one in compiled:
        _said(find_tool("cuobjdump"), "-xelf", "all", str(one.target), folder=folder)
    by_architecture: dict[str, list[Path]] = {}
    for cubin in sorted(folder.glob("*.cubin")):
        found = re.search(r"\.sm_(\d+)(\d[af]?)\.cubin$", cubin.name)
        assert found, f"cuobjdump named a file {cubin.name}"
        by_architecture.setdefault(".".join(found.groups()), []).append(cubin)
    return by_architecture


def disassemble(architecture: str, words: np.ndarray) -> str:
    """What nvdisasm prints for instructions in a row, as if they were a kernel."""
    with NamedTemporaryFile() as file:
        file.write(words.tobytes())
        file.flush()
        where = ["--binary", f"SM{architecture.replace('.', '')}", "--base-address", str(sass.ORIGIN)]
        return _said(find_tool("nvdisasm"), "--no-dataflow", *where, file.name)


def examine(architecture: str, files: Sequence[Path]) -> dict[Path, list[Kernel]]:
    """Every kernel of an architecture, by file of machine code."""
    sections = {
        (file, name): words for file in files for name, words in sass.sections(file.read_bytes()).items()
    }
    if not sections:
        return {}
    code = sass.recognize(
        np.concatenate(list(sections.values())), functools.partial(disassemble, architecture)
    )
    ends = np.cumsum([len(words) for words in sections.values()])
    codes = dict(zip(sections, np.split(code, ends[:-1]), strict=True))
    by_file = {}
    for file in files:
        used = re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
            _said(find_tool("cuobjdump"), "-res-usage", str(file)),
        )
        kernels = []
        for (mangled, *numbers), name in zip(used, short_names([one[0] for one in used]), strict=True):
            registers, stack, shared = map(int, numbers)
            kernel = Kernel(name, architecture, registers, stack, shared)
            read(kernel, codes[file, mangled])
            kernels.append(kernel)
        by_file[file] = sorted(kernels, key=lambda kernel: kernel.name)
    return by_file


def examine_all(compiled: Sequence[nvcc.Compiled]) -> list[Kernel]:
    with TemporaryDirectory() as folder, ProcessPoolExecutor(nvcc.jobs()) as pool:
        files = cubins(compiled, Path(folder))
        running = pool.map(examine, files.keys(), files.values())
        done = track(running, "reading", total=len(files), console=Console(stderr=True))
        by_file = {file: kernels for part in done for file, kernels in part.items()}
    return [kernel for file in sorted(by_file) for kernel in by_file[file]]


def show(kernels: Sequence[Kernel], console: Console) -> None:
    titles = [
        "arch",
        "registers",
        "stack",
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
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, float(kernel.architecture.rstrip("af")))):
        if shown and kernel.name != shown:
            table.add_section()
        numbers = [kernel.registers, kernel.stack, kernel.shared]
        numbers += [kernel.wide_loads, kernel.wide_stores, kernel.instructions]
        loop = f"{kernel.loop_instructions} with {kernel.loop_loads} loads"
        name = kernel.name if kernel.name != shown else ""
        style = "red" if kernel.faults() else None
        table.add_row(name, kernel.architecture, *map(str, numbers), loop, style=style)
        shown = kernel.name
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", help=f"default: as setup.py, {' '.join(nvcc.ARCHITECTURES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything that was read")
    options = parser.parse_args(arguments)
    try:
        toolkit = find_toolkit(options.arch)
        tools = [toolkit.nvcc, find_tool("cuobjdump"), find_tool("nvdisasm")]
        compiled = toolkit.compile()
    except Unavailable as reason:
        parser.error(str(reason))
    except nvcc.CompilationFailed as failure:
        sys.exit(str(failure))

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, MINIMUM_WIDTH)
    faults = complaints(compiled)
    kernels = examine_all(compiled)
    wanted = {name.removesuffix("+PTX") for name in toolkit.architectures}
    missing = sorted(wanted - {kernel.architecture for kernel in kernels})
    faults += [f"no kernel in {nvcc.SOURCES} was compiled for {name}" for name in missing]
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
