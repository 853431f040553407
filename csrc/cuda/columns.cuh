// The columns of a rows tiling: whose channels a thread's vector belongs to, and the sums over a block's
// rows.
#pragma once

#include "cuda/sums.cuh"
#include "cuda/tensors.cuh"
#include "plan_cuda.h"

namespace bnext::cuda {

// Where a thread of the block stands in a group.
template <int kCount>
struct Columns {
  int64_t first_channel;  // of the group
  int64_t base;           // of a row's elements, the first of the thread's vector
  int channels, width;    // of the group; elements of a row
  int inner, vectors, column, row;
  bool active;  // there is such a row
  int lanes;    // elements of its vector, as far as the row goes

  BNEXT_DEVICE Columns(const Extent& extent, const Tiling& t, int64_t group, int thread)
      : first_channel(group * t.group_channels),
        channels(static_cast<int>(min_of(t.group_channels, extent.channels - first_channel))),
        width(static_cast<int>(min_of(t.group_width, t.row_length - group * t.group_width))),
        inner(static_cast<int>(extent.inner)),
        vectors(static_cast<int>(t.vectors)),
        column(thread % vectors),
        row(thread / vectors),
        active(row < t.height),
        lanes(!active ? 0 : static_cast<int>(min_of<int64_t>(kCount, width - column * kCount))) {
    base = group * t.group_width + column * kCount;
  }

  // Channel of the group that this element of the vector belongs to, or -1.
  BNEXT_DEVICE int channel(int lane) const {
    return lane < lanes ? (column * kCount + lane) / inner % channels : -1;
  }

  template <class Centers, class Center>
  BNEXT_DEVICE void set_centers(Centers& centers, const Center* of_channel) const {
    BNEXT_UNROLL
    for (int lane = 0; lane < kCount; ++lane) {
      const int k = channel(lane);
      centers.set(lane, k < 0 ? Center{} : of_channel[k]);
    }
  }

  // The sums of all threads into to[channel of the group], each by one thread, seen by all. Those that give
  // some stand in `rows` rows, this one in `row`; memory: see sums_memory().
  BNEXT_DEVICE void add_up(const Sums (&sums)[kCount], bool gives, int row, int rows, double* memory,
                           Sums* to) const {
    const int columns = kCount * vectors;  // lane by lane, [lane][vector]
    const int index = static_cast<int>(thread_index()), threads = static_cast<int>(thread_count());
    const int repeats = width / (channels * inner);
    double* const left = rows == 1 ? memory : memory + rows * columns;
    for (int which = 0; which < 2; ++which) {
      if (gives) {
        BNEXT_UNROLL
        for (int lane = 0; lane < kCount; ++lane) {
          memory[row * columns + lane * vectors + column] = which == 0 ? sums[lane].first : sums[lane].second;
        }
      }
      int slices = 1;
      if (rows == 1) {
        sync_block();
      } else {
        slices = sum_rows(memory, columns, rows, left);
      }
      for (int k = index; k < channels; k += threads) {
        InTurn all;
        for (int repeat = 0; repeat < repeats; ++repeat) {
          for (int s = 0; s < inner; ++s) {
            const int at = (repeat * channels + k) * inner + s;
            const double* const of_column = left + at % kCount * vectors + at / kCount;
            for (int slice = 0; slice < slices; ++slice) all.add(of_column[slice * columns]);
          }
        }
        (which == 0 ? to[k].first : to[k].second) = all.sum();
      }
      if (rows == 1 || which == 1) sync_block();
    }
  }
};

}  // namespace bnext::cuda
