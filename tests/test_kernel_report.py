"""The report on CUDA kernels sees what it must: `make kernels` runs it on ours, here it reads kernels with faults."""

from __future__ import annotations

from pathlib import Path

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
def examined(toolkit: nvcc.Toolkit, tmp_path_factory: pytest.TempPathFactory) -> dict[str, kernels.Kernel]:
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "snippets.cu"
    source.write_text(SNIPPETS)
    compiled = toolkit.compile([source], folder)
    assert kernels.complaints(compiled) == []
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


def test_an_exempt_kernel_needs_a_reason(
    examined: dict[str, kernels.Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(kernels.EXEMPT.values())
    monkeypatch.setitem(kernels.EXEMPT, "scalar_kernel", "it is a test")
    assert examined["scalar_kernel"].faults() == []


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
	.section	.text.outer_kernel,"ax",@progbits
.text.outer_kernel:
outer_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128.SYS R8, [R2] ;
.L_x_1:
        /*0040*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0050*/                   BRA.U UP0, `(.L_x_1) ;
        /*0060*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*00b0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
        /*00d0*/                   NOP;
"""


def test_a_loop_is_its_own_instructions() -> None:
    """Without loops inside it; with a part that stands elsewhere, whose way back is no loop of its own."""
    (code,) = sass.codes(LISTING).values()
    own = sorted(sorted(loop) for loop in code.loops())
    assert own == [[2, 3, 6, 7, 9, 10, 11], [4, 5], [12]]
    kernel = kernels.Kernel("outer_kernel", "9.0")
    kernels.read(kernel, code)
    assert (kernel.wide_loads, kernel.wide_stores, kernel.local, kernel.instructions) == (3, 1, 0, 13)
    assert (kernel.loop_loads, kernel.loop_instructions) == (2, 7)
