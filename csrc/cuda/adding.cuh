// Batches of vectors into sums over channels, for any reducer.
//
// A Reducer is an operation over elements (see batch.cuh) and has
// - Center center(channel): what deviations are taken from, and what else elements of the channel need;
// - Centers, those of a vector: set(lane, center) and at(lane);
// - add(sums, elements, center), for elements of one channel; it leaves what output(i) gets in values[i].
//   Those that are not there are zero, or, if it takes sums kAroundFirst, like the first that is;
// - fold(channel, center, sums), what follows once per channel, and fetch_for_fold(channel), what that reads,
//   towards L2;
// - kVectors of a run, or kRowVectors one beneath the other, in flight at a time; kKeptVectors of the latter,
//   out of block memory; and kColumnBatch, how many of a column at most are summed before their sums are
//   added in double. On the last three the bits of sums depend;
// - kReuse: whether a map comes after it;
// - phase(), of the tensor on whose boundaries the vectors of planes should lie.
#pragma once

#include "cuda/batch.cuh"
#include "cuda/sums.cuh"
#include "formulas.h"

namespace bnext::cuda {

// What add() left of an element, back into the batch, if it is to be written.
template <class Reducer, class Batch, int kCount>
BNEXT_DEVICE void put_back(const Reducer& reducer, Batch& batch, int vector, int lane,
                           const Elements<Reducer, kCount>& elements, int k) {
  BNEXT_UNROLL
  for (int i = 0; i < Reducer::kOutputs; ++i) {
    if (writes(reducer, i)) {
      set_element<typename Reducer::Storage>(batch.input[i][vector], lane, elements.values[i][k]);
    }
  }
}

// A batch of vectors, one beneath the other: lane by lane into sums[lane], some of the lanes.
template <int kFirst, int kEnd, class Reducer, int kVectors, bool kWhole>
BNEXT_DEVICE void add_columns(const Reducer& reducer, Batch<Reducer, kVectors, kWhole>& batch,
                              const typename Reducer::Centers& centers, Sums* sums) {
  constexpr int kTogether = min_of(kVectors, Reducer::kColumnBatch);
  static_assert(kTogether == kVectors || !Reducer::kAroundFirst);
  if constexpr (Reducer::kAroundFirst && kWhole) {
    BNEXT_UNROLL
    for (int u = 1; u < kVectors; ++u) {
      if (batch.there[u] == 0) batch.input[0][u] = batch.input[0][0];
    }
  }
  BNEXT_UNROLL
  for (int lane = kFirst; lane < kEnd; ++lane) {
    BNEXT_UNROLL
    for (int first = 0; first < kVectors; first += kTogether) {
      Elements<Reducer, kTogether> elements;
      elements.count = 0;
      BNEXT_UNROLL
      for (int u = 0; u < kTogether; ++u) {
        const bool there = (batch.there[first + u] >> lane & 1) != 0;
        elements.count += int{there};
        elements.take(u, batch, first + u, lane);
        if (Reducer::kAroundFirst && !kWhole && !there) elements.values[0][u] = elements.values[0][0];
      }
      reducer.add(sums[lane], elements, centers.at(lane));
      BNEXT_UNROLL
      for (int u = 0; u < kTogether; ++u) put_back(reducer, batch, first + u, lane, elements, u);
    }
  }
}

// All of the lanes. more: positive, but as far as the compiler knows the next part may never come: otherwise
// it has all lanes under way at once, in more registers than a thread has.
template <int kParts, int kPart = 0, class Reducer, class Batch>
BNEXT_DEVICE void add_in_parts(const Reducer& reducer, Batch& batch, const typename Reducer::Centers& centers,
                               Sums* sums, int more) {
  constexpr int kCount = kLanes<typename Reducer::Storage>, kLast = min_of(kParts, kCount) - 1;
  add_columns<kPart * kCount / (kLast + 1), (kPart + 1) * kCount / (kLast + 1)>(reducer, batch, centers,
                                                                                sums);
  if constexpr (kPart < kLast) {
    if (more > 0) add_in_parts<kParts, kPart + 1>(reducer, batch, centers, sums, more);
  }
}

// Elements of a run that are summed before their sums are added in double; of doubles, whose registers are
// twice as many, half.
template <class T>
constexpr int kRunBatch = sizeof(T) == 8 ? 4 : 8;

// Some vectors of one channel, from `begin` on: what is not there becomes like the first element that is.
// Returns how many are.
template <int kTogether, class Reducer, int kVectors, bool kWhole>
BNEXT_DEVICE int like_first(Batch<Reducer, kVectors, kWhole>& batch, int begin) {
  using T = typename Reducer::Storage;
  constexpr int kCount = kLanes<T>, kAll = kTogether * kCount;
  int count = 0;
  BNEXT_UNROLL
  for (int u = 0; u < kTogether; ++u) count += count_bits(batch.there[begin + u]);
  if constexpr (!Reducer::kAroundFirst || (kWhole && kTogether == 1)) return count;  // of none, zeros will do
  if (count == kAll) return count;
  bits_t<T> first = 0;
  BNEXT_UNROLL
  for (int k = kWhole ? 0 : kAll - 1; k >= 0; --k) {
    if (kWhole || (batch.there[begin + k / kCount] >> k % kCount & 1) != 0)
      first = element_bits<T>(batch.input[0][begin + k / kCount], k % kCount);
  }
  BNEXT_UNROLL
  for (int k = 0; k < kAll; ++k) {
    if ((batch.there[begin + k / kCount] >> k % kCount & 1) == 0)
      set_element_bits<T>(batch.input[0][begin + k / kCount], k % kCount, first);
  }
  return count;
}

// The same of one channel: all lanes into one. more: see add_in_parts.
template <class Reducer, int kVectors, bool kWhole>
BNEXT_DEVICE void add_run(const Reducer& reducer, Batch<Reducer, kVectors, kWhole>& batch,
                          const typename Reducer::Center& center, Sums& sums, int more) {
  using T = typename Reducer::Storage;
  constexpr int kBatch = kRunBatch<T>, kTogether = kBatch / kLanes<T>;  // elements and vectors of a batch
  BNEXT_UNROLL
  for (int first = 0; first < kVectors; first += kTogether) {
    if (first == kVectors / 2 && more <= 0) break;
    Elements<Reducer, kBatch> elements;
    elements.count = like_first<kTogether>(batch, first);
    BNEXT_UNROLL
    for (int k = 0; k < kBatch; ++k) elements.take(k, batch, first + k / kLanes<T>, k % kLanes<T>);
    reducer.add(sums, elements, center);
    BNEXT_UNROLL
    for (int k = 0; k < kBatch; ++k)
      put_back(reducer, batch, first + k / kLanes<T>, k % kLanes<T>, elements, k);
  }
}

}  // namespace bnext::cuda
