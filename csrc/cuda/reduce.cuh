// First kernel of a direction: sums over channels, for any reducer. Block sums go to `partial`, the last
// block of a group adds them in order and folds.
#pragma once

#include "cuda/adding.cuh"
#include "cuda/columns.cuh"
#include "formulas.h"
#include "plan_cuda.h"

namespace bnext::cuda {

struct Reduction {
  Extent extent;
  Tiling tiling;
  bool aligned;        // every vector that is walked lies on a boundary of sixteen bytes
  bool map_waits;      // the next kernel is this call's map, which may begin early and waits for this one
  Sums* partial;       // [chunk][channel]
  unsigned* counters;  // [group], zero

  BNEXT_DEVICE Sums* part(int64_t chunk, int64_t channel) const {
    return partial + chunk * extent.channels + channel;
  }
};

// The partial sums of one group, part(chunk, channel of the group), into totals(channel of the group, sums),
// each called by one thread; memory: see sums_memory().
template <class Part, class F>
BNEXT_DEVICE void total(int chunks, int channels, double* memory, Part part, F totals) {
  const int threads = static_cast<int>(thread_count()), t = static_cast<int>(thread_index());
  for (int begin = 0; begin < channels; begin += threads) {
    const int count = channels - begin < threads ? channels - begin : threads;
    const int columns = 2 * count, slices = columns > threads ? 1 : threads / columns;
    const int channel = t % count, slice = t / count;
    Sums sums;
    if (slice < slices) {
      constexpr int kTogether = 8;  // loads under way at once: each takes as long as all of them
      for (int chunk = slice; chunk < chunks; chunk += kTogether * slices) {
        Vector16 parts[kTogether];
        BNEXT_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          const int at = chunk + k * slices;
          parts[k] = at < chunks ? part(at, begin + channel) : Vector16{};
        }
        BNEXT_UNROLL
        for (int k = 0; k < kTogether; ++k)
          sums += {element<double>(parts[k], 0), element<double>(parts[k], 1)};
      }
    }
    if (slices == 1) {
      if (slice == 0) totals(begin + channel, sums);
      continue;
    }
    if (slice < slices) {
      memory[slice * columns + channel] = sums.first;
      memory[slice * columns + count + channel] = sums.second;
    }
    const double* const left = memory + slices * columns;
    const int rows = sum_rows(memory, columns, slices, memory + slices * columns);
    if (slice == 0) {
      InTurn first, second;
      for (int row = 0; row < rows; ++row) {
        first.add(left[row * columns + channel]);
        second.add(left[row * columns + count + channel]);
      }
      totals(begin + channel, {first.sum(), second.sum()});
    }
  }
}

// add(batch) of what lies at these places, then what that leaves to write.
template <bool kWhole, class Reducer, int kVectors, class Add>
BNEXT_DEVICE void reduce_batch(const Reducer& reducer, const Span (&places)[kVectors], Add add) {
  Batch<Reducer, kVectors, kWhole> batch;
  load_batch<Reducer::kReuse>(reducer, places, batch);
  add(batch);
  BNEXT_UNROLL
  for (int i = 0; i < Reducer::kOutputs; ++i) {
    if (!writes(reducer, i)) continue;
    BNEXT_UNROLL
    for (int u = 0; u < kVectors; ++u) store_vector<kWhole>(reducer, i, places[u], batch.input[i][u]);
  }
}

template <class Reducer>
BNEXT_DEVICE void reduce_rows(const Reduction& r, Reducer& reducer) {
  using T = typename Reducer::Storage;
  using Center = typename Reducer::Center;
  constexpr int kCount = kLanes<T>, kVectors = Reducer::kRowVectors, kFew = kVectors < 2 ? kVectors : 2;
  if (r.map_waits) let_next_begin();
  const Tiling& t = r.tiling;
  const unsigned groups = static_cast<unsigned>(t.groups);
  const int64_t group = block_index() % groups, chunk = block_index() / groups;
  const Columns<kCount> at_columns(r.extent, t, group, static_cast<int>(thread_index()));
  const int64_t first_channel = at_columns.first_channel;
  const int channels = at_columns.channels, lanes = at_columns.lanes;
  const int index = static_cast<int>(thread_index()), threads = static_cast<int>(thread_count());
  const int row = at_columns.row, height = t.height;

  const int64_t begin = chunk * t.chunk, end = min_of(begin + t.chunk, t.rows),
                stride = height * t.row_length, base = at_columns.base;
  // A batch of whole vectors from row `at` on.
  const auto batch_at = [&](int64_t at, Span(&places)[kVectors]) {
    const int64_t e = at * t.row_length + base;
    const int left = static_cast<int>(min_of<int64_t>(end - at, kVectors * height));
    BNEXT_UNROLL
    for (int u = 0; u < kVectors; ++u) places[u] = {e + u * stride, 0, u * height < left ? kCount : 0};
  };
  int64_t at = begin + row;
  const bool whole = r.aligned && lanes == kCount;
  if (whole && at < end) {  // on its way while the centers are
    Span first[kVectors];
    batch_at(at, first);
    fetch_batch(reducer, first);
  }

  double* const memory = reinterpret_cast<double*>(block_memory());
  {
    auto* const centers = reinterpret_cast<Center*>(memory);  // [channel of the group]
    for (int k = index; k < channels; k += threads) {
      if (chunk == 0) reducer.fetch_for_fold(first_channel + k);
      centers[k] = reducer.center(first_channel + k);
    }
    sync_block();
  }
  typename Reducer::Centers centers;
  at_columns.set_centers(centers, reinterpret_cast<const Center*>(memory));
  sync_block();

  Sums sums[kCount];
  const auto add = [&](auto& batch) { add_in_parts<2>(reducer, batch, centers, sums, height); };
  if (whole) {
    BNEXT_NO_UNROLL
    for (; at < end; at += kVectors * height) {
      Span places[kVectors];
      batch_at(at, places);
      reduce_batch<true>(reducer, places, add);
    }
  } else if (lanes > 0) {
    for (; at < end; at += kFew * height) {
      const int64_t e = at * t.row_length + base;
      Span places[kFew];
      BNEXT_UNROLL
      for (int u = 0; u < kFew; ++u) places[u] = {e + u * stride, 0, at + u * height < end ? lanes : 0};
      reduce_batch<false>(reducer, places, add);
    }
  }
  // What is left of the matrix is less than a row.
  if (chunk == t.chunks - 1 && row == 0 && lanes > 0 && t.rows * t.row_length < r.extent.numel()) {
    const int64_t e = t.rows * t.row_length + base;
    const Span rest[1] = {{e, 0, static_cast<int>(min_of<int64_t>(lanes, r.extent.numel() - e))}};
    reduce_batch<false>(reducer, rest, add);
  }

  Sums* const partial = r.part(chunk, first_channel);
  at_columns.add_up(sums, at_columns.active, row, height, memory, partial);
  const auto fold = [&](int k, const Sums& all) {
    reducer.fold(first_channel + k, reducer.center(first_channel + k), all);
  };
  if (t.chunks == 1) {  // each channel's sums by the thread that wrote them
    for (int k = index; k < channels; k += threads) fold(k, partial[k]);
    return;
  }
  if (!last_to_arrive(r.counters + group, static_cast<unsigned>(t.chunks))) return;
  const auto part = [&](int chunk, int k) { return load16_fresh(r.part(chunk, first_channel + k)); };
  total(static_cast<int>(t.chunks), channels, memory, part, fold);
}

template <class Reducer>
BNEXT_DEVICE void reduce_planes(const Reduction& r, Reducer& reducer) {
  using T = typename Reducer::Storage;
  using Center = typename Reducer::Center;
  constexpr int kCount = kLanes<T>, kTogether = kRunBatch<T> / kCount;        // vectors of a batch
  constexpr int kAtOnce = min_of(Reducer::kVectors, sizeof(T) == 2 ? 4 : 8);  // as registers allow
  constexpr int kVectors = kAtOnce > kTogether ? kAtOnce : kTogether;
  constexpr int kFew = kTogether > 2 ? kTogether : 2;
  if (r.map_waits) let_next_begin();
  const Tiling& t = r.tiling;
  const unsigned groups = static_cast<unsigned>(t.groups);
  const int64_t channel = block_index() % groups, chunk = block_index() / groups;
  const int64_t inner = r.extent.inner, threads = thread_count();
  const int64_t begin = chunk * t.chunk, end = min_of(begin + t.chunk, t.rows * t.vectors);

  Walk walk(begin + thread_index(), threads, t.vectors);
  int64_t at = begin + thread_index();
  // A batch of whole vectors from position `first` on, where `from` stands.
  const auto batch_at = [&](Walk& from, int64_t first, Span(&places)[kVectors]) {
    BNEXT_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      const int64_t run = (from.row * r.extent.channels + channel) * inner;
      places[u] = {run + from.vector * kCount, 0, first + u * threads < end ? kCount : 0};
      from.forward();
    }
  };
  if (r.aligned) {  // on its way while the center is
    Span first[kVectors];
    Walk from = walk;
    batch_at(from, at, first);
    fetch_batch(reducer, first);
  }
  if (chunk == 0 && thread_index() == 0) reducer.fetch_for_fold(channel);
  const Center center = reducer.center(channel);
  Sums sums;
  const auto add = [&](auto& batch) { add_run(reducer, batch, center, sums, t.height); };
  if (r.aligned) {
    for (; at < end; at += kVectors * threads) {
      Span places[kVectors];
      batch_at(walk, at, places);
      reduce_batch<true>(reducer, places, add);
    }
  }
  const int phase = reducer.phase();
  for (; at < end; at += kFew * threads) {
    Span places[kFew];
    BNEXT_UNROLL
    for (int u = 0; u < kFew; ++u) {
      places[u] =
          span_of<kCount>((walk.row * r.extent.channels + channel) * inner, inner, walk.vector, phase);
      if (at + u * threads >= end) places[u].high = 0;
      walk.forward();
    }
    reduce_batch<false>(reducer, places, add);
  }

  double* const memory = reinterpret_cast<double*>(block_memory());
  const Sums all = sum_block(sums, memory);
  if (t.chunks == 1) {
    if (thread_index() == 0) reducer.fold(channel, center, all);
    return;
  }
  if (thread_index() == 0) *r.part(chunk, channel) = all;
  if (!last_to_arrive(r.counters + channel, static_cast<unsigned>(t.chunks))) return;
  total(
      static_cast<int>(t.chunks), 1, memory,
      [&](int chunk, int) { return load16_fresh(r.part(chunk, channel)); },
      [&](int, const Sums& sum) { reducer.fold(channel, center, sum); });
}

}  // namespace bnext::cuda
