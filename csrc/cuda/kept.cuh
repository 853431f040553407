// What a resident kernel is told, and vectors as it keeps them in block memory or has them ahead in
// registers.
#pragma once

#include "cuda/batch.cuh"
#include "cuda/map.cuh"
#include "cuda/reduce.cuh"

namespace bnext::cuda {

struct Resident {
  Reduction reduction;  // groups: slabs, chunks: blocks of one; counters: one for all blocks, then per slab
  unsigned together;    // slabs under way at once
  int depth;            // vectors that a thread keeps of each input
  bool same_phase;      // all tensors begin at the same distance from a boundary of sixteen bytes
  bool whole;           // every place is a whole vector on a boundary
  bool clustered;       // blocks of a slab are a cluster
  bool bulk;            // copies are long ones, see bulk.cuh
  ResidentMemory memory;
  int64_t numel;
  int phase;  // elements from a boundary to output 0 of the map

  BNEXT_DEVICE unsigned* counter_of_all() const { return reduction.counters; }
  BNEXT_DEVICE unsigned* counter_of(unsigned group) const { return reduction.counters + 1 + group; }
};

// The calling thread's vectors in block memory.
struct Kept {
  Vector16* first;
  int threads, depth;

  BNEXT_DEVICE Vector16& at(int input, int k) const { return first[(input * depth + k) * threads]; }
  BNEXT_DEVICE static Vector16* of_all() { return reinterpret_cast<Vector16*>(block_memory()); }
  BNEXT_DEVICE Vector16* of_block(int input) const { return of_all() + input * depth * threads; }
};

// Whether all of a vector is there and lies on a boundary, in all tensors of one phase.
template <int kCount>
BNEXT_DEVICE bool is_whole(const Span& place, int64_t numel, int phase) {
  return place.low <= 0 && place.high >= kCount && place.at >= 0 && place.at + kCount <= numel &&
         (place.at + phase) % kCount == 0;
}

// f(lane, e) for every lane of a place, e: where its element lies, negative if there is none. A loop, since
// few vectors need it, and by block memory, for registers have no such index.
template <int kCount, class F>
BNEXT_DEVICE void each_lane(const Span& place, int64_t numel, F f) {
  BNEXT_NO_UNROLL
  for (int lane = 0; lane < kCount; ++lane) {
    const int64_t e = place.at + lane;
    f(lane, lane >= place.low && lane < place.high && e < numel ? e : -1);
  }
}

// What a map reads of memory besides what is kept, a few vectors ahead.
template <class Map, int kKept>
struct Ahead {
  static constexpr bool kAny = Map::kInputs > kKept || Map::kReadsMask;
  static constexpr int kVectors = kAny ? kMapVectors : 1;

  Batch<Map, kVectors> batch{};

  // The vector `kVectors` after the first takes the last place.
  BNEXT_DEVICE void push(const Map& map, const Span& place) {
    if constexpr (!kAny) return;
    Batch<Map, 1> last;
    const Span places[1] = {place};
    BNEXT_UNROLL
    for (int i = kKept; i < Map::kInputs; ++i) {
      load_input<Reuse::no>(map, i, places, last);
      BNEXT_UNROLL
      for (int u = 1; u < kVectors; ++u) batch.input[i][u - 1] = batch.input[i][u];
      batch.input[i][kVectors - 1] = last.input[i][0];
    }
    load_bits(map, places, last);
    BNEXT_UNROLL
    for (int u = 1; u < kVectors; ++u) batch.bits[u - 1] = batch.bits[u];
    batch.bits[kVectors - 1] = last.bits[0];
  }
};

}  // namespace bnext::cuda
