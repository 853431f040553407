// The mask of a dense tensor: a bit per element in memory order, laid out as args.h says.
#pragma once

#include "cuda/tensors.cuh"

namespace bnext::cuda {

// Bits of the elements e + [0, kCount), zero where e + k < 0. One of the elements belongs to the tensor.
template <int kCount>
BNEXT_DEVICE uint32_t mask_bits(const void* mask, int64_t e) {
  static_assert(kCount <= 8);
  const auto* const bytes = static_cast<const uint8_t*>(mask);
  if (e < 0) return uint32_t{bytes[0]} << -e;
  const int shift = static_cast<int>(e % 8);
  uint32_t bits = bytes[e / 8];
  if (shift + kCount > 8) bits |= uint32_t{bytes[e / 8 + 1]} << 8;
  return bits >> shift;
}

// Two ways to write one. Whole bytes: each vector is all there is of a byte, but for the bits past the end,
// which become zero. Otherwise vectors share bytes, and bits are set in words that were cleared before.
struct MaskOutput {
  void* data;
  int64_t numel;
  bool whole_bytes;

  BNEXT_DEVICE uint32_t* words() const { return static_cast<uint32_t*>(data); }

  // Bits of the elements at + [low, high) as far as the tensor goes; of all of them where kWhole says so.
  template <int kCount, bool kWhole>
  BNEXT_DEVICE void write(const Span& place, uint32_t bits) const {
    int64_t e = place.at;
    if constexpr (!kWhole) {
      const uint32_t there = lanes_there<kCount>(e, place.low, place.high, numel);
      if (there == 0) return;
      bits &= there;
    }
    if (whole_bytes) {
      store(static_cast<uint8_t*>(data) + e / 8, static_cast<uint8_t>(bits));
      return;
    }
    if (!kWhole && e < 0) {
      bits >>= -e;
      e = 0;
    }
    const int shift = static_cast<int>(e % 32);
    const uint32_t beyond = static_cast<uint32_t>(uint64_t{bits} << shift >> 32);
    if (bits << shift != 0) set_bits(words() + e / 32, bits << shift);
    if (beyond != 0) set_bits(words() + e / 32 + 1, beyond);
  }

  // What no vector writes, by all threads of the grid, in a kernel before the one that calls write().
  BNEXT_DEVICE void clear() const {
    const int64_t count = mask_bytes(numel) / 4, step = int64_t{block_count()} * thread_count();
    for (int64_t k = int64_t{block_index()} * thread_count() + thread_index(); k < count; k += step) {
      store(words() + k, 0u);
    }
  }

  // Past the last element's byte, where bytes are written whole.
  BNEXT_DEVICE void clear_end() const {
    if (data == nullptr || !whole_bytes || block_index() != 0) return;
    const int64_t k = (numel + 7) / 8 + thread_index();
    if (k < mask_bytes(numel)) store(static_cast<uint8_t*>(data) + k, uint8_t{0});
  }
};

}  // namespace bnext::cuda
