"""The house rules that a reader relies on, read off the sources: who may include whom, how files begin and end.

    bnext/   networks (fusion -> fused_graph, equality -> conversion -> subclasses, fixed)
                     -> modules -> functional, sync -> the operators
             (reference stands beside them and knows NumPy only; attributes and torch_activations torch only)
    csrc/    library -> autograd, nodes, ops, phases, dense, calls, checks and whatever else is not below (tensors)
                     -> engine (devices) -> cpu/, cuda/ (loops)
                     -> plan, plan_cuda, dispatch, formulas, args, storage (plain)
    tests/   test files -> what they share, in files beside them that hold no test

An arrow points to what may be used; nothing points back, and nothing below the engine knows a tensor.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FOLDERS = ["bnext", "csrc", "tests", "benchmarks", "examples", "build_backend"]
SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
GENERATED = {ROOT / "bnext" / "_build_info.py"}
LONGEST = 300

PLAIN = {
    "storage.h",
    "activation.h",
    "args.h",
    "formulas.h",
    "dispatch.h",
    "plan.h",
    "plan.cpp",
    "plan_cuda.h",
    "plan_cuda.cpp",
    "plan_resident.cpp",
}
# All else beside the kernels' folders, but for the table of contents.
TENSOR_LEVEL = (
    {path.name for path in CSRC.iterdir() if path.suffix in {".h", ".cpp"}} - PLAIN - {"library.cpp"}
)
PRIMITIVES = {"primitives.cuh", "primitives_together.cuh"}
TORCH = re.compile(r"^(ATen|c10|torch|pybind11)/")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def code(path: Path) -> str:
    """The text without comments and strings."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', "", path.read_text(), flags=re.DOTALL)


def cxx(*names: str) -> list[Path]:
    return [CSRC / name for name in sorted(names)]


def in_cpu() -> list[Path]:
    return [path for path in SOURCES if path.parent == CSRC / "cpu"]


def in_cuda() -> list[Path]:
    return [path for path in SOURCES if path.parent == CSRC / "cuda"]


def imports(path: Path) -> set[str]:
    """Modules imported, those of bnext with a leading dot."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            found |= {dots + node.module} if node.module else {dots + alias.name for alias in node.names}
    return found


def test_there_is_something_to_read() -> None:
    names = {name_of(path) for path in SOURCES}
    assert {"bnext/modules.py", "csrc/ops.cpp", "csrc/cpu/rows.h", "tests/test_sources.py"} <= names
    assert {"rows.h", "folds_forward.h", "folds_backward.h"} <= {path.name for path in per_instruction_set()}


@pytest.mark.parametrize("path", sorted(set(SOURCES) - GENERATED), ids=name_of)
def test_a_file_begins_with_what_it_is_for_and_ends_in_time(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST, f"{len(lines)} lines"
    assert lines[0].startswith(('"""', "// ", "# ", "#!")), f"begins with {lines[0]!r}"
    assert not re.search(r"\b(TODO|FIXME|XXX)[:(]", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_say_something(path: Path) -> None:
    """A folder for everything is a place where nothing is found; a math.h on the include path hides the system's."""
    assert path.stem not in {"utils", "util", "common", "misc", "helpers"}
    assert path.name != "math.h"


@pytest.mark.parametrize("path", cxx(*PLAIN), ids=name_of)
def test_the_plain_layer_stands_alone(path: Path) -> None:
    """Host and device share it: standard headers and one another, nothing else."""
    for header in includes(path):
        assert header in PLAIN or re.fullmatch(r"c?[a-z_]+", header), f"includes {header}"
    assert not re.search(r"\b(at|c10|torch)::", code(path))


@pytest.mark.parametrize("path", in_cpu(), ids=name_of)
def test_kernels_see_no_tensor(path: Path) -> None:
    """Plain structs in, plain loops inside. The only header of torch is the one for threads, in one place."""
    torch_headers = [header for header in includes(path) if TORCH.match(header)]
    assert torch_headers == (["ATen/Parallel.h"] if path.name == "schedule.h" else [])
    assert not {header for header in includes(path) if header in TENSOR_LEVEL}
    assert not re.search(r"\bTensor\b|\b(c10|torch)::", code(path))
    assert set(re.findall(r"\bat::(\w+)", code(path))) <= {"parallel_for", "get_num_threads"}


def per_instruction_set() -> list[Path]:
    return [path for name in includes(CSRC / "cpu" / "tiles.inc") if (path := CSRC / "cpu" / name).exists()]


@pytest.mark.parametrize("path", per_instruction_set(), ids=name_of)
def test_what_is_compiled_for_one_instruction_set_is_not_shared(path: Path) -> None:
    """A standard function that was not inlined there would be the linker's choice for every machine."""
    assert set(re.findall(r"\bstd::(\w+)", code(path))) <= {"is_same_v", "conditional_t"}


@pytest.mark.parametrize("path", in_cuda(), ids=name_of)
def test_cuda_kernels_see_no_torch_and_name_the_machine_in_one_place(path: Path) -> None:
    """nvcc parses no header of torch; what only a GPU has goes by primitives, whose names the host has too."""
    own = (
        {"cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "model.h"}
        if path.name == "primitives.cuh"
        else set()
    )
    for header in includes(path):
        standard = re.fullmatch(r"[a-z_]+", header)
        assert standard or header in PLAIN | own or header.startswith("cuda/"), f"includes {header}"
    assert not re.search(r"\bTensor\b|\b(at|c10|torch)::", code(path))
    if path.name not in PRIMITIVES:
        assert not re.search(r"\b(threadIdx|blockIdx|blockDim|gridDim|__\w+)\b(?<!__CUDACC__)", code(path))


@pytest.mark.parametrize("path", cxx(*TENSOR_LEVEL), ids=name_of)
def test_the_tensor_level_computes_nothing(path: Path) -> None:
    """It checks, plans, allocates and launches: of an engine it knows the launcher and how memory is made."""
    for header in includes(path):
        assert header != "formulas.h"
        engine = header.startswith(("cpu/", "cuda/"))
        assert not engine or header in {"cpu/launch.h", "cpu/memory.h", "cuda/launch.h"}, f"includes {header}"


def test_operators_are_registered_in_one_file() -> None:
    registering = [
        path.name
        for path in SOURCES
        if path.suffix == ".cpp" and re.search(r"\b(TORCH_LIBRARY|PYBIND11_MODULE)", path.read_text())
    ]
    assert registering == ["library.cpp"]


@pytest.mark.parametrize(
    ("way", "where"),
    [("torch.ops.bnext", {"functional.py", "batching.py", "sync.py"}), ("_C.batch_norm", {"functional.py"})],
)
def test_few_python_files_call_the_operators(way: str, where: set[str]) -> None:
    """One the whole ones, one those for many examples, one their phases."""
    assert {path.name for path in (ROOT / "bnext").rglob("*.py") if way in path.read_text()} == where


# What each Python file of the package may import of the package. Files that are not listed are on top.
LOWER: dict[str, set[str]] = {
    "reference.py": set(),
    "reference_activations.py": {".reference"},
    "arguments.py": set(),
    "functional.py": {"._C", ".arguments", ".holding", ".inference"},
    "inference.py": {"._C", ".torch_activations"},
    "holding.py": set(),
    "freezing.py": {".arguments", ".modules"},
    "batching.py": {"._C"},
    "memory.py": {"._C"},
    "planning.py": {"._C", ".layouts"},
    "__main__.py": {".__version__", "._build_info", ".build_info", ".functional", ".reference"},
    "drawn_in.py": {".attributes", ".torch_activations"},
    "attributes.py": set(),
    "torch_activations.py": set(),
    "modules.py": {".arguments", ".drawn_in", ".functional", ".holding", ".sync"},
    "sync.py": {".layouts", ".sync_graph"},
    "layouts.py": set(),
    "sync_graph.py": {".torch_activations"},
    "networks/fusion.py": {
        "..attributes",
        "..holding",
        "..modules",
        ".conversion",
        ".equality",
        ".fused_forward",
        ".fused_graph",
        ".randomness",
        ".subclasses",
        ".tracing",
    },
    "networks/subclasses.py": {
        "..drawn_in",
        "..modules",
        ".fixed",
        ".formula",
        ".fused_forward",
        ".readers",
        ".tracing",
    },
    "networks/fixed.py": {"..drawn_in", "..functional", "..torch_activations", ".formula", ".fused_forward"},
    "networks/formula.py": {".readers", ".tracing"},
    "networks/readers.py": {"..attributes", "..torch_activations"},
    "networks/equality.py": {"..modules", ".fixed", ".fused_forward", ".randomness"},
    "networks/randomness.py": set(),
    "networks/fused_graph.py": {"..attributes", "..drawn_in", ".conversion", ".readers"},
    "networks/conversion.py": {
        "..arguments",
        "..attributes",
        "..drawn_in",
        "..modules",
        "..torch_activations",
        ".fixed",
        ".fused_forward",
        ".subclasses",
    },
    "networks/fused_forward.py": {"..attributes", ".tracing"},
    "networks/tracing.py": {"..attributes", "..drawn_in", ".randomness"},
}


def test_every_module_has_a_layer() -> None:
    """But for the table of contents, and the check of the build before it."""
    package = ROOT / "bnext"
    beside = {"__init__.py", "_build_check.py", "_build_info.py", "networks/__init__.py"}
    assert {path.relative_to(package).as_posix() for path in package.rglob("*.py")} - beside == set(LOWER)


@pytest.mark.parametrize("name", LOWER)
def test_python_layers_point_downwards(name: str) -> None:
    own = {module for module in imports(ROOT / "bnext" / name) if module.startswith((".", "bnext"))}
    assert own <= LOWER[name]


def test_no_test_file_is_imported() -> None:
    """What two of them need has a file of its own, with a name that says what it holds."""
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    importing = {
        name_of(path): found
        for path in SOURCES
        if path.suffix == ".py" and (found := tests & {module.split(".")[-1] for module in imports(path)})
    }
    assert tests and not importing


@pytest.mark.parametrize("name", ["reference.py", "reference_activations.py"])
def test_the_reference_knows_numpy_only(name: str) -> None:
    """It is what the kernels are judged by, so it shares nothing with them."""
    assert imports(ROOT / "bnext" / name) - LOWER[name] <= {
        "__future__",
        "collections.abc",
        "math",
        "typing",
        "numpy",
        "numpy.typing",
    }
