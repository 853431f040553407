// One kernel for a direction: a group of blocks owns a slab of channels, copies it to block memory once,
// sums, waits until the group has, and maps what it kept. For any reducer and map that number their inputs
// alike; what the map reads besides comes from memory. Partial sums are added in the order of chunks by every
// block of the group, so that all have the same bits without a second wait.
#pragma once

#include "cuda/bulk.cuh"
#include "cuda/groups.cuh"
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
  Kept kept;

  BNEXT_DEVICE ResidentBlock(const Resident& r, const Reducer& reducer, const Map& map)
      : r(r),
        reducer(reducer),
        map(map),
        kept{Kept::of_all() + thread_index(), static_cast<int>(thread_count()), r.depth} {}

  template <class Value>
  BNEXT_DEVICE Value* memory(int64_t offset) const {
    return reinterpret_cast<Value*>(block_memory() + offset);
  }
  BNEXT_DEVICE bool is_there(int input) const {
    return input < Reducer::kSureInputs || reducer.input(input).data != nullptr;
  }
  BNEXT_DEVICE bool is_whole(const Span& place) const {
    return r.same_phase && cuda::is_whole<kCount>(place, r.numel, r.phase);
  }

  BNEXT_DEVICE unsigned& turn() const { return *memory<unsigned>(r.memory.turn); }

  BNEXT_DEVICE bits_t<T>* lanes(int input, int k) const {
    return reinterpret_cast<bits_t<T>*>(&kept.at(input, k));
  }

  // What is read of memory belongs to this place alone: another block may be writing to the next. Lanes
  // without an element get zero.
  BNEXT_DEVICE void copy(const Span& place, int k) const {
    const bool whole = is_whole(place);
    BNEXT_UNROLL
    for (int i = 0; i < kInputs; ++i) {
      if (!is_there(i)) continue;
      const T* const data = reducer.input(i).data;
      if (whole) {
        begin_copy(&kept.at(i, k), data + place.at);
      } else {
        bits_t<T>* const to = lanes(i, k);
        each_lane<kCount>(place, r.numel, [&](int lane, int64_t e) {
          to[lane] = e >= 0 ? reinterpret_cast<const bits_t<T>*>(data)[e] : bits_t<T>{0};
        });
      }
    }
  }

  BNEXT_DEVICE void begin_copies(const Slab& slab) const {
    if (r.bulk) {
      const Group group{r};
      return begin_bulk_copies(reducer, Slab::runs(r.reduction, group.slab(turn()), group.rank()), kept,
                               kVectors, memory<uint64_t>(r.memory.barriers),
                               [&](int i) { return is_there(i); });
    }
    auto ahead = slab.places();
    BNEXT_NO_UNROLL
    for (int k = 0; k < slab.count; ++k) {
      copy(ahead.place(), k);
      ahead.forward();
      if (k % kVectors == kVectors - 1 || k == slab.count - 1) commit_copies();
    }
  }

  // For the vectors from k on that are added at a time, of those of the calling thread.
  BNEXT_DEVICE void wait_for(const Slab& slab, int k) const {
    if (r.bulk) return wait_for_bytes(memory<uint64_t>(r.memory.barriers) + k / kVectors, turn());
    wait_for_copies((slab.count - 1 - k) / kVectors);
  }

  // The sums of this thread's vectors; leaves the centers of the slab's channels.
  BNEXT_DEVICE void reduce(Center* centers, Sums (&sums)[Slab::kSums]) const {
    const Group group{r};
    const Slab slab(r.reduction, group.slab(turn()), group.rank(), r.phase);
    begin_copies(slab);
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

    auto at = slab.places();
    BNEXT_NO_UNROLL
    for (int k = 0; k < slab.count; k += kVectors) {
      Batch<Reducer, kVectors> batch;
      Span places[kVectors] = {};
      BNEXT_UNROLL
      for (int u = 0; u < kVectors; ++u) {
        if (k + u < slab.count) places[u] = at.place();
        at.forward();
        if (r.whole) {
          batch.there[u] = k + u < slab.count ? (1u << kCount) - 1 : 0;
        } else {
          const int64_t left = r.numel - places[u].at;
          const int high = left < places[u].high ? static_cast<int>(left) : places[u].high;
          batch.there[u] = lanes_there<kCount>({0, places[u].low, high});
        }
      }
      load_bits(reducer, places, batch);
      wait_for(slab, k);
      BNEXT_UNROLL
      for (int i = 0; i < kInputs; ++i) {
        BNEXT_UNROLL
        for (int u = 0; u < kVectors; ++u) {
          batch.input[i][u] = is_there(i) && k + u < slab.count ? kept.at(i, k + u) : Vector16{};
        }
      }
      slab.add(reducer, batch, held, sums);
    }
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
        each_lane<kCount>(place, r.numel, [&](int lane, int64_t e) {
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
    const unsigned chunks = static_cast<unsigned>(t.chunks);
    Center* const centers = memory<Center>(r.memory.centers);
    Sums* const totals = memory<Sums>(r.memory.totals);
    Math* const values = memory<Math>(r.memory.coefficients);
    const Group group{r};
    for (int k = thread_index(); r.bulk && k < r.depth; k += thread_count()) {
      prepare_barrier(memory<uint64_t>(r.memory.barriers) + k);
    }
    if (thread_index() == 0) turn() = 0;
    sync_block();
    while (group.slab(turn()) < static_cast<unsigned>(t.groups)) {
      Sums sums[Slab::kSums];
      reduce(centers, sums);

      const Slab slab(r.reduction, group.slab(turn()), group.rank(), r.phase);
      slab.add_up(sums, memory<double>(r.memory.values),
                  chunks == 1 ? totals : group.part(slab.first_channel));
      if (chunks > 1) {
        group.meet(turn());
        total(
            static_cast<int>(chunks), slab.channels, memory<double>(r.memory.values),
            [&](int rank, int k) { return group.part_of(rank, slab.first_channel, k); },
            [&](int k, const Sums& sums) { totals[k] = sums; });
        group.has_read();
        sync_block();
      }
      for (int k = thread_index(); k < slab.channels; k += thread_count()) {
        const int64_t c = slab.first_channel + k;
        Math of_channel[kCoefficients];
        map.coefficients(c, centers[k], totals[k], of_channel);
        BNEXT_UNROLL
        for (int i = 0; i < kCoefficients; ++i) values[i * slab.channels + k] = of_channel[i];
        if (group.rank() == 0) reducer.fold(c, centers[k], totals[k]);
      }
      sync_block();
      write_all(slab, values);
      if (r.bulk) yield_to_bulk_copies();
      if (thread_index() == 0) ++turn();
      sync_block();
    }
    if (chunks > 1) group.leave(turn());
  }
};

template <Traversal kTraversal, class Reducer, class Map>
BNEXT_DEVICE void resident(const Resident& r, const Reducer& reducer, const Map& map) {
  using Slab = std::conditional_t<kTraversal == Traversal::rows, RowsSlab<Reducer>, PlanesSlab<Reducer>>;
  ResidentBlock<Slab, Reducer, Map>(r, reducer, map).run();
}

}  // namespace bnext::cuda
