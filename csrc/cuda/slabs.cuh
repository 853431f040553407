// A block's share of a slab, by layout: which vectors are whose, and whose channels they belong to. A thread
// keeps to its vectors from the copy to the store, so that what it keeps needs no barrier.
//
// A slab has channels, kVectors that a thread adds at a time, kSums sums and Centers of a thread; and
// - places(), one after another: Span place(), forward(); `count` of them belong to the thread; the last row
//   of a matrix may go past the end of the tensor;
// - add(reducer, batch, centers, sums);
// - add_up(sums, memory, to): over the block into to[channel of the slab], seen by all threads;
// - channel(lane) of the slab, or -1;
// - runs(reduction, slab, chunk): the block's vectors, where all of them are whole.
#pragma once

#include "cuda/bulk.cuh"
#include "cuda/columns.cuh"
#include "cuda/reduce.cuh"

namespace bnext::cuda {

template <class Reducer>
struct RowsSlab {
  using T = typename Reducer::Storage;
  static constexpr int kCount = kLanes<T>, kSums = kCount, kVectors = Reducer::kKeptVectors;

  struct Places {
    int64_t at, stride;
    int lanes;

    BNEXT_DEVICE Span place() const { return {at, 0, lanes}; }
    BNEXT_DEVICE void forward() { at += stride; }
  };

  Columns<kCount> columns;
  int64_t first_channel;
  int channels, count, rows;
  Places first;

  BNEXT_DEVICE RowsSlab(const Reduction& r, int64_t slab, int64_t chunk, int)
      : columns(r.extent, r.tiling, slab, static_cast<int>(anew(thread_index()))),
        first_channel(columns.first_channel),
        channels(columns.channels) {
    const Tiling& t = r.tiling;
    const int64_t begin = chunk * t.chunk + columns.row, end = min_of((chunk + 1) * t.chunk, t.rows);
    count = columns.lanes > 0 && begin < end ? static_cast<int>((end - begin - 1) / t.height) + 1 : 0;
    first = {begin * t.row_length + columns.base, t.height * t.row_length, columns.lanes};
    rows = static_cast<int>(t.vector_rows());
  }

  BNEXT_DEVICE Places places() const { return first; }
  BNEXT_DEVICE static Runs runs(const Reduction& r, int64_t slab, int64_t chunk) {
    const Tiling& t = r.tiling;
    const int64_t begin = chunk * t.chunk, end = min_of(begin + t.chunk, t.rows);
    const bool joined = t.group_width == t.row_length;
    return {slab * t.group_width, t.row_length, joined ? t.rows * t.vectors : t.vectors, begin * t.vectors,
            end * t.vectors};
  }
  BNEXT_DEVICE int channel(int lane) const { return columns.channel(lane); }

  // See add_in_parts: there are rows.
  template <class Batch>
  BNEXT_DEVICE void add(const Reducer& reducer, Batch& batch, const typename Reducer::Centers& centers,
                        Sums (&sums)[kSums]) const {
    add_in_parts<2>(reducer, batch, centers, sums, rows);
  }

  // Where columns repeat within a warp, over its lanes first.
  BNEXT_DEVICE void add_up(Sums (&sums)[kSums], double* memory, Sums* to) const {
    const int index = static_cast<int>(anew(thread_index()));
    Columns<kCount> columns = this->columns;
    columns.column = static_cast<int>(anew(columns.column));
    if (kWarp % columns.vectors != 0) {
      return columns.add_up(sums, columns.active, columns.row, rows, memory, to);
    }
    BNEXT_NO_UNROLL
    for (int mask = columns.vectors; mask < kWarp; mask *= 2) {
      BNEXT_UNROLL
      for (int lane = 0; lane < kCount; ++lane) {
        sums[lane] += {exchange(sums[lane].first, mask), exchange(sums[lane].second, mask)};
      }
    }
    columns.add_up(sums, index % kWarp < columns.vectors, index / kWarp, rows, memory, to);
  }
};

template <class Reducer>
struct PlanesSlab {
  using T = typename Reducer::Storage;
  static constexpr int kCount = kLanes<T>, kTogether = kRunBatch<T> / kCount, kSums = 1;
  static constexpr int kVectors = Reducer::kVectors > kTogether ? Reducer::kVectors : kTogether;

  struct Places {
    Walk walk;
    int64_t channels, channel, inner;
    int phase;

    BNEXT_DEVICE Span place() const {
      return span_of<kCount>((walk.row * channels + channel) * inner, inner, walk.vector, phase);
    }
    BNEXT_DEVICE void forward() { walk.forward(); }
  };

  const Reduction& reduction;
  int64_t first_channel, begin;
  static constexpr int channels = 1;
  int count, phase;

  // phase: elements from a boundary to the tensor, for vectors to lie on boundaries.
  BNEXT_DEVICE PlanesSlab(const Reduction& r, int64_t slab, int64_t chunk, int phase)
      : reduction(r), first_channel(slab), phase(phase) {
    const Tiling& t = r.tiling;
    const int64_t threads = thread_count(), end = min_of((chunk + 1) * t.chunk, t.rows * t.vectors);
    begin = chunk * t.chunk + thread_index();
    count = begin < end ? static_cast<int>((end - begin - 1) / threads) + 1 : 0;
  }

  BNEXT_DEVICE Places places() const {
    const Extent& e = reduction.extent;
    return {Walk(begin, thread_count(), reduction.tiling.vectors), e.channels, first_channel, e.inner, phase};
  }
  BNEXT_DEVICE int channel(int) const { return 0; }
  BNEXT_DEVICE static Runs runs(const Reduction& r, int64_t slab, int64_t chunk) {
    const Tiling& t = r.tiling;
    const int64_t begin = chunk * t.chunk, end = min_of(begin + t.chunk, t.rows * t.vectors);
    return {slab * r.extent.inner, r.extent.channels * r.extent.inner, t.vectors, begin, end};
  }

  template <class Batch>
  BNEXT_DEVICE void add(const Reducer& reducer, Batch& batch, const typename Reducer::Centers& centers,
                        Sums (&sums)[kSums]) const {
    add_run(reducer, batch, centers.at(0), sums[0], reduction.tiling.height);
  }

  BNEXT_DEVICE void add_up(const Sums (&sums)[kSums], double* memory, Sums* to) const {
    const Sums all = sum_block(sums[0], memory);
    if (thread_index() == 0) to[0] = all;
    sync_block();
  }
};

}  // namespace bnext::cuda
