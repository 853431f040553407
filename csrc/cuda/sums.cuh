// Sums in a fixed order: of a batch in registers, over the threads of a block.
#pragma once

#include "cuda/primitives.cuh"
#include "formulas.h"

namespace bnext::cuda {

// Pairwise: log2(kCount) roundings, none where all values are the same.
template <int kCount, class A>
BNEXT_DEVICE A sum_of(const A (&values)[kCount]) {
  A half[kCount];
  BNEXT_UNROLL
  for (int k = 0; k < kCount; ++k) half[k] = values[k];
  BNEXT_UNROLL
  for (int n = kCount / 2; n > 0; n /= 2) {
    BNEXT_UNROLL
    for (int k = 0; k < n; ++k) half[k] += half[k + n];
  }
  return half[0];
}

// values[row][column] over rows, into row 0; the order depends on the sizes alone.
BNEXT_DEVICE void sum_rows(double* values, int columns, int rows) {
  sync_block();
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    for (int i = thread_index(); i < (rows - half) * columns; i += thread_count()) {
      values[i] += values[half * columns + i];
    }
    rows = half;
    sync_block();
  }
}

// The sum over the block's threads, in thread 0; nobody else uses the memory meanwhile.
BNEXT_DEVICE Sums sum_block(Sums sums, double* memory) {
  for (int mask = 16; mask > 0; mask /= 2) {
    sums += {exchange(sums.first, mask), exchange(sums.second, mask)};
  }
  const int index = static_cast<int>(thread_index()), warps = static_cast<int>(thread_count()) / 32;
  if (index % 32 == 0) {
    memory[index / 32] = sums.first;
    memory[warps + index / 32] = sums.second;
  }
  sync_block();
  Sums all;
  if (index == 0) {
    for (int w = 0; w < warps; ++w) all += {memory[w], memory[warps + w]};
  }
  return all;
}

}  // namespace bnext::cuda
