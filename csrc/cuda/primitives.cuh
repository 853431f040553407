// Everything that kernels use of the machine they run on, under one set of names.
//
// nvcc compiles them for a GPU. Any other compiler takes the same kernels for the host: there model.h, which
// the tests bring, stands for the machine, and loads and stores are plain ones that a sanitizer sees.
#pragma once

#include <cstdint>
#include <type_traits>

#include "storage.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#define BNEXT_DEVICE __device__ __forceinline__
#define BNEXT_DEVICE_MEMORY __device__
#define BNEXT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define BNEXT_PARAMETER __grid_constant__
#define BNEXT_UNROLL _Pragma("unroll")
#define BNEXT_NO_UNROLL _Pragma("unroll 1")
#else
#include <algorithm>
#include <stdexcept>

#include "model.h"
#define BNEXT_DEVICE inline
#define BNEXT_KERNEL(threads, blocks) inline void
#define BNEXT_PARAMETER
#define BNEXT_UNROLL
#define BNEXT_NO_UNROLL
#endif

namespace bnext::cuda {

struct alignas(16) Vector16 {
  uint32_t word[4];
};

// Will somebody read these bytes again soon?
enum class Reuse : bool { no, yes };

#if defined(__CUDACC__)

BNEXT_DEVICE unsigned thread_index() { return threadIdx.x; }
BNEXT_DEVICE unsigned thread_count() { return blockDim.x; }
BNEXT_DEVICE unsigned block_index() { return blockIdx.x; }
BNEXT_DEVICE unsigned block_count() { return gridDim.x; }
BNEXT_DEVICE void sync_block() { __syncthreads(); }

// The memory that the threads of a block share, aligned for vectors.
BNEXT_DEVICE unsigned char* block_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The value of the lane whose number differs in the bits of mask; all lanes of the warp take part.
BNEXT_DEVICE double exchange(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The value. What follows from it is computed again rather than kept in registers from the last time.
BNEXT_DEVICE int64_t anew(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

template <Reuse kReuse>
BNEXT_DEVICE Vector16 load16(const void* p) {
  const uint4* from = static_cast<const uint4*>(p);
  const uint4 v = kReuse == Reuse::yes ? *from : __ldcs(from);
  return {{v.x, v.y, v.z, v.w}};
}

BNEXT_DEVICE void store16(void* p, const Vector16& v, Reuse reuse) {
  const uint4 u = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
  if (reuse == Reuse::yes) {
    __stwb(static_cast<uint4*>(p), u);  // an assignment may be split into four
  } else {
    __stcs(static_cast<uint4*>(p), u);
  }
}

// Into L2, for a load that comes later. p: of a tensor, of any alignment.
BNEXT_DEVICE void fetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What another block wrote: not from the cache of this multiprocessor.
BNEXT_DEVICE Vector16 load16_fresh(const void* p) {
  const uint4 v = __ldcg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

template <class T>
BNEXT_DEVICE void store(T* p, T value) {
  *p = value;
}

// Sets bits of a word that other threads set bits of meanwhile; the order does not matter.
BNEXT_DEVICE void set_bits(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

// Counts up by one, releases and acquires. True where that makes it `last`, which leaves it zero.
BNEXT_DEVICE bool count_to(unsigned* counter, unsigned last) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  const bool reached = before + 1 == last;
  if (reached) *counter = 0;
  return reached;
}

// Called by all threads of `expected` blocks: true in the block that comes last, which sees by load16_fresh
// all that the others wrote before. The counter is zero before the first and after the last. Thread 0
// counts for its block, between two barriers.
BNEXT_DEVICE bool last_to_arrive(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = count_to(counter, expected);
  __syncthreads();
  return last;
}

// A kernel that is launched to begin early (see launch()) may do so when all blocks of the one before it have
// said the first, and sees what that kernel wrote only after the second: by every thread that reads any of
// it, or writes what that kernel reads. So the first is for those alone that such a kernel of ours follows:
// others on the stream may begin early too, and wait for nothing of this.
BNEXT_DEVICE void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
BNEXT_DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#else

using model::block_count;
using model::block_index;
using model::last_to_arrive;
using model::let_next_begin;
using model::sync_block;
using model::thread_count;
using model::thread_index;
using model::wait_for_previous;

inline unsigned char* block_memory() { return reinterpret_cast<unsigned char*>(model::block_memory()); }

inline double exchange(double value, int mask) {
  return bits_as<double>(model::exchange(bits_as<uint64_t>(value), (thread_index() % 32) ^ mask));
}

inline int64_t anew(int64_t value) { return value; }

template <class T>
T& aligned_at(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) throw std::runtime_error("misaligned access");
  return *static_cast<T*>(const_cast<void*>(p));
}

template <Reuse>
Vector16 load16(const void* p) {
  return aligned_at<Vector16>(p);
}

inline void store16(void* p, const Vector16& v, Reuse) { aligned_at<Vector16>(model::displaced(p)) = v; }
inline void fetch(const void*) {}

inline Vector16 load16_fresh(const void* p) { return aligned_at<Vector16>(p); }

template <class T>
void store(T* p, T value) {
  aligned_at<T>(model::displaced(p)) = value;
}

inline void set_bits(uint32_t* word, uint32_t bits) {
  model::set_bits(&aligned_at<uint32_t>(model::displaced(word)), bits);
}

#endif

BNEXT_DEVICE int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

BNEXT_DEVICE float widen_half(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  return widen_f16<float>(bits);
#endif
}

BNEXT_DEVICE uint32_t narrow_to(float value, f16) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  return narrow_f16<uint32_t>(value);
#endif
}

BNEXT_DEVICE uint32_t narrow_to(float value, bf16) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  return narrow_bf16<uint32_t>(value);
#endif
}

}  // namespace bnext::cuda
