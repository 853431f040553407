// A tile as rows whose columns are (outer fold, channel, inner) elements, for any reducer and any map.
//
// Included once per instruction set (see vector.h). Reducers keep a double sum per column. Maps walk from the
// end to the beginning: what the reduce read last is still in cache.

constexpr int kPanel = kBytes / 16;  // strips of sixteen columns that a reducer sums in registers
// A reducer's panel reads a stream per row, of rows far apart more than hardware follows: 32-byte vectors
// fetch the next panel but one by hand. On Zen 3 that makes sums over rows 1.05 to 2 times as fast; of rows
// less far apart beyond the cache alone, 1.1 to 1.4 times, in it 0.93 to 1.1 times. With 64 bytes, on Zen 5,
// it is 0.8 to 0.95 times beyond the cache, of float32; walks fetch in memory order there.
constexpr bool kFetchesPanels = kBytes == 32;
constexpr int64_t kFarBytes = 16 << 10;  // from the first to the last of a batch of rows
constexpr int64_t kNearColumns = 1024;   // whose coefficients stay in the L1 cache
// Of more columns, a strip's coefficients serve kMapRows rows at once. Results that are streamed come one row
// at a time, near columns of kNearRows rows after one another; where a mask is written, a row is mapped
// whole.
constexpr int kMapRows = kBytes == 16 ? 1 : 4;
constexpr int64_t kNearRows = 16;
constexpr int64_t kStretchBytes = 512 << 10;  // ascending part of a descending walk

template <class Reducer>
void reduce_rows(const Operands& operands, const Geometry& geometry, const Tile& tile, void* scratch,
                 Sums* sums) {
  using Math = typename Reducer::Math;
  using Storage = typename Reducer::Storage;
  const Reducer reducer(operands);
  const Columns columns(geometry, tile);
  const int64_t numel = geometry.extent.numel(), stride = padded(columns.count);
  double* first = static_cast<double*>(scratch);
  double* second = first + stride;
  constexpr int kCount = Reducer::kCoefficients;
  Math* const expanded = reinterpret_cast<Math*>(second + stride);  // [coefficient][column]
  for (int64_t j = 0; j < 2 * stride; ++j) first[j] = 0;
  columns.lay_out<Storage>(
      expanded, kCount, [&](int k, int64_t channel) { return Reducer::coefficient(operands, k, channel); });

  constexpr int kStripsPerLine = sizeof(Storage) < 4 ? 2 : 1;  // one fetch a line
  const bool streaming = operands.streaming_stores;
  const int64_t batch_bytes = kBatch<Storage> * columns.row_length * static_cast<int64_t>(sizeof(Storage));
  const bool panels = kFetchesPanels && (operands.fetches || batch_bytes >= kFarBytes);
  const bool into_first = panels || operands.fetches_first, fetches = operands.fetches && !into_first;
  constexpr int64_t kAhead = kFetchBytes / sizeof(Storage);
  const int64_t ahead =
      panels ? 2 * kPanel * kLanes : columns.fetch_distance(into_first ? kAhead / reducer.reads() : kAhead);
  // `count` rows, a panel of columns at a time whose sums stay in registers. Lanes past the last column go
  // into padding that nobody reads.
  auto rows = [&](int64_t row, int64_t count, int64_t width) __attribute__((always_inline)) {
    const int64_t offset = row * columns.row_length + columns.begin;
    int64_t j = 0;
    auto panel = [&]<int... P>(Indices<P...>, auto span) __attribute__((always_inline)) {
      using C = Coefficients<Math, kCount>;
      const C c[] = {coefficients_from<Math>(
          [&](int k)
              __attribute__((always_inline)) { return load<Math>(expanded + k * stride + j + P * kLanes); },
          typename CountTo<kCount>::type{})...};
      LaneSums<Math> local[sizeof...(P)] = {};
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = offset + j + r * columns.row_length;
        auto fetch_lines = [&](auto fetch_at) __attribute__((always_inline)) {
          ((P % kStripsPerLine == 0 ? fetch_at(at + P * kLanes + ahead) : void()), ...);
        };
        if (into_first) {  // one test a row: another costs up to 15 % of a forward with AVX2
          fetch_lines([&](int64_t to)
                          __attribute__((always_inline)) { reducer.template fetch_at<Cache::l1>(to); });
        } else if (fetches) {
          fetch_lines([&](int64_t to) __attribute__((always_inline)) { reducer.fetch_at(to); });
        }
        (reducer.step(local[P], at + P * kLanes, c[P], span), ...);
      }
      (add_to<Storage>(first + j + P * kLanes, second + j + P * kLanes, local[P]), ...);
    };
    for (; j + kPanel * kLanes <= width; j += kPanel * kLanes)
      panel(typename CountTo<kPanel>::type{}, Full{streaming});
    for (; j + kLanes <= width; j += kLanes) panel(Indices<0>{}, Full{streaming});
    const int64_t last = offset + (count - 1) * columns.row_length + j;
    if (j < width) panel(Indices<0>{}, First{width - j, last + kLanes <= numel});
  };
  const int64_t whole_rows = numel / columns.row_length;
  const int64_t end = tile.end < whole_rows ? tile.end : whole_rows;
  for (int64_t row = tile.begin; row < end; row += kBatch<Storage>) {
    rows(row, end - row < kBatch<Storage> ? end - row : kBatch<Storage>, columns.count);
  }
  if (end < tile.end) rows(end, 1, columns.width_of(end, whole_rows));

  columns.collapse(first, second, sums);
  if (streaming) streaming_fence();
}

template <class Map>
void map_rows(const Operands& operands, const Geometry& geometry, const Tile& tile, void* scratch, Sums*) {
  using Math = typename Map::Math;
  constexpr int kCount = Map::kCoefficients;
  const Map map(operands);
  typename Map::Bits bits(operands.mask);
  const bool in_place = operands.out == operands.x, fetches = operands.fetches,
             streaming = operands.streaming_stores;
  const Columns columns(geometry, tile);
  const int64_t numel = geometry.extent.numel(), stride = padded(columns.count);
  Math* expanded = static_cast<Math*>(scratch);  // [coefficient][column]
  columns.lay_out<typename Map::Storage>(expanded, kCount, [&](int k, int64_t channel) {
    return static_cast<const Math*>(operands.coefficients[k])[channel];
  });

  const int64_t mapped = columns.fetch_distance(kFetchBytes / sizeof(typename Map::Storage));
  const int64_t reduced = tile.ahead != 0 ? tile.ahead : mapped;
  // Columns [j, end) of some rows.
  auto walk = [&]<int... R>(Indices<R...>, int64_t row, int64_t j,
                            int64_t end) __attribute__((always_inline)) {
    const int64_t length = columns.row_length, offset = row * length + columns.begin;
    if constexpr (sizeof...(R) == 1) bits.seek(offset + j);
    auto step = [&](auto span) __attribute__((always_inline)) {
      const auto c = coefficients_from<Math>(
          [&](int k) __attribute__((always_inline)) { return load<Math>(expanded + k * stride + j); },
          typename CountTo<kCount>::type{});
      const auto map_at = [&](int64_t at) __attribute__((always_inline)) {
        if (unlikely(fetches)) map.fetch_at(at + reduced, at + mapped);
        map.step(bits, at, c, span);
      };
      (map_at(offset + R * length + j), ...);
    };
    for_either(streaming && sizeof...(R) == 1, [&](auto streams) __attribute__((always_inline)) {
      for (int64_t n = (end - j) / kLanes; n > 0; --n, j += kLanes) step(Full{streams.value != 0});
    });
    const int64_t last = offset + (sizeof...(R) - 1) * length + j;
    if (j < end) step(First{end - j, !in_place && last + kLanes <= numel});
  };
  const int64_t whole_rows = numel / columns.row_length;
  const int64_t row_bytes = columns.count * static_cast<int64_t>(sizeof(typename Map::Storage));
  const bool wide = columns.count > kNearColumns, together = wide && !streaming && !bits.wanted();
  const int64_t stretch = (kStretchBytes / row_bytes / kMapRows + 1) * kMapRows,
                near = streaming ? kNearColumns : columns.count,
                block = wide && streaming ? kNearRows : stretch;
  for (int64_t stop = tile.end; stop > tile.begin; stop -= stretch) {
    int64_t row = stop - stretch > tile.begin ? stop - stretch : tile.begin;
    const int64_t whole = stop < whole_rows ? stop : whole_rows;
    for (; together && row + kMapRows <= whole; row += kMapRows)
      walk(typename CountTo<kMapRows>::type{}, row, 0, columns.count);
    for (; row < stop; row += block) {
      const int64_t end = row + block < stop ? row + block : stop;
      for (int64_t j = 0; j < columns.count; j += near) {
        for (int64_t r = row; r < end; ++r) {
          const int64_t width = columns.width_of(r, whole_rows);
          walk(Indices<0>{}, r, j, j + near < width ? j + near : width);
        }
      }
    }
  }
  bits.finish();
  if (streaming) streaming_fence();
}
