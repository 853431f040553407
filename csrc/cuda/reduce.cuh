// First kernel of a direction: sums over channels, for any reducer. Block sums go to `partial`, the last
// block of a group adds them in order and folds. Elements that are not there count as the center, which adds
// nothing.
//
// A Reducer is an operation over elements (see batch.cuh) and has
// - Center center(channel): what deviations are taken from, and what else elements of the channel need;
// - Centers, those of a vector: set(lane, center), at(lane), and fill(), a vector that adds nothing;
// - add(sums, elements, center), for elements of one channel, which leaves what output(i) gets in values[i];
// - fold(channel, center, sums), what follows once per channel;
// - kReuse: whether a map comes after it;
// - phase(), of the tensor on whose boundaries the vectors of planes should lie.
#pragma once

#include "cuda/batch.cuh"
#include "cuda/columns.cuh"
#include "cuda/sums.cuh"
#include "cuda/tensors.cuh"
#include "formulas.h"
#include "plan_cuda.h"

namespace bnext::cuda {

struct Reduction {
  Extent extent;
  Tiling tiling;
  bool aligned;        // every vector that is walked lies on a boundary of sixteen bytes
  Sums* partial;       // [chunk][channel]
  unsigned* counters;  // [group], zero

  BNEXT_DEVICE Sums* part(int64_t chunk, int64_t channel) const {
    return partial + chunk * extent.channels + channel;
  }
};

// The partial sums of one group, part(chunk, channel of the group), into totals(channel of the group, sums),
// each called by one thread.
template <class Part, class F>
BNEXT_DEVICE void total(int chunks, int channels, double* memory, Part part, F totals) {
  const int threads = static_cast<int>(thread_count()), t = static_cast<int>(thread_index());
  for (int begin = 0; begin < channels; begin += threads) {
    const int count = channels - begin < threads ? channels - begin : threads;
    const int slices = threads / count;
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
    sync_block();
    if (slice < slices) memory[t] = sums.first;
    sum_rows(memory, count, slices);
    if (slice == 0) sums.first = memory[t];
    sync_block();
    if (slice < slices) memory[t] = sums.second;
    sum_rows(memory, count, slices);
    if (slice == 0) totals(begin + channel, {sums.first, memory[t]});
  }
}

// What add() left of an element, back into the batch, if it is to be written.
template <class Reducer, int kVectors, int kCount>
BNEXT_DEVICE void put_back(const Reducer& reducer, Batch<Reducer, kVectors>& batch, int vector, int lane,
                           const Elements<Reducer, kCount>& elements, int k) {
  BNEXT_UNROLL
  for (int i = 0; i < Reducer::kOutputs; ++i) {
    if (writes(reducer, i)) {
      set_element<typename Reducer::Storage>(batch.input[i][vector], lane, elements.values[i][k]);
    }
  }
}

// A batch of vectors, one beneath the other: lane by lane into sums[lane], some of the lanes.
template <int kFirst, int kEnd, class Reducer, int kVectors>
BNEXT_DEVICE void add_columns(const Reducer& reducer, Batch<Reducer, kVectors>& batch,
                              const typename Reducer::Centers& centers, Sums* sums) {
  BNEXT_UNROLL
  for (int lane = kFirst; lane < kEnd; ++lane) {
    Elements<Reducer, kVectors> elements;
    BNEXT_UNROLL
    for (int u = 0; u < kVectors; ++u) elements.take(u, batch, u, lane);
    reducer.add(sums[lane], elements, centers.at(lane));
    BNEXT_UNROLL
    for (int u = 0; u < kVectors; ++u) put_back(reducer, batch, u, lane, elements, u);
  }
}

// Elements of a run that are summed before their sums are added in double; of doubles, whose registers are
// twice as many, half.
template <class T>
constexpr int kRunBatch = sizeof(T) == 8 ? 4 : 8;

// The same of one channel: all lanes into one.
template <class Reducer, int kVectors>
BNEXT_DEVICE void add_run(const Reducer& reducer, Batch<Reducer, kVectors>& batch,
                          const typename Reducer::Center& center, Sums& sums) {
  using T = typename Reducer::Storage;
  constexpr int kBatch = kRunBatch<T>, kTogether = kBatch / kLanes<T>;  // elements and vectors of a batch
  BNEXT_UNROLL
  for (int first = 0; first < kVectors; first += kTogether) {
    Elements<Reducer, kBatch> elements;
    BNEXT_UNROLL
    for (int k = 0; k < kBatch; ++k) elements.take(k, batch, first + k / kLanes<T>, k % kLanes<T>);
    reducer.add(sums, elements, center);
    BNEXT_UNROLL
    for (int k = 0; k < kBatch; ++k)
      put_back(reducer, batch, first + k / kLanes<T>, k % kLanes<T>, elements, k);
  }
}

// add(batch) of what lies at these places, then what that leaves to write.
template <bool kWhole, class Reducer, int kVectors, class Add>
BNEXT_DEVICE void reduce_batch(const Reducer& reducer, const Span (&places)[kVectors], const Vector16& fill,
                               Add add) {
  Batch<Reducer, kVectors> batch;
  load_batch<Reducer::kReuse, kWhole>(reducer, places, fill, batch);
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
  constexpr int kCount = kLanes<T>, kVectors = Reducer::kVectors, kFew = kVectors < 2 ? kVectors : 2;
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
    for (int k = index; k < channels; k += threads) centers[k] = reducer.center(first_channel + k);
    sync_block();
  }
  typename Reducer::Centers centers;
  at_columns.set_centers(centers, reinterpret_cast<const Center*>(memory));
  sync_block();

  Sums sums[kCount];
  const auto add = [&](auto& batch) { add_columns<0, kCount>(reducer, batch, centers, sums); };
  if (whole) {
    BNEXT_NO_UNROLL
    for (; at < end; at += kVectors * height) {
      Span places[kVectors];
      batch_at(at, places);
      reduce_batch<true>(reducer, places, centers.fill(), add);
    }
  } else if (lanes > 0) {
    for (; at < end; at += kFew * height) {
      const int64_t e = at * t.row_length + base;
      Span places[kFew];
      BNEXT_UNROLL
      for (int u = 0; u < kFew; ++u) places[u] = {e + u * stride, 0, at + u * height < end ? lanes : 0};
      reduce_batch<false>(reducer, places, centers.fill(), add);
    }
  }
  // What is left of the matrix is less than a row.
  if (chunk == t.chunks - 1 && row == 0 && lanes > 0 && t.rows * t.row_length < r.extent.numel()) {
    const Span rest[1] = {{t.rows * t.row_length + base, 0, lanes}};
    reduce_batch<false>(reducer, rest, centers.fill(), add);
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
  constexpr int kCount = kLanes<T>, kTogether = kRunBatch<T> / kCount;  // vectors of a batch
  constexpr int kVectors = Reducer::kVectors > kTogether ? Reducer::kVectors : kTogether;
  constexpr int kFew = kTogether > 2 ? kTogether : 2;
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
  const Center center = reducer.center(channel);
  typename Reducer::Centers centers;
  BNEXT_UNROLL
  for (int lane = 0; lane < kCount; ++lane) centers.set(lane, center);
  Sums sums;
  const auto add = [&](auto& batch) { add_run(reducer, batch, center, sums); };
  if (r.aligned) {
    for (; at < end; at += kVectors * threads) {
      Span places[kVectors];
      batch_at(walk, at, places);
      reduce_batch<true>(reducer, places, centers.fill(), add);
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
    reduce_batch<false>(reducer, places, centers.fill(), add);
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
