// The blocks that share a slab, and how they pass each other their sums: a cluster, by the memory of its
// blocks; any other blocks that run at the same time, by memory of the device and a counter.
#pragma once

#include "cuda/kept.cuh"
#include "cuda/primitives_together.cuh"

namespace bnext::cuda {

// This block's group. Blocks that follow one another share a slab: two on one multiprocessor, which the
// device deals out further apart, then have different ones, and one loads while the other waits.
struct Group {
  const Resident& r;

  BNEXT_DEVICE unsigned blocks() const { return static_cast<unsigned>(r.reduction.tiling.chunks); }
  BNEXT_DEVICE unsigned number() const { return block_index() / blocks(); }
  BNEXT_DEVICE unsigned rank() const { return static_cast<unsigned>(anew(block_index())) % blocks(); }
  BNEXT_DEVICE unsigned slab(unsigned turn) const {
    return static_cast<unsigned>(anew(block_index())) / blocks() + turn * r.together;
  }

  // Where this block leaves its sums of channels from the first of a slab on.
  BNEXT_DEVICE Sums* part(int64_t first_channel) const {
    return r.clustered ? own_part() : r.reduction.part(rank(), first_channel);
  }

  // Of another block, after meet().
  BNEXT_DEVICE Vector16 part_of(unsigned rank, int64_t first_channel, int k) const {
    return r.clustered ? load16_in_cluster(own_part() + k, rank)
                       : load16_fresh(r.reduction.part(rank, first_channel + k));
  }

  // Waits for the others, each of which has left its sums of its slab number `turn`.
  BNEXT_DEVICE void meet(unsigned turn) const {
    if (!r.clustered) return arrive_and_wait(r.counter_of(number()), (turn + 1) * blocks());
    arrive_at_cluster();
    wait_for_cluster();
  }

  // After the last turn, of which there is but one in a cluster: whoever ends takes its memory along.
  BNEXT_DEVICE void has_read() const {
    if (r.clustered) arrive_at_cluster();
  }
  BNEXT_DEVICE void leave(unsigned turns) const {
    if (!r.clustered) return leave_group(r.counter_of(number()), (turns + 1) * blocks());
    wait_for_cluster();
  }

 private:
  BNEXT_DEVICE Sums* own_part() const { return reinterpret_cast<Sums*>(block_memory() + r.memory.part); }
};

}  // namespace bnext::cuda
