"""Compiles csrc/cuda with nvcc, for setup.py and for the kernel report.

torch's CUDAExtension wants a torch that was itself built for CUDA. The kernels know no torch: nvcc alone makes their
objects, which link with the static CUDA runtime into the same extension beside any torch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = "csrc/cuda/*.cu"
FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Icsrc",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
]
# Turing to Blackwell, as far as the nvcc at hand knows them. PTX of the newest is for GPUs yet to come.
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
# From which one's PTX another is assembled, where the kernels make no difference between the two: PTX is half the work.
ASSEMBLED_FROM = {"8.6": "8.0", "8.9": "8.0", "12.0": "10.0"}
WISHES = "TORCH_CUDA_ARCH_LIST"
# The runtime's names stay inside the extension: a CUDA build of torch brings another runtime, for everybody to see.
RUNTIME = ["-lcudart_static", "-ldl", "-lpthread", "-lrt", "-Wl,--exclude-libs,libcudart_static.a"]


def find() -> str | None:
    """The nvcc of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def jobs() -> int:
    """Processes at a time: MAX_JOBS, as for torch's own builds, else one to a core."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def real(architecture: str) -> str:
    """What nvcc calls its machine code: sm_90 is that of 9.0."""
    return f"sm_{architecture.removesuffix('+PTX').replace('.', '')}"


def virtual(architecture: str) -> str:
    """What nvcc calls the PTX that its machine code is made from: compute_90 is that of 9.0."""
    name = architecture.removesuffix("+PTX")
    return f"compute_{ASSEMBLED_FROM.get(name, name).replace('.', '')}"


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    architectures: Sequence[str]  # 9.0 or 9.0+PTX
    include: Sequence[str]  # directories, for a C++ compiler
    link: Sequence[str]  # flags, for a C++ compiler

    def compile(self, folder: Path) -> list[str]:
        """The objects in `folder`. Compiled again is what has another command, source or header than last time."""
        folder.mkdir(parents=True, exist_ok=True)
        command = [self.nvcc, *FLAGS, *map(_generate, self.architectures), "-c"]
        objects = {source: folder / f"{source.name}.o" for source in sorted(Path().glob(SOURCES))}
        stale = [source for source, target in objects.items() if not _is_current(target, command)]
        workers = max(1, min(len(stale), jobs()))
        threads = jobs()  # of one nvcc, each an architecture: for the longest file, when the others are done
        if stale:
            print(f"nvcc compiles {', '.join(map(str, stale))}", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            done = pool.map(lambda source: _compile(command, threads, source, objects[source]), stale)
            failed = [str(source) for source, good in zip(stale, done, strict=True) if not good]
        if failed:
            sys.exit(f"nvcc failed on {', '.join(failed)}; BNEXT_CUDA=0 builds without the CUDA kernels.")
        return [str(target) for target in objects.values()]


def toolkit() -> Toolkit:
    """That of the nvcc found. It may be a link or a script, so it is asked where its headers and libraries are."""
    nvcc = find()
    if nvcc is None:
        raise FileNotFoundError("nvcc is neither under CUDA_HOME nor on PATH")
    told = _output(nvcc, "--dryrun", "-c", "any.cu")

    def directories(variable: str, flag: str) -> list[str]:
        line = re.search(rf"^#\$ {variable}=(.*)$", told, re.MULTILINE)
        words = shlex.split(line[1]) if line else []
        return [os.path.realpath(word[len(flag) :]) for word in words if word.startswith(flag)]

    libraries = [f"-L{directory}" for directory in directories("LIBRARIES", "-L")]
    return Toolkit(nvcc, _architectures(nvcc), directories("INCLUDES", "-I"), [*libraries, *RUNTIME])


def _architectures(nvcc: str) -> list[str]:
    """Those of TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", or with spaces), else the default ones."""
    if wished := os.environ.get(WISHES, "").replace(";", " ").split():
        for name in wished:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                sys.exit(f"{WISHES} is a list of numbers such as 9.0 or 9.0+PTX, and {name!r} is none.")
        return wished
    known = _output(nvcc, "--list-gpu-code").split()
    default = [name for name in ARCHITECTURES if real(name) in known]
    return [*default[:-1], f"{default[-1]}+PTX"]


def _generate(architecture: str) -> str:
    ptx, code = virtual(architecture), real(architecture)
    return f"-gencode=arch={ptx},code=" + (f"[{code},{ptx}]" if architecture.endswith("+PTX") else code)


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _compile(command: Sequence[str], threads: int, source: Path, target: Path) -> bool:
    stamp, rule = target.with_suffix(".command"), target.with_suffix(".d")
    stamp.unlink(missing_ok=True)
    begun = time.time()
    outputs = ["-MD", "-MF", str(rule), "-o", str(target), str(source)]
    if subprocess.run([*command, f"--threads={threads}", *outputs]).returncode != 0:
        return False
    os.utime(target, (begun, begun))  # what is edited meanwhile counts as newer
    stamp.write_text(shlex.join(command))
    return True


def _is_current(target: Path, command: Sequence[str]) -> bool:
    try:
        if target.with_suffix(".command").read_text() != shlex.join(command):
            return False
        rule = target.with_suffix(".d").read_text().replace("\\\n", " ")
        used = shlex.split(rule.split(" : ", 1)[1])
        return max(os.stat(path).st_mtime for path in used) < target.stat().st_mtime
    except (OSError, IndexError, ValueError):  # something is missing
        return False
