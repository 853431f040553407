"""PEP 517 backend: setuptools, made to see the torch that is already installed.

An extension has to be compiled against the torch that will load it. pip builds in an isolated environment
that hides the user's packages, and a torch named in `build-system.requires` would be another copy, of another
version perhaps. Inside that isolation the interpreter is still the user's, so `site` knows where their packages
are: those directories go to the end of `sys.path`, behind all that the isolated environment brings itself.
"""

import importlib.util
import site
import sys

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

NO_TORCH = (
    "bnext is compiled against the torch that is already installed, and {python} has none: run"
    " `pip install torch==2.13.0`, then this command again (an installer other than pip also needs"
    " --no-build-isolation)."
)


def user_site_directories() -> list[str]:
    """The package directories that this interpreter searches when it is not isolated."""
    directories = site.getsitepackages()  # of the prefixes in use: a virtual environment, its base, or both
    in_venv = sys.prefix != sys.base_prefix
    if not in_venv or sys.base_prefix in site.PREFIXES:  # the second: --system-site-packages
        directories.append(site.getusersitepackages())
    return directories


def find_torch() -> None:
    """Makes `import torch` work, or ends the build with one sentence that says what to do."""
    if importlib.util.find_spec("torch") is None:
        known = set(sys.path)
        for directory in user_site_directories():
            site.addsitedir(directory, known)
    if importlib.util.find_spec("torch") is None:
        sys.exit(NO_TORCH.format(python=sys.executable))


find_torch()
