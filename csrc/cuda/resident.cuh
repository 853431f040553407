// One kernel for a direction: a group of blocks owns a slab of channels, copies it to block memory once,
// sums, waits until the group has, and maps what it kept. For any reducer and map that number their inputs
// alike; what the map reads besides comes from memory. Partial sums are added in the order of chunks by every
// block of the group, so that all have the same bits without a second wait.
#pragma once

#include "cuda/kept.cuh"
#include "cuda/map.cuh"
#include "cuda/primitives_together.cuh"
#include "cuda/reduce.cuh"
#include "cuda/slabs.cuh"

namespace bnext::cuda {

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

  BNEXT_DEVICE bits_t<T>* lanes(int input, int k) const {
    return reinterpret_cast<bits_t<T>*>(&kept.at(input, k));
  }

  // What is read of memory belongs to this place alone: another block may be writing to the next. Lanes
  // without an element get what adds nothing.
  BNEXT_DEVICE void copy(const Slab& slab, const Center* centers, const Span& place, int k) const {
    const bool whole = is_whole(place);
    BNEXT_UNROLL
    for (int i = 0; i < kInputs; ++i) {
      if (!is_there(i)) continue;
      const T* const data = reducer.input(i).data;
      if (whole) {
        begin_copy(&kept.at(i, k), data + place.at);
      } else {
        bits_t<T>* const to = lanes(i, k);
        each_lane<kCount>(place, numel, [&](int lane, int64_t e) {
          const int c = slab.channel(lane);
          to[lane] = e >= 0  ? reinterpret_cast<const bits_t<T>*>(data)[e]
                     : c < 0 ? bits_t<T>{0}
                             : Reducer::fill(centers[c]);
        });
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
        copy(slab, centers, ahead.place(), begun++);
        ahead.forward();
      }
      commit_copies();
    };
    // Parts of vectors are filled up with centers, which otherwise can wait for copies to be under way.
    BNEXT_NO_UNROLL
    for (int batch = r.whole ? 0 : -1; batch < kBatchesAhead + int{r.whole}; ++batch) {
      if (batch == (r.whole ? kBatchesAhead : -1)) {
        for (int k = thread_index(); k < slab.channels; k += thread_count()) {
          centers[k] = reducer.center(slab.first_channel + k);
        }
        sync_block();
      } else {
        begin_batch();
      }
    }
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
      Batch<Reducer, kVectors> batch;
      Span places[kVectors] = {};
      if constexpr (Reducer::kReadsMask) {
        BNEXT_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          if (k + u < slab.count) places[u] = at.place();
          at.forward();
        }
      }
      load_bits<false>(reducer, places, batch);
      begin_batch();
      wait_for_copies<kBatchesAhead>();
      BNEXT_UNROLL
      for (int i = 0; i < kInputs; ++i) {
        BNEXT_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          batch.input[i][u] = is_there(i) && k + u < slab.count ? kept.at(i, k + u) : fill;
        }
      }
      slab.add(reducer, batch, held, sums);
    }
    slab.add_up(sums, memory<double>(r.memory.values), to);
  }

  // Outputs of a vector; those of a part of one by way of what was kept of it.
  BNEXT_DEVICE void write(const Span& place, int k, const Math (&out)[Map::kOutputs][kCount]) const {
    const bool whole = is_whole(place);
    BNEXT_UNROLL
    for (int i = 0; i < Map::kOutputs; ++i) {
      if (!writes(map, i)) continue;
      const Output<T> output = map.output(i);
      const Vector16 v = pack<T>(out[i]);
      if (whole) {
        output.store(place.at, v);
      } else {
        kept.at(0, k) = v;
        const bits_t<T>* const from = lanes(0, k);
        each_lane<kCount>(place, numel, [&](int lane, int64_t e) {
          if (e >= 0) store(reinterpret_cast<bits_t<T>*>(output.data) + e, from[lane]);
        });
      }
    }
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
    Ahead<Map, kInputs> besides;
    auto at = slab.places(), next = at;
    int pushed = 0;
    const auto push = [&] {
      besides.push(map, pushed++ < slab.count ? next.place() : Span{0, 0, 0});
      next.forward();
    };
    BNEXT_NO_UNROLL
    for (int u = 0; u < besides.kVectors; ++u) push();
    BNEXT_NO_UNROLL
    for (int k = 0; k < slab.count; ++k) {
      Elements<Map, kCount> elements;
      Math out[Map::kOutputs][kCount];
      BNEXT_UNROLL
      for (int i = 0; i < Map::kInputs && i < kInputs; ++i) {
        besides.batch.input[i][0] = is_there(i) ? kept.at(i, k) : Vector16{};
      }
      BNEXT_UNROLL
      for (int lane = 0; lane < kCount; ++lane) elements.take(lane, besides.batch, 0, lane);
      const Span place = at.place();
      at.forward();
      push();
      const uint32_t bits = map.values(elements, coefficient, out);
      write(place, k, out);
      if constexpr (Map::kWritesMask) {
        const MaskOutput mask = map.mask();
        if (mask.data != nullptr) mask.write<kCount, false>(place, bits);
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
      if (chunks == 1) {
        reduce(slab, centers, totals);
      } else {
        reduce(slab, centers, r.reduction.partial + chunk * r.reduction.extent.channels + slab.first_channel);
        arrive_and_wait(counter, arrivals += chunks);
        total(r.reduction, slab.first_channel, slab.channels, memory<double>(r.memory.values),
              [&](int k, const Sums& sums) { totals[k] = sums; });
        sync_block();
      }
      for (int k = thread_index(); k < slab.channels; k += thread_count()) {
        const int64_t c = slab.first_channel + k;
        Math of_channel[kCoefficients];
        map.coefficients(c, centers[k], totals[k], of_channel);
        BNEXT_UNROLL
        for (int i = 0; i < kCoefficients; ++i) values[i * slab.channels + k] = of_channel[i];
        if (chunk == 0) reducer.fold(c, centers[k], totals[k]);
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
