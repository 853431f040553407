// A block's vectors to its memory in pieces as long as they lie together, each by one instruction.
#pragma once

#include "cuda/batch.cuh"
#include "cuda/kept.cuh"
#include "cuda/primitives_together.cuh"
#include "cuda/tensors.cuh"

namespace bnext::cuda {

// Vectors of a channel or slab, numbered run by run; those of a block follow one another.
struct Runs {
  int64_t base, stride;  // elements: where run 0 begins, from one run to the next
  int64_t length;        // vectors of a run
  int64_t begin, end;    // of the block
};

// Copies for all threads of the block, by its first warp: `count` vectors of a thread to a barrier.
template <class Operation, class IsThere>
BNEXT_DEVICE void begin_bulk_copies(const Operation& operation, const Runs& runs, const Kept& kept, int count,
                                    uint64_t* barriers, IsThere is_there) {
  using T = typename Operation::Storage;
  constexpr int kInputs = Operation::kInputs;
  if (thread_index() >= kWarp) return;
  int inputs = 0;
  BNEXT_UNROLL
  for (int i = 0; i < kInputs; ++i) inputs += int{is_there(i)};
  const int64_t step = int64_t{count} * kept.threads;
  BNEXT_NO_UNROLL
  for (int64_t first = runs.begin; first < runs.end; first += step, ++barriers) {
    const int64_t end = min_of(first + step, runs.end);
    if (thread_index() == 0)
      expect_bytes(barriers, static_cast<unsigned>((end - first) * inputs) * kVectorBytes);
    BNEXT_NO_UNROLL
    for (int64_t run = first / runs.length + thread_index(); run * runs.length < end; run += kWarp) {
      const int64_t in_front = run * runs.length, behind = in_front + runs.length;
      const int64_t from = in_front > first ? in_front : first, to = min_of(behind, end);
      const int64_t e = runs.base + run * runs.stride + (from - in_front) * kLanes<T>;
      BNEXT_UNROLL
      for (int i = 0; i < kInputs; ++i) {
        if (!is_there(i)) continue;
        begin_bulk_copy(kept.of_block(i) + (from - runs.begin), operation.input(i).data + e,
                        static_cast<unsigned>(to - from) * kVectorBytes, barriers);
      }
    }
  }
}

}  // namespace bnext::cuda
