// Second kernel of a direction: every element to its output, for any map, walking backwards: what the reduce
// read last is still in L2. Vectors lie on the boundaries of the output; inputs are read wherever they lie.
//
// A Map has kInputs tensors of Storage, output(), kCoefficients per channel, and
//   coefficients(channel, owner, values)   into values[k]; owner: one thread of the grid per channel
//   values(inputs, coefficients, out)      of a vector; coefficient k of a lane is coefficients(k, lane)
#pragma once

#include "cuda/tensors.cuh"
#include "plan_cuda.h"

namespace bnext::cuda {

struct Mapping {
  Extent extent;
  Tiling tiling;
  bool aligned;  // every vector that is walked lies on a boundary of sixteen bytes, in all tensors
};

// Of every input in flight per thread: where nothing is in the way, and where boundaries are.
constexpr int kMapVectors = 4, kFewVectors = 2;

template <class Map, class Coefficient>
BNEXT_DEVICE Vector16 map_vector(const Map& map, const Vector16 (&raw)[Map::kInputs],
                                 Coefficient coefficient) {
  using T = typename Map::Storage;
  typename Map::Math values[Map::kInputs][kLanes<T>], out[kLanes<T>];
  BNEXT_UNROLL
  for (int i = 0; i < Map::kInputs; ++i) {
    BNEXT_UNROLL
    for (int lane = 0; lane < kLanes<T>; ++lane) values[i][lane] = element<T>(raw[i], lane);
  }
  map.values(values, coefficient, out);
  return pack<T>(out);
}

// Loads of all vectors, then their stores. load(i, u) and store(u, vector) skip what is not wanted.
template <int kVectors, class Map, class Load, class Store, class Coefficient>
BNEXT_DEVICE void map_batch(const Map& map, Load load, Store store, Coefficient coefficient) {
  Vector16 raw[kVectors][Map::kInputs];
  BNEXT_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    BNEXT_UNROLL
    for (int i = 0; i < Map::kInputs; ++i) raw[u][i] = load(i, u);
  }
  BNEXT_UNROLL
  for (int u = 0; u < kVectors; ++u) store(u, map_vector(map, raw[u], coefficient));
}

template <class Map>
BNEXT_DEVICE void map_rows(const Mapping& m, Map& map) {
  using T = typename Map::Storage;
  using Math = typename Map::Math;
  constexpr int kCount = kLanes<T>, kCoefficients = Map::kCoefficients;
  const Tiling& t = m.tiling;
  const unsigned block = block_count() - 1 - block_index(), groups = static_cast<unsigned>(t.groups);
  const int64_t group = block % groups, chunk = block / groups;
  const int64_t numel = m.extent.numel(), inner = m.extent.inner, cycle = m.extent.channels * inner;
  const int index = static_cast<int>(thread_index()), threads = static_cast<int>(thread_count());
  const Output<T> output = map.output();
  const int phase = phase_of(output.data);

  // Coefficients of the group's columns, found once per block: [coefficient][column].
  const int vectors = static_cast<int>(t.vectors), columns = vectors * kCount;
  Math* const memory = reinterpret_cast<Math*>(block_memory());
  for (int c = index; c < columns; c += threads) {
    const int64_t absolute = group * columns + c;  // of the output's boundaries; the tensor begins at phase
    const int64_t moved = absolute >= phase ? absolute - phase : absolute + cycle - phase % cycle;
    const int64_t place = moved < cycle ? moved : moved % cycle;
    const int64_t channel = inner == 1 ? place : place / inner;
    const bool owner = chunk == 0 && absolute < cycle && place == channel * inner;
    Math values[kCoefficients];
    map.coefficients(channel, owner, values);
    BNEXT_UNROLL
    for (int k = 0; k < kCoefficients; ++k) memory[k * columns + c] = values[k];
  }
  sync_block();
  const int column = index % vectors, row = index / vectors, height = t.height;
  if (row >= height || (group * t.vectors + column) * kCount >= t.row_length) return;
  Math held[kCoefficients][kCount];
  BNEXT_UNROLL
  for (int k = 0; k < kCoefficients; ++k) {
    BNEXT_UNROLL
    for (int lane = 0; lane < kCount; ++lane) held[k][lane] = memory[k * columns + column * kCount + lane];
  }
  auto coefficient = [&](int k, int lane) { return held[k][lane]; };

  const int64_t begin = chunk * t.chunk, end = min_of(begin + t.chunk, t.rows),
                stride = height * t.row_length;
  const int64_t base = (group * t.vectors + column) * kCount - phase;
  for (int64_t at = end - 1 - row; at >= begin;) {
    const int64_t e = at * t.row_length + base, last = e - (kMapVectors - 1) * stride;
    if (m.aligned && at - (kMapVectors - 1) * height >= begin && last >= 0 && e + kCount <= numel) {
      map_batch<kMapVectors>(
          map, [&](int i, int u) { return map.input(i).template load<Reuse::no>(e - u * stride); },
          [&](int u, const Vector16& v) { output.store(e - u * stride, v); }, coefficient);
      at -= kMapVectors * height;
    } else {
      map_batch<kFewVectors>(
          map,
          [&](int i, int u) {
            const int high = at - u * height >= begin ? kCount : 0;
            return map.input(i).template load_any<Reuse::no>(e - u * stride, 0, high, Vector16{});
          },
          [&](int u, const Vector16& v) {
            output.store_any(e - u * stride, 0, at - u * height >= begin ? kCount : 0, v);
          },
          coefficient);
      at -= kFewVectors * height;
    }
  }
}

template <class Map>
BNEXT_DEVICE void map_planes(const Mapping& m, Map& map) {
  using T = typename Map::Storage;
  using Math = typename Map::Math;
  constexpr int kCount = kLanes<T>, kCoefficients = Map::kCoefficients;
  const Tiling& t = m.tiling;
  const unsigned block = block_count() - 1 - block_index(), groups = static_cast<unsigned>(t.groups);
  const int64_t channel = block % groups, chunk = block / groups;
  const int64_t inner = m.extent.inner, threads = thread_count();
  const Output<T> output = map.output();
  const int phase = phase_of(output.data);

  Math* const memory = reinterpret_cast<Math*>(block_memory());
  if (thread_index() == 0) {
    Math values[kCoefficients];
    map.coefficients(channel, chunk == 0, values);
    BNEXT_UNROLL
    for (int k = 0; k < kCoefficients; ++k) memory[k] = values[k];
  }
  sync_block();
  Math held[kCoefficients];
  BNEXT_UNROLL
  for (int k = 0; k < kCoefficients; ++k) held[k] = memory[k];
  auto coefficient = [&](int k, int) { return held[k]; };

  const int64_t begin = chunk * t.chunk, end = min_of(begin + t.chunk, t.rows * t.vectors);
  int64_t at = end - 1 - thread_index();
  if (at < begin) return;
  Walk walk(at, threads, t.vectors);
  if (m.aligned) {
    for (; at - (kMapVectors - 1) * threads >= begin; at -= kMapVectors * threads) {
      int64_t e[kMapVectors];
      BNEXT_UNROLL
      for (int u = 0; u < kMapVectors; ++u) {
        e[u] = (walk.row * m.extent.channels + channel) * inner + walk.vector * kCount;
        walk.backward();
      }
      map_batch<kMapVectors>(
          map, [&](int i, int u) { return map.input(i).template load<Reuse::no>(e[u]); },
          [&](int u, const Vector16& v) { output.store(e[u], v); }, coefficient);
    }
  }
  for (; at >= begin; at -= kFewVectors * threads) {
    int64_t e[kFewVectors];  // of the boundary before the vector's first element
    int low[kFewVectors], high[kFewVectors];
    BNEXT_UNROLL
    for (int u = 0; u < kFewVectors; ++u) {
      const Span span =
          span_of<kCount>((walk.row * m.extent.channels + channel) * inner, inner, walk.vector, phase);
      e[u] = span.at;
      low[u] = span.low;
      high[u] = at - u * threads < begin ? 0 : span.high;
      walk.backward();
    }
    map_batch<kFewVectors>(
        map,
        [&](int i, int u) {
          return map.input(i).template load_any<Reuse::no>(e[u], low[u], high[u], Vector16{});
        },
        [&](int u, const Vector16& v) { output.store_any(e[u], low[u], high[u], v); }, coefficient);
  }
}

}  // namespace bnext::cuda
