// Second kernel of a direction: every element to its outputs, for any map, walking backwards: what the reduce
// read last is still in L2. Vectors lie on the boundaries of output 0; all else is accessed wherever it lies.
// Nobody reads an element that another thread writes: output 0 may be an input.
//
// A Map is an operation over elements (see batch.cuh), has kCoefficients per channel, and
//   coefficients(channel, owner, values)   into values[k]; owner: one thread of the grid per channel
//   values(elements, coefficients, out)    of a vector; coefficient k of a lane is coefficients(k, lane)
// The latter gives the lanes' bits for mask(), if it kWritesMask.
#pragma once

#include "cuda/batch.cuh"
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

// Loads of all vectors, then their stores.
template <bool kWhole, class Map, int kVectors, class Coefficient>
BNEXT_DEVICE void map_batch(const Map& map, const Span (&places)[kVectors], Coefficient coefficient) {
  using T = typename Map::Storage;
  constexpr int kCount = kLanes<T>;
  Batch<Map, kVectors, kWhole> batch;
  load_batch<Reuse::no>(map, places, batch);
  BNEXT_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    Elements<Map, kCount> elements;
    typename Map::Math out[Map::kOutputs][kCount];
    BNEXT_UNROLL
    for (int lane = 0; lane < kCount; ++lane) elements.take(lane, batch, u, lane);
    const uint32_t bits = map.values(elements, coefficient, out);
    BNEXT_UNROLL
    for (int i = 0; i < Map::kOutputs; ++i) {
      if (writes(map, i)) store_vector<kWhole>(map, i, places[u], pack<T>(out[i]));
    }
    if constexpr (Map::kWritesMask) {
      const MaskOutput mask = map.mask();
      if (mask.data != nullptr) mask.write<kCount, kWhole>(places[u], bits);
    }
  }
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
  const int phase = phase_of(map.output(0).data);

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
      Span places[kMapVectors];
      BNEXT_UNROLL
      for (int u = 0; u < kMapVectors; ++u) places[u] = {e - u * stride, 0, kCount};
      map_batch<true>(map, places, coefficient);
      at -= kMapVectors * height;
    } else {
      Span places[kFewVectors];
      BNEXT_UNROLL
      for (int u = 0; u < kFewVectors; ++u) {
        places[u] = {e - u * stride, 0, at - u * height >= begin ? kCount : 0};
      }
      map_batch<false>(map, places, coefficient);
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
  const int phase = phase_of(map.output(0).data);

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
      Span places[kMapVectors];
      BNEXT_UNROLL
      for (int u = 0; u < kMapVectors; ++u) {
        const int64_t run = (walk.row * m.extent.channels + channel) * inner;
        places[u] = {run + walk.vector * kCount, 0, kCount};
        walk.backward();
      }
      map_batch<true>(map, places, coefficient);
    }
  }
  for (; at >= begin; at -= kFewVectors * threads) {
    Span places[kFewVectors];
    BNEXT_UNROLL
    for (int u = 0; u < kFewVectors; ++u) {
      places[u] =
          span_of<kCount>((walk.row * m.extent.channels + channel) * inner, inner, walk.vector, phase);
      if (at - u * threads < begin) places[u].high = 0;
      walk.backward();
    }
    map_batch<false>(map, places, coefficient);
  }
}

}  // namespace bnext::cuda
