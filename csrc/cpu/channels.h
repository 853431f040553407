// Per-channel vectors in bulk: from and to any storage type, so that the folds over channels are plain loops.
//
// Included once per instruction set (see vector.h), before the folds.

// Channels a fold takes at a time: its values in double stay in the L1 cache.
constexpr int64_t kFoldChannels = 64;

// f(first channel, number of channels) over [begin, end).
template <class F>
BNEXT_INLINE void for_each_fold(int64_t begin, int64_t end, F f) {
  for (int64_t c = begin; c < end; c += kFoldChannels)
    f(c, end - c < kFoldChannels ? end - c : kFoldChannels);
}

// A NaN without the bits that its maker left in it: vector code rounds to bfloat16 without looking for them.
BNEXT_INLINE double plain_nan(double value) { return value == value ? value : __builtin_nan(""); }

// out[k] = data[first + k * stride]
void read_channels(const void* data, Dtype dtype, int64_t first, int64_t stride, int64_t count,
                   double* __restrict out) {
  dispatch(dtype, [&]<class T>() {
    const T* from = static_cast<const T*>(data) + first;
    for (int64_t k = 0; k < count; ++k) out[k] = plain_nan(widen(from[k * stride]));
  });
}

// The same of a vector, or what stands for an absent one.
void read_channels(const ChannelVector& v, int64_t first, int64_t count, double otherwise,
                   double* __restrict out) {
  if (v) return read_channels(v.data, v.dtype, first, 1, count, out);
  for (int64_t k = 0; k < count; ++k) out[k] = otherwise;
}

void write_channels(const ChannelVector& v, int64_t first, int64_t count, const double* __restrict values) {
  dispatch(v.dtype, [&]<class T>() {
    T* to = static_cast<T*>(v.data) + first;
    for (int64_t k = 0; k < count; ++k) narrow(values[k], to[k]);
  });
}
