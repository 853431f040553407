"""The check that runs before the extension is loaded: there is a build, and it is one for this torch.

An extension that was compiled against another torch fails with a missing symbol at best and crashes at worst,
so the versions are compared first. Every message names the command that mends it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent
_IN_SOURCES = (_ROOT / "setup.py").is_file()


def _install(options: str = "") -> str:
    """The command that builds again: in place for a source tree, else from wherever the sources are."""
    if _IN_SOURCES:
        return f"run `pip install {options}-e .` in {_ROOT}"
    return f"run `pip install {options}.` in bnext's source tree"


def require_same_torch(built: str, running: str) -> None:
    """Raises ImportError unless bnext was built against the torch that is running."""
    if built != running:
        raise ImportError(
            f"bnext was built against torch {built}, but torch {running} is running:"
            f" {_install('--force-reinstall --no-deps ')}"
        )


def require_build() -> None:
    """Raises ImportError unless the extension is there and was built against the torch that is running."""
    if find_spec("bnext._build_info") is None or find_spec("bnext._C") is None:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        remedy = _install()
        if _IN_SOURCES:
            remedy += "; if bnext is installed already, start Python from another directory"
        raise ImportError(f"bnext has no compiled part for Python {python} in {_ROOT}: {remedy}")
    from ._build_info import TORCH_VERSION

    require_same_torch(TORCH_VERSION, str(torch.__version__))
