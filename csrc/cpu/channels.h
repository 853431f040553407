// Per-channel vectors in bulk: from and to any storage type, so that the folds over channels are plain loops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"
#include "dispatch.h"

namespace bnext::cpu {

// Channels a fold takes at a time: its values in double stay in the L1 cache.
constexpr int64_t kFoldChannels = 64;

// f(first channel, number of channels) over [begin, end).
template <class F>
void for_each_fold(int64_t begin, int64_t end, F f) {
  for (int64_t c = begin; c < end; c += kFoldChannels) f(c, std::min(kFoldChannels, end - c));
}

// A NaN without the bits that its maker left in it: vector code rounds to bfloat16 without looking for them.
inline double plain_nan(double value) { return value == value ? value : __builtin_nan(""); }

// out[k] = data[first + k * stride]
inline void read_channels(const void* data, Dtype dtype, int64_t first, int64_t stride, int64_t count,
                          double* out) {
  dispatch(dtype, [&]<class T>() {
    const T* from = static_cast<const T*>(data) + first;
    for (int64_t k = 0; k < count; ++k) out[k] = plain_nan(widen(from[k * stride]));
  });
}

// The same of a vector, or what stands for an absent one.
inline void read_channels(const ChannelVector& v, int64_t first, int64_t count, double otherwise,
                          double* out) {
  if (v) {
    read_channels(v.data, v.dtype, first, 1, count, out);
  } else {
    std::fill_n(out, count, otherwise);
  }
}

inline void write_channels(const ChannelVector& v, int64_t first, int64_t count, const double* values) {
  dispatch(v.dtype, [&]<class T>() {
    T* to = static_cast<T*>(v.data) + first;
    for (int64_t k = 0; k < count; ++k) narrow(values[k], to[k]);
  });
}

}  // namespace bnext::cpu
