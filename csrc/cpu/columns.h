// The columns of a tile that is walked as rows: from per-channel values to one per column, and back to
// channels.
//
// Included once per instruction set, before rows.h.

// In eight interleaved parts, so that the additions do not wait for each other.
BNEXT_INLINE double sum(const double* values, int64_t n) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) part[k] += values[i + k];
  }
  for (int k = 0; i < n; ++i, ++k) part[k] += values[i];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// Values of consecutive columns, a whole number of lanes, into the order of lanes of T.
template <class T, class A>
BNEXT_INLINE void arrange(A* column, int64_t count) {
  if constexpr (kEvenOdd<T>) {
    for (int64_t j = 0; j < count; j += kLanes) store(column + j, in_lane_order<T>(load<A>(column + j)));
  }
}

constexpr int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// The columns of a tile. A folded row holds all channels, fold times over; otherwise columns are whole
// channels.
struct Columns {
  const Extent& e;
  const Tile& tile;
  int64_t begin, count, row_length;

  Columns(const Geometry& geometry, const Tile& t)
      : e(geometry.extent),
        tile(t),
        begin(geometry.fold > 1 ? 0 : t.channel_begin * e.inner),
        count(geometry.fold > 1 ? geometry.row_length() : t.channels() * e.inner),
        row_length(geometry.row_length()) {}

  // Of a row, the last of which may be short.
  BNEXT_INLINE int64_t width_of(int64_t row, int64_t whole_rows) const {
    return row < whole_rows ? count : e.numel() - whole_rows * row_length;
  }

  // Elements on to what a walk over rows should fetch, `ahead` of them; of a tile narrower than rows, whole
  // rows on.
  BNEXT_INLINE int64_t fetch_distance(int64_t ahead) const {
    return count < row_length ? (ahead + count - 1) / count * row_length : ahead;
  }

  // column[j] = of(channel of j)
  template <class A, class F>
  BNEXT_INLINE void expand(A* column, F of) const {
    for (int64_t j = 0; j < count; j += tile.channels() * e.inner) {
      if (e.inner == 1) {
        for (int64_t k = 0; k < tile.channels(); ++k) column[j + k] = of(tile.channel_begin + k);
        continue;
      }
      for (int64_t k = 0; k < tile.channels(); ++k) {
        const A value = of(tile.channel_begin + k);
        for (int64_t i = 0; i < e.inner; ++i) column[j + k * e.inner + i] = value;
      }
    }
  }

  // of(k, channel) for each coefficient k, in lanes of T, zeros in the padding: [k][column]
  template <class T, class A, class F>
  BNEXT_INLINE void lay_out(A* to, int coefficients, F of) const {
    const int64_t stride = padded(count);
    for (int k = 0; k < coefficients; ++k) {
      A* const row = to + k * stride;
      for (int64_t j = count; j < stride; ++j) row[j] = 0;
      expand(row, [&](int64_t channel) { return of(k, channel); });
      arrange<T>(row, stride);
    }
  }

  // sums[channel] += the columns of the channel
  BNEXT_INLINE void collapse(const double* first, const double* second, Sums* sums) const {
    for (int64_t j = 0; j < count; j += tile.channels() * e.inner) {
      if (e.inner == 1) {
        for (int64_t k = 0; k < tile.channels(); ++k) sums[k] += {first[j + k], second[j + k]};
        continue;
      }
      for (int64_t k = 0; k < tile.channels(); ++k) {
        sums[k] += {sum(first + j + k * e.inner, e.inner), sum(second + j + k * e.inner, e.inner)};
      }
    }
  }
};
