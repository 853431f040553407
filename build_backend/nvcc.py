"""Compiles csrc/cuda with nvcc, for setup.py and for the kernel report.

torch's CUDAExtension wants a torch that was itself built for CUDA. The kernels know no torch: nvcc alone makes their
objects, which link with the static CUDA runtime into the same extension beside any torch. For the same reason they
serve every Python and torch, and the report reads the very objects that were linked.
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

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "csrc/cuda/*.cu"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",  # what is rounded once says so in the source: the same bits for every architecture, and on the host
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


MISSING = "nvcc is neither under CUDA_HOME nor on PATH"


def find(program: str = "nvcc") -> str | None:
    """That of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which(program, path=os.path.join(home, "bin"))) or shutil.which(program)


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


class CompilationFailed(RuntimeError):
    """On which files; nvcc has said the rest."""


@dataclass(frozen=True)
class Compiled:
    source: Path
    target: Path  # its object

    @property
    def said(self) -> Path:
        """What nvcc said, nothing if all was well."""
        return self.target.with_suffix(".log")


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    architectures: Sequence[str]  # 9.0 or 9.0+PTX
    include: Sequence[str]  # directories, for a C++ compiler
    link: Sequence[str]  # flags, for a C++ compiler

    def compile(self, sources: Sequence[Path] | None = None, folder: Path | None = None) -> list[Compiled]:
        """Those of csrc/cuda, in a folder of their own for each list of architectures, or `sources` in `folder`.

        Compiled again is what has another command, source or header than last time.
        """
        sources = sorted(ROOT.glob(SOURCES)) if sources is None else sources
        folder = folder or ROOT / "build" / "kernels" / "_".join(self.architectures)
        folder.mkdir(parents=True, exist_ok=True)
        command = [self.nvcc, *FLAGS, *map(_generate, self.architectures), "-c"]
        compiled = [Compiled(source, folder / f"{source.name}.o") for source in sources]
        stale = [one for one in compiled if not _is_current(one.target, command)]
        workers = max(1, min(len(stale), jobs()))
        threads = jobs()  # of one nvcc, each an architecture: for the longest file, when the others are done
        if stale:
            names = ", ".join(one.source.name for one in stale)
            print(f"nvcc compiles {names} for {' '.join(self.architectures)}", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            done = pool.map(lambda one: _compile(command, threads, one), stale)
            failed = [one.source.name for one, good in zip(stale, done, strict=True) if not good]
        if failed:
            raise CompilationFailed(f"nvcc failed on {', '.join(failed)}")
        return compiled


def toolkit(architectures: Sequence[str] | None = None) -> Toolkit:
    """That of the nvcc found, for these architectures, else those of TORCH_CUDA_ARCH_LIST, else all.

    What was found may be a link or a script, so it is asked where its headers and libraries are.
    """
    nvcc = find()
    if nvcc is None:
        raise FileNotFoundError(MISSING)
    told = _output(nvcc, "--dryrun", "-c", "any.cu")

    def directories(variable: str, flag: str) -> list[str]:
        line = re.search(rf"^#\$ {variable}=(.*)$", told, re.MULTILINE)
        words = shlex.split(line[1]) if line else []
        return [os.path.realpath(word[len(flag) :]) for word in words if word.startswith(flag)]

    libraries = [f"-L{directory}" for directory in directories("LIBRARIES", "-L")]
    listed = os.environ.get(WISHES, "").replace(";", " ").split()  # 8.0;9.0+PTX, or with spaces
    wished = architectures or listed
    for name in wished:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(f"architectures ({WISHES}) are numbers such as 9.0 or 9.0+PTX, and {name!r} is none.")
    chosen = wished or _known(nvcc)
    return Toolkit(nvcc, chosen, directories("INCLUDES", "-I"), [*libraries, *RUNTIME])


def _known(nvcc: str) -> list[str]:
    known = _output(nvcc, "--list-gpu-code").split()
    default = [name for name in ARCHITECTURES if real(name) in known]
    return [*default[:-1], f"{default[-1]}+PTX"]


def _generate(architecture: str) -> str:
    ptx, code = virtual(architecture), real(architecture)
    return f"-gencode=arch={ptx},code=" + (f"[{code},{ptx}]" if architecture.endswith("+PTX") else code)


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _compile(command: Sequence[str], threads: int, one: Compiled) -> bool:
    target = one.target
    stamp, rule = target.with_suffix(".command"), target.with_suffix(".d")
    stamp.unlink(missing_ok=True)
    begun = time.time()
    outputs = ["-MD", "-MF", str(rule), "-o", str(target), str(one.source)]
    done = subprocess.run(
        [*command, f"--threads={threads}", *outputs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    one.said.write_text(done.stdout)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
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
        return max(os.stat(ROOT / path).st_mtime for path in used) < target.stat().st_mtime
    except (OSError, IndexError, ValueError):  # something is missing
        return False
