"""The report on CUDA kernels sees what it must: `make kernels` runs it on ours, here it reads kernels with faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build_backend import nvcc

kernels = pytest.importorskip(
    "benchmarks.kernels", reason="rich is in the bench extra: make lint installs it"
)
sass = pytest.importorskip("benchmarks.sass")

SNIPPETS = """
// 16 bytes at a time, in a loop.
template <class T>
__global__ void wide_kernel(const float4* x, float4* y, T scale, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float4 v = x[i];
    v.x *= scale;
    y[i] = v;
  }
}
template __global__ void wide_kernel<float>(const float4*, float4*, float, int);

namespace bnext::cuda {
namespace {
struct Parameters { const float* x; float* y; int n; };
__global__ void scalar_kernel(Parameters p) {
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) p.y[i] = 2 * p.x[i];
}
}
void* scalar() { return reinterpret_cast<void*>(scalar_kernel); }
}

// The loads are wide, but the loop has none of them.
__global__ void outside_kernel(const float4* x, float* y, int n) {
  const float4 v = x[threadIdx.x];
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = v.x * y[i] + v.y + v.z + v.w;
}

// 1024 threads twice to a multiprocessor leave 32 registers, and 16 vectors are alive.
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float4* x, float4* y, int n) {
  float4 v[16];
  for (int i = threadIdx.x; i < n; i += 16 * blockDim.x) {
#pragma unroll
    for (int k = 0; k < 16; ++k) v[k] = x[i + k * blockDim.x];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 16; ++k) y[i + k * blockDim.x] = v[15 - k];
  }
}

// An array with an index that is not known stands in memory.
__global__ void array_kernel(const float4* x, float4* y, const int* where, int n) {
  float4 v[8];
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    v[where[i] & 7] = x[i];
    y[i] = v[where[n - i] & 7];
  }
}
"""


@pytest.fixture(scope="module")
def toolkit() -> nvcc.Toolkit:
    try:
        for tool in ("cuobjdump", "nvdisasm"):
            kernels.find_tool(tool)
        return kernels.find_toolkit(["9.0"])
    except kernels.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def compiled(toolkit: nvcc.Toolkit, tmp_path_factory: pytest.TempPathFactory) -> list[nvcc.Compiled]:
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "snippets.cu"
    source.write_text(SNIPPETS)
    compiled = toolkit.compile([source], folder)
    assert kernels.complaints(compiled) == []
    return compiled


@pytest.fixture(scope="module")
def examined(compiled: list[nvcc.Compiled]) -> dict[str, kernels.Kernel]:
    return {kernel.name: kernel for kernel in kernels.examine_all(compiled)}


def test_every_kernel_has_its_name(examined: dict[str, kernels.Kernel]) -> None:
    others = {"scalar_kernel", "outside_kernel", "spilling_kernel", "array_kernel"}
    assert set(examined) == {"wide_kernel<float>"} | others


def test_a_good_kernel_has_no_fault(examined: dict[str, kernels.Kernel]) -> None:
    kernel = examined["wide_kernel<float>"]
    assert kernel.faults() == []
    assert 0 < kernel.registers <= 64
    assert kernel.loop_loads >= 1 and kernel.wide_stores >= 1
    assert kernel.loop_loads <= kernel.wide_loads
    assert kernel.loop_loads < kernel.loop_instructions < kernel.instructions


@pytest.mark.parametrize(
    ("name", "complaints"),
    [
        ("scalar_kernel", ["no 16 bytes"]),
        ("outside_kernel", ["no 16 bytes"]),
        ("spilling_kernel", ["stack frame", "local memory"]),
        ("array_kernel", ["stack frame", "local memory"]),
    ],
)
def test_faults_are_reported(examined: dict[str, kernels.Kernel], name: str, complaints: list[str]) -> None:
    faults = examined[name].faults()
    assert len(faults) == len(complaints), faults
    for fault, complaint in zip(faults, complaints, strict=True):
        assert fault.startswith(f"{name} for 9.0 ") and complaint in fault


def test_a_file_without_kernels_has_none(toolkit: nvcc.Toolkit, tmp_path: Path) -> None:
    source = tmp_path / "empty.cu"
    source.write_text("int host() { return 1; }\n")
    assert kernels.examine_all(toolkit.compile([source], tmp_path)) == []


def test_some_instructions_tell_of_all(compiled: list[nvcc.Compiled], tmp_path: Path) -> None:
    """What is recognized is what nvdisasm says when it is asked about every instruction."""
    (file,) = kernels.cubins(compiled, tmp_path)["9.0"]
    words = np.concatenate(list(sass.sections(file.read_bytes()).values()))
    asked = []

    def disassemble(some: np.ndarray) -> str:
        asked.append(len(some))
        return kernels.disassemble("9.0", some)

    code = sass.recognize(words, disassemble)
    assert (code == sass.parse(kernels.disassemble("9.0", words))).all()
    assert code["wide_load"].any() and code["local"].any() and not code["goes_on"].all()
    assert all(count < len(words) for count in asked)


def test_a_warning_is_a_fault(toolkit: nvcc.Toolkit, tmp_path: Path) -> None:
    source = tmp_path / "warning.cu"
    source.write_text("__global__ void unused_kernel(int* y) { int unused = 1; *y = 2; }\n")
    compiled = toolkit.compile([source], tmp_path)
    (fault,) = kernels.complaints(compiled)
    assert fault.startswith("warning.cu ") and "unused" in fault
    kept = toolkit.compile([source], tmp_path)
    assert kernels.complaints(kept) == [fault]


def test_an_error_ends_the_compilation(toolkit: nvcc.Toolkit, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong_kernel(int* y) { *y = unknown; }\n")
    with pytest.raises(nvcc.CompilationFailed, match=r"wrong\.cu"):
        toolkit.compile([source], tmp_path)


LISTING = """
	.headerflags	@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*1000000*/                   S2R R0, SR_TID.X ;
        /*1000010*/               @P0 EXIT ;
        /*1000020*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*1000030*/                   LDG.E.128.SYS R8, [R2] ;
        /*1000040*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*1000050*/                   BRA.U UP0, 0x1000040 ;
        /*1000060*/              @!P1 BRA 0x1000090 ;
        /*1000070*/               @P0 BRA 0x1000020 ;
        /*1000080*/                   EXIT ;
        /*1000090*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*10000a0*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*10000b0*/                   BRA 0x1000070 ;
        /*10000c0*/                   BRA 0x10000c0;
        /*10000d0*/                   NOP;
"""


def test_a_loop_is_its_own_instructions() -> None:
    """Without loops inside it; with a part that stands elsewhere, whose way back is no loop of its own."""
    code = sass.parse(LISTING)
    own = sorted(sorted(i for run in loop for i in run) for loop in sass.loops(code))
    assert own == [[2, 3, 6, 7, 9, 10, 11], [4, 5], [12]]
    kernel = kernels.Kernel("outer_kernel", "9.0")
    kernels.read(kernel, code)
    assert (kernel.wide_loads, kernel.wide_stores, kernel.local, kernel.instructions) == (3, 1, 0, 13)
    assert (kernel.loop_loads, kernel.loop_instructions) == (2, 7)


def printed(*texts: str) -> str:
    return "".join(f"        /*{sass.SIZE * i:04x}*/  {text} ;\n" for i, text in enumerate(texts))


def test_a_width_among_the_registers_is_noticed() -> None:
    """Of instructions that count as alike two are read, and have to say the same."""
    words = np.array([[1 << 16, 0], [2 << 16, 0], [3 << 16, 0]], "<u8")
    same = sass.recognize(words, lambda some: printed(*(f"LDG.E.128 R{i}, [R4]" for i in range(len(some)))))
    assert same["wide_load"].tolist() == [True] * 3
    with pytest.raises(ValueError, match="of two kinds"):
        sass.recognize(words, lambda some: printed("LDG.E.128 R1, [R4]", "LDG.E.64 R3, [R4]"))
    with pytest.raises(ValueError, match="of 2 instructions 1 were"):
        sass.recognize(words, lambda some: printed("LDG.E.128 R1, [R4]"))
