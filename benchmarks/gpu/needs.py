"""What a machine must have for `make gpu`, asked before anything is built or imported that could be missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from build_backend import nvcc

OLDEST_TORCH = (2, 11)


def cuda_tool(name: str) -> str | None:
    """The path of one of the toolkit's programs: under CUDA_HOME, on PATH, or beside nvcc."""
    found = nvcc.find(name)
    if found is None and (compiler := nvcc.find()) is not None:
        found = shutil.which(name, path=os.pathsep.join(_folders(compiler)))
    return found


def _folders(compiler: str) -> list[str]:
    """That of nvcc, and of the toolkit that it says it belongs to, for nvcc may be a script."""
    dry = subprocess.run([compiler, "--dryrun", "-c", "any.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
    return [str(Path(compiler).resolve().parent), *([str(Path(top[1].strip()) / "bin")] if top else [])]


def _torch_is_missing() -> str | None:
    try:
        import torch
    except ImportError:
        return "it has no torch"
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < OLDEST_TORCH:
        return f"its torch is {torch.__version__}"
    if torch.version.cuda is None:
        return f"its torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def missing() -> str | None:
    """One sentence, or None where everything is there."""
    what = _torch_is_missing() or (None if cuda_tool("nvcc") else nvcc.MISSING)
    if what is None:
        return None
    return (
        "make gpu needs an NVIDIA GPU, nvcc, and a CUDA build of torch "
        f"{'.'.join(map(str, OLDEST_TORCH))} or newer in PYTHON, but {what}."
    )


def capability() -> str:
    """Of the first GPU, as TORCH_CUDA_ARCH_LIST has it."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"


def file_name(device_name: str) -> str:
    """Of the results on a device, without suffix: NVIDIA H200 gives gpu_nvidia_h200."""
    return "gpu_" + re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
