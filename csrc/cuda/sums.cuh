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

// Of products, pairwise too: each of the first half is added as it is formed.
template <int kCount, class A>
BNEXT_DEVICE A sum_of_products(const A (&a)[kCount], const A (&b)[kCount]) {
  if constexpr (kCount == 1) {
    return a[0] * b[0];
  } else {
    constexpr int kHalf = kCount / 2;
    A half[kHalf];
    BNEXT_UNROLL
    for (int k = 0; k < kHalf; ++k) half[k] = multiply_add<A>(a[k], b[k], a[k + kHalf] * b[k + kHalf]);
    return sum_of<kHalf>(half);
  }
}

// One after another, but in turn, so that additions do not wait for each other.
class InTurn {
 public:
  BNEXT_DEVICE void add(double value) {
    const double next = a_ + value;
    a_ = b_;
    b_ = c_;
    c_ = d_;
    d_ = next;
  }
  BNEXT_DEVICE double sum() const { return (a_ + b_) + (c_ + d_); }

 private:
  double a_ = 0, b_ = 0, c_ = 0, d_ = 0;
};

// values[row][column] over rows, of which few are left: rows to[slice][column], seen by all threads, which
// have left their values. The order depends on the sizes alone; to: see sums_memory().
BNEXT_DEVICE int sum_rows(const double* values, int columns, int rows, double* to) {
  const int threads = static_cast<int>(thread_count()), most = threads / columns;
  int slices = 1;
  while (slices * slices < rows && 2 * slices <= most) slices *= 2;
  sync_block();
  for (int i = thread_index(); i < columns * slices; i += threads) {
    InTurn some;
    for (int at = i; at < columns * rows; at += columns * slices) some.add(values[at]);
    to[i] = some.sum();
  }
  sync_block();
  return slices;
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
