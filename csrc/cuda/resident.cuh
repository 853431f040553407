// One kernel for a direction: a group of blocks owns a slab of channels, copies it to block memory once,
// sums, waits until the group has, and maps what it kept. For any reducer and map that number their inputs
// alike; what the map reads besides comes from memory. Partial sums are added in the order of chunks by every
// block of the group, so that all have the same bits without a second wait.
#pragma once

#include "cuda/map.cuh"
#include "cuda/primitives_together.cuh"
#include "cuda/reduce.cuh"
#include "cuda/slabs.cuh"

namespace bnext::cuda {

struct Resident {
  Reduction reduction;  // groups: slabs, chunks: blocks of one; counters: one for all blocks, then per slab
  unsigned together;    // slabs under way at once
  int depth;            // vectors that a thread keeps of each input
  bool same_phase;      // all tensors begin at the same distance from a boundary of sixteen bytes
  ResidentMemory memory;

  BNEXT_DEVICE unsigned* counter_of_all() const { return reduction.counters; }
  BNEXT_DEVICE unsigned* counter_of(unsigned group) const { return reduction.counters + 1 + group; }
};

// Batches of copies that a thread has under way.
constexpr int kBatchesAhead = 4;

// The calling thread's vectors in block memory.
struct Kept {
  Vector16* first;
  int threads, depth;

  BNEXT_DEVICE Vector16& at(int input, int k) const { return first[(input * depth + k) * threads]; }
};

// Whether all of a vector is there and lies on a boundary, in all tensors of one phase.
template <int kCount>
BNEXT_DEVICE bool is_whole(const Span& place, int64_t numel, int phase) {
  return place.low <= 0 && place.high >= kCount && place.at >= 0 && place.at + kCount <= numel &&
         (place.at + phase) % kCount == 0;
}

// Elements of a place, wherever it lies; others are zero. It reads nothing that belongs to other places,
// which another block may be writing to.
template <class T>
BNEXT_DEVICE Vector16 load_elements(const Input<T>& input, const Span& place) {
  Vector16 v{};
  BNEXT_UNROLL
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const int64_t e = place.at + lane;
    if (lane >= place.low && lane < place.high && e >= 0 && e < input.numel) {
      set_element_bits<T>(v, lane, reinterpret_cast<const bits_t<T>*>(input.data)[e]);
    }
  }
  return v;
}

// The vector with what adds nothing where its place has no element.
template <class T>
BNEXT_DEVICE Vector16 filled(Vector16 v, const Vector16& fill, const Span& place, int64_t numel) {
  BNEXT_UNROLL
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const int64_t e = place.at + lane;
    if (lane < place.low || lane >= place.high || e < 0 || e >= numel) {
      set_element_bits<T>(v, lane, element_bits<T>(fill, lane));
    }
  }
  return v;
}

template <class Slab, class Reducer, class Map>
struct ResidentBlock {
  using T = typename Reducer::Storage;
  using Math = typename Reducer::Math;
  using Center = typename Reducer::Center;
  static constexpr int kCount = kLanes<T>, kVectors = Slab::kVectors, kInputs = Reducer::kInputs;
  static constexpr int kCoefficients = Map::kCoefficients;
  static_assert(sizeof(Center) <= ResidentMemory::kMostCenter);
  static_assert(kCoefficients <= ResidentMemory::kMostCoefficients && sizeof(Math) == sizeof(float));

  const Resident& r;
  const Reducer& reducer;
  const Map& map;
  int64_t numel;
  int phase;
  Kept kept;

  BNEXT_DEVICE ResidentBlock(const Resident& r, const Reducer& reducer, const Map& map)
      : r(r),
        reducer(reducer),
        map(map),
        numel(r.reduction.extent.numel()),
        phase(phase_of(map.output(0).data)),
        kept{reinterpret_cast<Vector16*>(block_memory()) + thread_index(), static_cast<int>(thread_count()),
             r.depth} {}

  template <class Value>
  BNEXT_DEVICE Value* memory(int64_t offset) const {
    return reinterpret_cast<Value*>(block_memory() + offset);
  }
  BNEXT_DEVICE bool is_there(int input) const {
    return input < Reducer::kSureInputs || reducer.input(input).data != nullptr;
  }
  BNEXT_DEVICE bool is_whole(const Span& place) const {
    return r.same_phase && cuda::is_whole<kCount>(place, numel, phase);
  }

  BNEXT_DEVICE void copy(const Span& place, int k) const {
    const bool whole = is_whole(place);
    BNEXT_UNROLL
    for (int i = 0; i < kInputs; ++i) {
      if (!is_there(i)) continue;
      const Input<T> input = reducer.input(i);
      if (whole) {
        begin_copy(&kept.at(i, k), input.data + place.at);
      } else {
        kept.at(i, k) = load_elements(input, place);
      }
    }
  }

  // The sums of this block's share into to[channel of the slab]; leaves the centers of its channels.
  BNEXT_DEVICE void reduce(const Slab& slab, Center* centers, Sums* to) const {
    auto ahead = slab.places();
    int begun = 0;
    const auto begin_batch = [&] {
      BNEXT_NO_UNROLL
      for (int u = 0; u < kVectors && begun < slab.count; ++u) {
        copy(ahead.place(), begun++);
        ahead.forward();
      }
      commit_copies();
    };
    BNEXT_NO_UNROLL
    for (int batch = 0; batch < kBatchesAhead; ++batch) begin_batch();

    for (int k = thread_index(); k < slab.channels; k += thread_count()) {
      centers[k] = reducer.center(slab.first_channel + k);
    }
    sync_block();
    typename Reducer::Centers held;
    BNEXT_UNROLL
    for (int lane = 0; lane < kCount; ++lane) {
      const int k = slab.channel(lane);
      held.set(lane, k < 0 ? Center{} : centers[k]);
    }
    const Vector16 fill = held.fill();

    Sums sums[Slab::kSums];
    auto at = slab.places();
    BNEXT_NO_UNROLL
    for (int k = 0; k < slab.count; k += kVectors) {
      begin_batch();
      wait_for_copies<kBatchesAhead>();
      Span places[kVectors];
      Batch<Reducer, kVectors> batch;
      BNEXT_UNROLL
      for (int u = 0; u < kVectors; ++u) {
        places[u] = k + u < slab.count ? at.place() : Span{0, 0, 0};
        at.forward();
      }
      BNEXT_UNROLL
      for (int i = 0; i < kInputs; ++i) {
        BNEXT_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          batch.input[i][u] = fill;
          if (places[u].high > 0 && is_there(i)) {
            batch.input[i][u] = kept.at(i, k + u);
            if (!is_whole(places[u]))
              batch.input[i][u] = filled<T>(batch.input[i][u], fill, places[u], numel);
          }
        }
      }
      load_bits<false>(reducer, places, batch);
      slab.add(reducer, batch, held, sums);
    }
    slab.add_up(sums, memory<double>(r.memory.values), to);
  }

  template <bool kWhole, int kBatch, class Coefficient>
  BNEXT_DEVICE void write(const Span (&places)[kBatch], int k, Coefficient coefficient) const {
    Batch<Map, kBatch> batch;
    BNEXT_UNROLL
    for (int i = 0; i < Map::kInputs; ++i) {
      if (i >= kInputs) {
        load_input<Reuse::no, kWhole>(map, i, places, Vector16{}, batch);
      } else {
        BNEXT_UNROLL
        for (int u = 0; u < kBatch; ++u) {
          batch.input[i][u] = places[u].high > 0 && is_there(i) ? kept.at(i, k + u) : Vector16{};
        }
      }
    }
    load_bits<kWhole>(map, places, batch);
    write_batch<kWhole>(map, places, batch, coefficient);
  }

  // values: [coefficient][channel of the slab].
  BNEXT_DEVICE void write_all(const Slab& slab, const Math* values) const {
    Math held[kCoefficients][Slab::kSums];
    BNEXT_UNROLL
    for (int k = 0; k < kCoefficients; ++k) {
      BNEXT_UNROLL
      for (int lane = 0; lane < Slab::kSums; ++lane) {
        const int c = slab.channel(lane);
        held[k][lane] = c < 0 ? Math{} : values[k * slab.channels + c];
      }
    }
    const auto coefficient = [&](int k, int lane) { return held[k][Slab::kSums == 1 ? 0 : lane]; };
    auto at = slab.places();
    BNEXT_NO_UNROLL
    for (int k = 0; k < slab.count;) {
      Span places[kMapVectors];
      bool whole = k + kMapVectors <= slab.count;
      auto next = at;
      BNEXT_UNROLL
      for (int u = 0; u < kMapVectors; ++u) {
        places[u] = next.place();
        whole = whole && is_whole(places[u]);
        next.forward();
      }
      if (whole) {
        write<true>(places, k, coefficient);
        at = next;
        k += kMapVectors;
      } else {
        const Span single[1] = {at.place()};
        write<false>(single, k, coefficient);
        at.forward();
        ++k;
      }
    }
  }

  // All slabs of this block's group, one after another.
  BNEXT_DEVICE void run() const {
    const Tiling& t = r.reduction.tiling;
    const unsigned group = block_index() % r.together, chunk = block_index() / r.together;
    const unsigned chunks = static_cast<unsigned>(t.chunks);
    Center* const centers = memory<Center>(r.memory.centers);
    Sums* const totals = memory<Sums>(r.memory.totals);
    Math* const values = memory<Math>(r.memory.coefficients);
    unsigned* const counter = r.counter_of(group);
    unsigned arrivals = 0;
    for (int64_t number = group; number < t.groups; number += r.together) {
      const Slab slab(r.reduction, number, chunk, phase);
      const auto fold = [&](int k, const Sums& sums) {
        const int64_t c = slab.first_channel + k;
        Math of_channel[kCoefficients];
        map.coefficients(c, centers[k], sums, of_channel);
        BNEXT_UNROLL
        for (int i = 0; i < kCoefficients; ++i) values[i * slab.channels + k] = of_channel[i];
        if (chunk == 0) reducer.fold(c, centers[k], sums);
      };
      if (chunks == 1) {
        reduce(slab, centers, totals);
        for (int k = thread_index(); k < slab.channels; k += thread_count()) fold(k, totals[k]);
      } else {
        const int64_t channels = r.reduction.extent.channels;
        reduce(slab, centers, r.reduction.partial + chunk * channels + slab.first_channel);
        arrive_and_wait(counter, arrivals += chunks);
        total(r.reduction, slab.first_channel, slab.channels, memory<double>(r.memory.values), fold);
      }
      sync_block();
      write_all(slab, values);
      sync_block();
    }
    if (chunks > 1) leave_group(counter, arrivals + chunks);
  }
};

template <Traversal kTraversal, class Reducer, class Map>
BNEXT_DEVICE void resident(const Resident& r, const Reducer& reducer, const Map& map) {
  using Slab = std::conditional_t<kTraversal == Traversal::rows, RowsSlab<Reducer>, PlanesSlab<Reducer>>;
  ResidentBlock<Slab, Reducer, Map>(r, reducer, map).run();
}

}  // namespace bnext::cuda
