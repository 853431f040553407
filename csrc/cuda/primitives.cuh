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

// What another block wrote: not from the cache of this multiprocessor.
// Into L2, for a load that comes later. p: of a tensor, of any alignment.
BNEXT_DEVICE void fetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

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

// Called by all threads of `expected` blocks: true in the block that comes last, which sees by load16_fresh
// all that the others wrote before. The counter is zero before the first and after the last. Thread 0
// releases and acquires for its block, between two barriers.
BNEXT_DEVICE bool last_to_arrive(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    last = before == expected - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

#else

using model::block_count;
using model::block_index;
using model::last_to_arrive;
using model::sync_block;
using model::thread_count;
using model::thread_index;

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

// ---- vectors of elements ----

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

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

// Element `lane` in arithmetic precision.
template <class T>
BNEXT_DEVICE opmath_t<T> element(const Vector16& v, int lane) {
  if constexpr (sizeof(T) == 8) {
    return bits_as<double>(uint64_t{v.word[2 * lane + 1]} << 32 | v.word[2 * lane]);
  } else if constexpr (sizeof(T) == 4) {
    return bits_as<float>(v.word[lane]);
  } else {
    const uint32_t pair = v.word[lane / 2];
    if constexpr (std::is_same_v<T, bf16>) {
      return bits_as<float>(lane % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    } else {
      return widen_half(lane % 2 == 0 ? pair & 0xffffu : pair >> 16);
    }
  }
}

template <class T>
BNEXT_DEVICE Vector16 pack(const opmath_t<T> (&values)[kLanes<T>]) {
  Vector16 v;
  BNEXT_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 8) {
      const uint64_t bits = bits_as<uint64_t>(values[w / 2]);
      v.word[w] = static_cast<uint32_t>(w % 2 == 0 ? bits : bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      v.word[w] = bits_as<uint32_t>(values[w]);
    } else {
      v.word[w] = narrow_to(values[2 * w], T{}) | narrow_to(values[2 * w + 1], T{}) << 16;
    }
  }
  return v;
}

// The bits of one element, and a vector with them in place of its own.
template <class T>
using bits_t =
    std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T>
BNEXT_DEVICE bits_t<T> element_bits(const Vector16& v, int lane) {
  if constexpr (sizeof(T) == 8) {
    return uint64_t{v.word[2 * lane + 1]} << 32 | v.word[2 * lane];
  } else if constexpr (sizeof(T) == 4) {
    return v.word[lane];
  } else {
    return static_cast<uint16_t>(v.word[lane / 2] >> (lane % 2 * 16));
  }
}

template <class T>
BNEXT_DEVICE void set_element_bits(Vector16& v, int lane, bits_t<T> bits) {
  if constexpr (sizeof(T) == 8) {
    v.word[2 * lane] = static_cast<uint32_t>(bits);
    v.word[2 * lane + 1] = static_cast<uint32_t>(bits >> 32);
  } else if constexpr (sizeof(T) == 4) {
    v.word[lane] = bits;
  } else {
    const int shift = lane % 2 * 16;
    v.word[lane / 2] = (v.word[lane / 2] & ~(0xffffu << shift)) | static_cast<uint32_t>(bits) << shift;
  }
}

template <class T>
BNEXT_DEVICE void set_element(Vector16& v, int lane, opmath_t<T> value) {
  if constexpr (sizeof(T) == 2) {
    set_element_bits<T>(v, lane, static_cast<uint16_t>(narrow_to(value, T{})));
  } else {
    set_element_bits<T>(v, lane, bits_as<bits_t<T>>(value));
  }
}

// The sixteen bytes from `shift` on of two vectors that follow one another.
BNEXT_DEVICE Vector16 shifted(const Vector16& low, const Vector16& high, unsigned shift) {
  uint32_t word[8];
  BNEXT_UNROLL
  for (int k = 0; k < 4; ++k) {
    word[k] = low.word[k];
    word[k + 4] = high.word[k];
  }
  BNEXT_UNROLL
  for (int step = 2; step > 0; --step) {  // by two words, by one
    BNEXT_UNROLL
    for (int k = 0; k + step < 8; ++k) word[k] = (shift >> 2 & step) != 0 ? word[k + step] : word[k];
  }
  Vector16 v;
  BNEXT_UNROLL
  for (int k = 0; k < 4; ++k) {
    v.word[k] = static_cast<uint32_t>((uint64_t{word[k + 1]} << 32 | word[k]) >> (shift % 4 * 8));
  }
  return v;
}

}  // namespace bnext::cuda
