// Vectors that a thread has in flight together, loaded from wherever they lie, for any operation over
// elements.
//
// An operation, be it a Reducer or a Map, has tensors of Storage, computes in Math, and has
// - kInputs tensors input(i), of which those from kSureInputs on may be null;
// - kReadsMask, and if so mask(), if it has_mask();
// - kOutputs tensors output(i), of which those from kSureOutputs on may be null.
#pragma once

#include "cuda/mask.cuh"
#include "cuda/tensors.cuh"

namespace bnext::cuda {

// kWhole: every vector is there as a whole, on a boundary, or not at all; and the first is there.
template <class Operation, int kVectors, bool kWhole = false>
struct Batch {
  Vector16 input[Operation::kInputs][kVectors];
  uint32_t bits[kVectors];   // of the mask, lane by lane
  uint32_t there[kVectors];  // the lanes that have an element
};

template <int kCount>
BNEXT_DEVICE uint32_t lanes_there(const Span& place) {
  return lanes_there<kCount>(0, place.low, place.high, kCount);
}

// Elements of a batch, taken out.
template <class Operation, int kCount>
struct Elements {
  typename Operation::Math values[Operation::kInputs][kCount];
  bool passes[kCount];  // what the mask says
  bool there[kCount];   // whether the tensors have it
  int count;            // of those that they have

  template <class Batch>
  BNEXT_DEVICE void take(int k, const Batch& batch, int vector, int lane) {
    BNEXT_UNROLL
    for (int i = 0; i < Operation::kInputs; ++i) {
      values[i][k] = element<typename Operation::Storage>(batch.input[i][vector], lane);
    }
    passes[k] = (batch.bits[vector] >> lane & 1) != 0;
    there[k] = (batch.there[vector] >> lane & 1) != 0;
  }
};

// Of input i; zero where there is no element.
template <Reuse kReuse, class Operation, int kVectors, bool kWhole>
BNEXT_DEVICE void load_input(const Operation& operation, int i, const Span (&places)[kVectors],
                             Batch<Operation, kVectors, kWhole>& batch) {
  const auto input = operation.input(i);
  const bool there = i < Operation::kSureInputs || input.data != nullptr;
  BNEXT_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    const Span& place = places[u];
    if constexpr (kWhole) {
      batch.input[i][u] = there && place.high > 0 ? input.template load<kReuse>(place.at) : Vector16{};
    } else {
      batch.input[i][u] =
          there ? input.template load_any<kReuse>(place.at, place.low, place.high) : Vector16{};
    }
  }
}

template <class Operation, int kVectors, bool kWhole>
BNEXT_DEVICE void load_bits(const Operation& operation, const Span (&places)[kVectors],
                            Batch<Operation, kVectors, kWhole>& batch) {
  constexpr int kCount = kLanes<typename Operation::Storage>;
  BNEXT_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    batch.bits[u] = 0;
    if constexpr (Operation::kReadsMask) {
      const Span& place = places[u];
      const int64_t numel = operation.input(0).numel;
      const bool there = operation.has_mask() && place.high > place.low &&
                         (kWhole || (place.at + place.high > 0 && place.at < numel));
      if (there) batch.bits[u] = mask_bits<kCount>(operation.mask(), place.at);
    }
  }
}

template <Reuse kReuse, class Operation, int kVectors, bool kWhole>
BNEXT_DEVICE void load_batch(const Operation& operation, const Span (&places)[kVectors],
                             Batch<Operation, kVectors, kWhole>& batch) {
  constexpr int kCount = kLanes<typename Operation::Storage>;
  BNEXT_UNROLL
  for (int i = 0; i < Operation::kInputs; ++i) load_input<kReuse>(operation, i, places, batch);
  load_bits(operation, places, batch);
  BNEXT_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    batch.there[u] = !kWhole                        ? lanes_there<kCount>(places[u])
                     : u == 0 || places[u].high > 0 ? (1u << kCount) - 1
                                                    : 0;
  }
}

// The inputs that load_batch will load from these places, not the mask, towards L2.
template <class Operation, int kVectors>
BNEXT_DEVICE void fetch_batch(const Operation& operation, const Span (&places)[kVectors]) {
  BNEXT_UNROLL
  for (int i = 0; i < Operation::kInputs; ++i) {
    const auto input = operation.input(i);
    if (i >= Operation::kSureInputs && input.data == nullptr) continue;
    BNEXT_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      if (places[u].high > 0) fetch(input.data + places[u].at);
    }
  }
}

// Of output i; `vector` holds what belongs there.
template <bool kWhole, class Operation>
BNEXT_DEVICE void store_vector(const Operation& operation, int i, const Span& place, const Vector16& vector) {
  const auto output = operation.output(i);
  if constexpr (kWhole) {
    if (place.high > 0) output.store(place.at, vector);
  } else {
    output.store_any(place.at, place.low, place.high, vector);
  }
}

template <class Operation>
BNEXT_DEVICE bool writes(const Operation& operation, int i) {
  return i < Operation::kSureOutputs || operation.output(i).data != nullptr;
}

}  // namespace bnext::cuda
