// Vectors of a dense tensor, wherever it begins and ends.
#pragma once

#include "args.h"
#include "cuda/elements.cuh"
#include "dispatch.h"

namespace bnext::cuda {

template <class A>
BNEXT_DEVICE constexpr A min_of(A a, A b) {
  return a < b ? a : b;
}

// A place among rows of `vectors` vectors each, and how far one step goes.
struct Walk {
  int64_t row, row_step, vector, vector_step, vectors;

  BNEXT_DEVICE Walk(int64_t at, int64_t step, int64_t row_vectors)
      : row(at / row_vectors),
        row_step(step / row_vectors),
        vector(at % row_vectors),
        vector_step(step % row_vectors),
        vectors(row_vectors) {}

  BNEXT_DEVICE void forward() {
    row += row_step;
    vector += vector_step;
    if (vector >= vectors) {
      vector -= vectors;
      ++row;
    }
  }

  BNEXT_DEVICE void backward() {
    row -= row_step;
    vector -= vector_step;
    if (vector < 0) {
      vector += vectors;
      --row;
    }
  }
};

// Vector number `vector` of a run of `length` elements at `run`, in a tensor that begins `phase` elements
// after a boundary: the elements at + [low, high), none if high <= low.
struct Span {
  int64_t at;
  int low, high;
};

template <int kCount>
BNEXT_DEVICE Span span_of(int64_t run, int64_t length, int64_t vector, int phase) {
  const int before = static_cast<int>((run + phase) % kCount);
  const int64_t first = vector * kCount - before;
  return {run + first, vector == 0 ? before : 0, static_cast<int>(min_of<int64_t>(kCount, length - first))};
}

// A bit for each of a vector's elements e + [low, high) that the tensor has; low is not negative.
template <int kCount>
BNEXT_DEVICE uint32_t lanes_there(int64_t e, int low, int high, int64_t numel) {
  const int64_t from = e < -low ? -e : low;
  const int64_t to = min_of<int64_t>(min_of(high, kCount), numel - e);
  return from < to ? (1u << to) - (1u << from) : 0;
}

// Elements from the boundary of sixteen bytes at or before p.
template <class T>
BNEXT_DEVICE int phase_of(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

template <class T>
struct Input {
  const T* data;
  int64_t numel;

  template <Reuse kReuse>
  BNEXT_DEVICE Vector16 load(int64_t e) const {
    return load16<kReuse>(data + e);
  }

  // Elements e + [low, high) as far as the tensor goes, of any alignment; zero for the others. Two vectors
  // that the wanted one straddles cost one load more, of bytes that a neighbour loads too.
  template <Reuse kReuse>
  BNEXT_DEVICE Vector16 load_any(int64_t e, int low, int high) const {
    constexpr int kCount = kLanes<T>;
    const uint32_t there = lanes_there<kCount>(e, low, high, numel);
    if (there == (1u << kCount) - 1) {
      const auto shift = static_cast<unsigned>(reinterpret_cast<uintptr_t>(data + e) % 16);
      if (shift == 0) return load<kReuse>(e);
      const int64_t boundary = e - shift / static_cast<int>(sizeof(T));
      if (boundary >= 0 && boundary + 2 * kCount <= numel) {
        return shifted(load<kReuse>(boundary), load<kReuse>(boundary + kCount), shift);
      }
    }
    Vector16 v{};
    BNEXT_UNROLL
    for (int lane = 0; lane < kCount; ++lane) {
      if ((there >> lane & 1) != 0) {
        set_element_bits<T>(v, lane, reinterpret_cast<const bits_t<T>*>(data)[e + lane]);
      }
    }
    return v;
  }
};

template <class T>
struct Output {
  T* data;
  int64_t numel;
  Reuse reuse;

  BNEXT_DEVICE void store(int64_t e, const Vector16& v) const { store16(data + e, v, reuse); }

  // Elements e + [low, high) as far as the tensor goes, of any alignment; one by one where not a whole vector
  // lies on a boundary.
  BNEXT_DEVICE void store_any(int64_t e, int low, int high, const Vector16& v) const {
    constexpr int kCount = kLanes<T>;
    const uint32_t there = lanes_there<kCount>(e, low, high, numel);
    if (there == (1u << kCount) - 1 && reinterpret_cast<uintptr_t>(data + e) % 16 == 0) return store(e, v);
    BNEXT_UNROLL
    for (int lane = 0; lane < kCount; ++lane) {
      if ((there >> lane & 1) != 0) {
        cuda::store(reinterpret_cast<bits_t<T>*>(data) + e + lane, element_bits<T>(v, lane));
      }
    }
  }
};

// A per-channel vector of any storage type, or what stands for an absent one.
BNEXT_DEVICE double read_channel(const ChannelVector& v, int64_t c, double otherwise) {
  if (!v) return otherwise;
  return dispatch(v.dtype, [&]<class T>() { return widen(static_cast<const T*>(v.data)[c]); });
}

BNEXT_DEVICE void fetch_channel(const ChannelVector& v, int64_t c) {
  if (v) fetch(static_cast<const char*>(v.data) + c * size_of(v.dtype));
}

BNEXT_DEVICE void write_channel(const ChannelVector& v, int64_t c, double value) {
  dispatch(v.dtype, [&]<class T>() {
    T narrowed;
    narrow(value, narrowed);
    store(static_cast<T*>(v.data) + c, narrowed);
  });
}

}  // namespace bnext::cuda
