"""Compiles csrc/ into bnext._C against the installed torch. All that is not compilation is in pyproject.toml."""

import os
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from build_backend import nvcc

COMPILE = [
    "-O3",
    "-std=c++20",
    "-fno-trapping-math",  # without it GCC does not vectorise a select
    "-fno-math-errno",
    "-fopenmp",  # without it at::parallel_for runs on one thread, silently
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors are passed between inlined functions only
    "-Wno-maybe-uninitialized",  # GCC 12 takes its own AVX-512 intrinsics for uninitialised
    "-g0",  # Python's own flags may say -g: objects ten times the size
]
LINK = ["-fopenmp"]


def cuda_decision() -> tuple[bool, str]:
    """Whether the CUDA kernels are built, and why: if there is an nvcc (a GPU is not asked), or as BNEXT_CUDA says."""
    wish = os.environ.get("BNEXT_CUDA", "")
    if wish == "0":
        build, reason = False, "switched off by BNEXT_CUDA=0"
    elif nvcc.find():
        build, reason = True, "nvcc was found"
    else:
        build, reason = False, nvcc.MISSING
    if wish == "1" and not build:
        sys.exit(f"BNEXT_CUDA=1 asks for the CUDA kernels, but {reason}.")
    return build, reason


# Editable builds get a new temporary directory each time, where ninja would find nothing to keep.
OBJECTS = Path("build", f"objects.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")


def write_config(header: Path) -> None:
    """What was decided on CUDA, for the few files that ask: another decision compiles only these again."""
    decisions = {"CUDA": int(cuda), "TORCH_CUDA": int(torch_cuda), "CUDA_REASON": f'"{cuda_reason}"'}
    text = "".join(f"#define BNEXT_{name} {value}\n" for name, value in decisions.items())
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


class BuildAndRecord(BuildExtension):
    """Builds where the next build finds its objects again, and notes the torch it built against."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(OBJECTS)

    def build_extensions(self) -> None:
        write_config(OBJECTS / "build_config.h")
        if toolkit:
            try:
                objects = [str(one.target) for one in toolkit.compile()]
            except nvcc.CompilationFailed as failure:
                sys.exit(f"{failure}; BNEXT_CUDA=0 builds without the CUDA kernels.")
            for extension in self.extensions:
                extension.extra_objects += objects
                extension.depends += objects
        super().build_extensions()

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("bnext._C")).parent  # the wheel's, or if editable the sources'
        record = f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
        (package / "_build_info.py").write_text(record)


cuda, cuda_reason = cuda_decision()
toolkit = nvcc.toolkit() if cuda else None
decided = f"yes, {cuda_reason}, for {' '.join(toolkit.architectures)}" if toolkit else f"no, {cuda_reason}"
print(f"bnext: torch {torch.__version__}, CUDA kernels: {decided}")
torch_cuda = cuda and torch.version.cuda is not None  # otherwise torch's headers for CUDA are incomplete

setup(
    install_requires=[f"torch=={torch.__version__.split('+')[0]}", "numpy"],
    ext_modules=[
        CppExtension(
            "bnext._C",
            sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            include_dirs=[
                str(Path("csrc").resolve()),
                str(OBJECTS.resolve()),
                *(toolkit.include if toolkit and torch_cuda else []),
            ],
            # Makes ninja compile again for another torch: another command line.
            define_macros=[("BNEXT_TORCH_VERSION", f'"{torch.__version__}"')],
            extra_compile_args=COMPILE,
            extra_link_args=[*LINK, *(toolkit.link if toolkit else [])],
            libraries=["c10_cuda"] * torch_cuda,
        )
    ],
    cmdclass={"build_ext": BuildAndRecord},
)
