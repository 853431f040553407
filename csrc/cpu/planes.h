// The planes of a tile, remainders included, for any reducer and any map: for each outer index, for each
// channel, one contiguous run.
//
// Included once per instruction set (see vector.h). Reducers keep sixteen lanes of double sums per channel.
// Maps walk from the end to the beginning: what the reduce read last is still in cache.

constexpr int64_t kJumpBytes = 64 << 10;  // a slab's part of an outer index that is fetched as a whole
constexpr int64_t kLineBytes = 64;

// f(channel, channels, offset of the first one's run, length of each run), outer indices ascending or
// descending, channels ascending: together where their runs are whole and `joined`, else one by one.
template <bool Descending, class F>
BNEXT_INLINE void for_each_run(const Extent& e, const Tile& tile, bool joined, F f) {
  if (tile.begin >= tile.end) return;
  const int64_t first = tile.begin / e.inner, last = (tile.end - 1) / e.inner;
  for (int64_t step = 0; step <= last - first; ++step) {
    const int64_t outer = Descending ? last - step : first + step;
    const int64_t from = outer == first ? tile.begin - first * e.inner : 0;
    const int64_t to = outer == last ? tile.end - last * e.inner : e.inner;
    const int64_t together = joined && to - from == e.inner ? tile.channels() : 1;
    for (int64_t channel = tile.channel_begin; channel < tile.channel_end; channel += together)
      f(channel, together, (outer * e.channels + channel) * e.inner + from, to - from);
  }
}

// Elements on to what an ascending (1) or descending (-1) walk over outer indices should fetch. Where a slab
// leaves memory order after a few pages, that lies an outer index on.
template <class T>
BNEXT_INLINE int64_t fetch_distance(const Extent& e, const Tile& tile, int direction) {
  constexpr int64_t size = sizeof(T);
  if (tile.channels() < e.channels && tile.channels() * e.inner * size <= kJumpBytes)
    return direction * e.channels * e.inner;
  return kFetchBytes / size;
}

// f(span) for the elements from i on, fewer than sixteen, of a run of `length` at `offset`.
template <class F>
BNEXT_INLINE void with_rest(int64_t length, int64_t i, int64_t offset, int64_t numel, F f) {
  if (length >= kLanes) {
    f(Last{length - i});
  } else {
    f(First{length - i, offset + i + kLanes <= numel});
  }
}

template <class Reducer>
void reduce_planes(const Operands& operands, const Geometry& geometry, const Tile& tile, void* scratch,
                   Sums* sums) {
  using Math = typename Reducer::Math;
  using Storage = typename Reducer::Storage;
  const Reducer reducer(operands);
  const Extent e = geometry.extent;
  const int64_t numel = e.numel();
  double* lanes = static_cast<double*>(scratch);  // [channel][2][kLanes]
  const int64_t ahead = fetch_distance<Storage>(e, tile, 1);
  const bool fetches = operands.fetches, into_first = operands.fetches_first,
             streaming = operands.streaming_stores;
  for (int64_t k = 0; k < tile.channels() * 2 * kLanes; ++k) lanes[k] = 0;

  for_each_run<false>(
      e, tile, false,
      [&](int64_t channel, int64_t, int64_t offset, int64_t length) __attribute__((always_inline)) {
        double* first = lanes + (channel - tile.channel_begin) * 2 * kLanes;
        const auto c = coefficients_from<Math>(
            [&](int k)
                __attribute__((always_inline)) { return splat(Reducer::coefficient(operands, k, channel)); },
            typename CountTo<Reducer::kCoefficients>::type{});
        int64_t i = 0;
        // Two sums take turns: an addition does not wait for the one before it.
        auto batch = [&](int64_t vectors) __attribute__((always_inline)) {
          LaneSums<Math> even{}, odd{};
          if (fetches) {
            for (int64_t k = 0; k < vectors * kLanes; k += kLineBytes / sizeof(Storage)) {
              if (into_first) {
                reducer.template fetch_at<Cache::l1>(offset + i + ahead + k);
              } else {
                reducer.fetch_at(offset + i + ahead + k);
              }
            }
          }
          auto step = [&](LaneSums<Math>& to) __attribute__((always_inline)) {
            reducer.step(to, offset + i, c, Full{streaming});
            i += kLanes;
          };
          for (int64_t k = 0; k < vectors / 2; ++k) {
            step(even);
            step(odd);
          }
          if (vectors % 2 != 0) step(even);
          if (i < length && length - i < kLanes) {
            with_rest(length, i, offset, numel, [&](auto span) __attribute__((always_inline)) {
              reducer.step(odd, offset + i, c, span);
            });
            i = length;
          }
          even += odd;
          add_to<Storage>(first, first + kLanes, even);
        };
        while (length - i >= kBatch<Storage> * kLanes) batch(kBatch<Storage>);
        if (i < length) batch((length - i) / kLanes);
      });

  for (int64_t k = 0; k < tile.channels(); ++k) {
    const double* first = lanes + k * 2 * kLanes;
    Sums total;
    for (int lane = 0; lane < kLanes; ++lane) total += Sums{first[lane], first[kLanes + lane]};
    sums[k] += total;
  }
  if (streaming) streaming_fence();
}

// Whole runs of consecutive channels lie side by side: vectors walk on from one to the next, with the
// coefficients of both where they straddle, so that nothing but the region's end is less than a vector.
template <class Map>
void map_planes(const Operands& operands, const Geometry& geometry, const Tile& tile, void*, Sums*) {
  using Math = typename Map::Math;
  using Storage = typename Map::Storage;
  using All = typename CountTo<Map::kCoefficients>::type;
  const Map map(operands);
  typename Map::Bits bits(operands.mask);
  const Extent e = geometry.extent;
  const bool in_place = operands.out == operands.x, fetches = operands.fetches,
             streaming = operands.streaming_stores;
  const int64_t numel = e.numel(), mapped = fetch_distance<Storage>(e, tile, -1);
  const int64_t reduced = tile.ahead != 0 ? tile.ahead : mapped;
  const auto of = [&](int64_t channel) __attribute__((always_inline)) {
    return coefficients_from<Math>(
        [&](int k) __attribute__((always_inline)) {
          return splat(static_cast<const Math*>(operands.coefficients[k])[channel]);
        },
        All{});
  };
  auto region = [&](int64_t channel, int64_t channels, int64_t at,
                    int64_t length) __attribute__((always_inline)) {
    const int64_t end = channel + channels;
    auto c = of(channel);
    bits.seek(at);
    const auto step = [&](const auto& with, bool streams) __attribute__((always_inline)) {
      if (unlikely(fetches)) map.fetch_at(at + reduced, at + mapped);
      map.step(bits, at, with, Full{streams});
      at += kLanes;
    };
    for (int64_t left = length;; left += length) {
      for_either(streaming, [&](auto streams) __attribute__((always_inline)) {
        for (int64_t n = left / kLanes; n > 0; --n) step(c, streams.value != 0);
      });
      left %= kLanes;
      if (++channel == end) {
        if (left > 0) map.step(bits, at, c, First{left, !in_place && at + kLanes <= numel});
        return;
      }
      const auto next = of(channel);
      if (left > 0) {
        const uint32_t mine = (1u << left) - 1;
        step(coefficients_from<Math>([&](int k) __attribute__((
                                         always_inline)) { return select<Storage>(mine, c.k[k], next.k[k]); },
                                     All{}),
             streaming);
        left -= kLanes;
      }
      c = next;
    }
  };
  for_each_run<true>(e, tile, e.inner >= kLanes, region);
  bits.finish();
  if (streaming) streaming_fence();
}
