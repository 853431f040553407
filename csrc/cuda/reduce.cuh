// First kernel of a direction: sums over channels, for any reducer. Block sums go to `partial`, the last
// block of a group adds them in order and folds. Elements that are not there count as the center, which adds
// nothing.
//
// A Reducer holds kInputs tensors of Storage and has
// - Center center(channel): what deviations are taken from, and what else elements of the channel need;
// - Centers, those of a vector: set(lane, center), at(lane), and fill(), a vector that adds nothing;
// - add(sums, values, center), for a batch of elements of one channel;
// - fold(channel, sums), what follows once per channel.
#pragma once

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
};

// The partial sums of one group into totals(channel of the group, sums), each called by one thread.
template <class F>
BNEXT_DEVICE void total(const Reduction& r, int64_t first_channel, int channels, double* memory, F totals) {
  const int threads = static_cast<int>(thread_count()), t = static_cast<int>(thread_index());
  const int chunks = static_cast<int>(r.tiling.chunks);
  for (int begin = 0; begin < channels; begin += threads) {
    const int count = channels - begin < threads ? channels - begin : threads;
    const int slices = threads / count;
    const int channel = t % count, slice = t / count;
    Sums sums;
    if (slice < slices) {
      const Sums* from = r.partial + first_channel + begin + channel;
      constexpr int kTogether = 8;  // loads under way at once: each takes as long as all of them
      for (int chunk = slice; chunk < chunks; chunk += kTogether * slices) {
        Vector16 part[kTogether];
        BNEXT_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          const int at = chunk + k * slices;
          part[k] = at < chunks ? load16_fresh(from + at * r.extent.channels) : Vector16{};
        }
        BNEXT_UNROLL
        for (int k = 0; k < kTogether; ++k)
          sums += {element<double>(part[k], 0), element<double>(part[k], 1)};
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

template <int kCount>
struct Vectors {};

// A batch of vectors, one beneath the other: lane by lane into sums[lane].
template <class Reducer, int kVectors>
BNEXT_DEVICE void add_columns(const Reducer& reducer, const Vector16 (&raw)[Reducer::kInputs][kVectors],
                              const typename Reducer::Centers& centers, Sums* sums) {
  using T = typename Reducer::Storage;
  BNEXT_UNROLL
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    typename Reducer::Math values[Reducer::kInputs][kVectors];
    BNEXT_UNROLL
    for (int i = 0; i < Reducer::kInputs; ++i) {
      BNEXT_UNROLL
      for (int u = 0; u < kVectors; ++u) values[i][u] = element<T>(raw[i][u], lane);
    }
    reducer.add(sums[lane], values, centers.at(lane));
  }
}

// Elements of a run that are summed before their sums are added in double; of doubles, whose registers are
// twice as many, half.
template <class T>
constexpr int kRunBatch = sizeof(T) == 8 ? 4 : 8;

// The same of one channel: all lanes into one.
template <class Reducer, int kVectors>
BNEXT_DEVICE void add_run(const Reducer& reducer, const Vector16 (&raw)[Reducer::kInputs][kVectors],
                          const typename Reducer::Center& center, Sums& sums) {
  using T = typename Reducer::Storage;
  constexpr int kBatch = kRunBatch<T>, kTogether = kBatch / kLanes<T>;  // elements and vectors of a batch
  BNEXT_UNROLL
  for (int first = 0; first < kVectors; first += kTogether) {
    typename Reducer::Math values[Reducer::kInputs][kBatch];
    BNEXT_UNROLL
    for (int i = 0; i < Reducer::kInputs; ++i) {
      BNEXT_UNROLL
      for (int k = 0; k < kBatch; ++k)
        values[i][k] = element<T>(raw[i][first + k / kLanes<T>], k % kLanes<T>);
    }
    reducer.add(sums, values, center);
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
  const int64_t inner = r.extent.inner, first_channel = group * t.group_channels;
  const int channels = static_cast<int>(min_of(t.group_channels, r.extent.channels - first_channel));
  const int width = static_cast<int>(min_of(t.group_width, t.row_length - group * t.group_width));
  const int index = static_cast<int>(thread_index()), threads = static_cast<int>(thread_count());
  const int vectors = static_cast<int>(t.vectors);
  const int column = index % vectors, height = t.height, row = index / vectors;
  const bool active = row < height;
  const int lanes = !active ? 0 : static_cast<int>(min_of<int64_t>(kCount, width - column * kCount));

  double* const memory = reinterpret_cast<double*>(block_memory());
  {
    auto* const centers = reinterpret_cast<Center*>(memory);  // [channel of the group]
    for (int k = index; k < channels; k += threads) centers[k] = reducer.center(first_channel + k);
    sync_block();
  }
  typename Reducer::Centers centers;
  BNEXT_UNROLL
  for (int lane = 0; lane < kCount; ++lane) {
    const int k = lane < lanes ? (column * kCount + lane) / static_cast<int>(inner) % channels : -1;
    centers.set(lane, k < 0 ? Center{} : reinterpret_cast<const Center*>(memory)[k]);
  }
  sync_block();

  Sums sums[kCount];
  const int64_t begin = chunk * t.chunk, end = min_of(begin + t.chunk, t.rows),
                stride = height * t.row_length;
  const int64_t base = group * t.group_width + column * kCount;
  auto batch = [&]<int kCountOf>(Vectors<kCountOf>, auto load) {
    Vector16 raw[Reducer::kInputs][kCountOf];
    BNEXT_UNROLL
    for (int i = 0; i < Reducer::kInputs; ++i) {
      BNEXT_UNROLL
      for (int u = 0; u < kCountOf; ++u) raw[i][u] = load(i, u);
    }
    add_columns<Reducer, kCountOf>(reducer, raw, centers, sums);
  };
  int64_t at = begin + row;
  if (r.aligned && lanes == kCount) {
    BNEXT_NO_UNROLL
    for (; at < end; at += kVectors * height) {
      const int64_t e = at * t.row_length + base;
      const int left = static_cast<int>(min_of<int64_t>(end - at, kVectors * height));
      batch(Vectors<kVectors>{}, [&](int i, int u) {
        return u * height < left ? reducer.input(i).template load<Reuse::yes>(e + u * stride)
                                 : centers.fill();
      });
    }
  } else if (lanes > 0) {
    for (; at < end; at += kFew * height) {
      const int64_t e = at * t.row_length + base;
      batch(Vectors<kFew>{}, [&](int i, int u) {
        const int high = at + u * height < end ? lanes : 0;
        return reducer.input(i).template load_any<Reuse::yes>(e + u * stride, 0, high, centers.fill());
      });
    }
  }
  // What is left of the matrix is less than a row.
  if (chunk == t.chunks - 1 && row == 0 && lanes > 0 && t.rows * t.row_length < r.extent.numel()) {
    batch(Vectors<1>{}, [&](int i, int) {
      return reducer.input(i).template load_any<Reuse::yes>(t.rows * t.row_length + base, 0, lanes,
                                                            centers.fill());
    });
  }

  // Columns of a group lie lane by lane, [lane][vector].
  const int columns = kCount * vectors;
  const int repeats = width / static_cast<int>(channels * inner);
  auto of_channel = [&](int k) {
    double a = 0, b = 0, c = 0, d = 0;  // in turn, so that additions do not wait for each other
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (int s = 0; s < inner; ++s) {
        const int at = (repeat * channels + k) * static_cast<int>(inner) + s;
        const double next = a + memory[at % kCount * vectors + at / kCount];
        a = b;
        b = c;
        c = d;
        d = next;
      }
    }
    return (a + b) + (c + d);
  };
  Sums* const partial = r.partial + chunk * r.extent.channels + first_channel;
  for (int which = 0; which < 2; ++which) {
    if (active) {
      BNEXT_UNROLL
      for (int lane = 0; lane < kCount; ++lane) {
        memory[row * columns + lane * vectors + column] = which == 0 ? sums[lane].first : sums[lane].second;
      }
    }
    sum_rows(memory, columns, height);
    for (int k = index; k < channels; k += threads) {
      (which == 0 ? partial[k].first : partial[k].second) = of_channel(k);
    }
    sync_block();
  }
  if (t.chunks == 1) {  // each channel's sums by the thread that wrote them
    for (int k = index; k < channels; k += threads) reducer.fold(first_channel + k, partial[k]);
    return;
  }
  if (!last_to_arrive(r.counters + group, static_cast<unsigned>(t.chunks))) return;
  total(r, first_channel, channels, memory,
        [&](int k, const Sums& all) { reducer.fold(first_channel + k, all); });
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

  const Center center = reducer.center(channel);
  typename Reducer::Centers centers;
  BNEXT_UNROLL
  for (int lane = 0; lane < kCount; ++lane) centers.set(lane, center);
  Sums sums;
  Walk walk(begin + thread_index(), threads, t.vectors);
  int64_t at = begin + thread_index();
  auto batch = [&]<int kCountOf>(Vectors<kCountOf>, auto load) {
    Vector16 raw[Reducer::kInputs][kCountOf];
    BNEXT_UNROLL
    for (int u = 0; u < kCountOf; ++u) {
      const int64_t run = (walk.row * r.extent.channels + channel) * inner;
      BNEXT_UNROLL
      for (int i = 0; i < Reducer::kInputs; ++i) raw[i][u] = load(i, u, run);
      walk.forward();
    }
    add_run<Reducer, kCountOf>(reducer, raw, center, sums);
    at += kCountOf * threads;
  };
  if (r.aligned) {
    while (at < end) {
      batch(Vectors<kVectors>{}, [&](int i, int u, int64_t run) {
        return at + u * threads < end ? reducer.input(i).template load<Reuse::yes>(run + walk.vector * kCount)
                                      : centers.fill();
      });
    }
  }
  const int phase = phase_of(reducer.input(0).data);  // the others are read as that one lies
  while (at < end) {
    batch(Vectors<kFew>{}, [&](int i, int u, int64_t run) {
      const Span span = span_of<kCount>(run, inner, walk.vector, phase);
      const int high = at + u * threads < end ? span.high : 0;
      return reducer.input(i).template load_any<Reuse::yes>(span.at, span.low, high, centers.fill());
    });
  }

  double* const memory = reinterpret_cast<double*>(block_memory());
  const Sums all = sum_block(sums, memory);
  if (t.chunks == 1) {
    if (thread_index() == 0) reducer.fold(channel, all);
    return;
  }
  if (thread_index() == 0) r.partial[chunk * r.extent.channels + channel] = all;
  if (!last_to_arrive(r.counters + channel, static_cast<unsigned>(t.chunks))) return;
  total(r, channel, 1, memory, [&](int, const Sums& sum) { reducer.fold(channel, sum); });
}

}  // namespace bnext::cuda
