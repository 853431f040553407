// Reduce, fold, map in the order a plan says, over threads. Both directions run through here.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/tiles.h"
#include "plan.h"

namespace bnext::cpu {

// Channels from which on a fold is shared out over threads, so many a task.
constexpr int64_t kSharedFold = 4096;

// f(begin, end), each thread its range of [0, count).
template <class F>
void for_each_range(int threads, int64_t count, F f) {
  if (threads <= 1) {
    f(int64_t{0}, count);
  } else {
    at::parallel_for(0, count, 1, f);
  }
}

// f(index) for [0, count), each thread its range in ascending or descending order.
template <bool Descending = false, class F>
void for_each_task(int threads, int64_t count, F f) {
  for_each_range(threads, count, [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < end - begin; ++k) f(Descending ? end - 1 - k : begin + k);
  });
}

// This thread's scratch memory; grows, is never shrunk, and is bounded by the tile sizes of plan.cpp.
inline void* scratch(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  thread_local std::vector<std::byte> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + kAlign) memory.resize(bytes + kAlign);
  void* data = memory.data();
  size_t space = memory.size();
  return std::align(kAlign, bytes, data, space);
}

// Streaming stores write whole aligned vectors; the plan has seen to everything but the address.
inline bool can_stream(const Plan& plan, const void* out) {
  return plan.streaming_stores && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// Work holds `operands`, `reduce` and `map` (tile functions or null), and for channels [begin, end)
// - prepare(begin, end), before they are reduced;
// - recenter(begin, end, sums): whether they must be reduced again, around better centers;
// - fold(begin, end, sums), between reduce and map; sums are null where nothing was reduced.
template <class Work>
void run(const Plan& plan, Work& work) {
  const Geometry& geometry = plan.geometry;
  const int64_t channels = geometry.extent.channels;
  if ((plan.schedule == Schedule::map) != (work.reduce == nullptr))
    throw std::logic_error("bnext: the plan and the call do not agree on what is reduced");
  auto tile_at = [&](int64_t slab, int64_t chunk) {
    const int64_t channel = slab * plan.slab_channels, begin = chunk * plan.chunk_length;
    return Tile{channel, std::min(channel + plan.slab_channels, channels), begin,
                std::min(begin + plan.chunk_length, geometry.positions())};
  };
  auto call = [&](TileFunction function, const Tile& tile, Sums* sums) {
    function(work.operands, geometry, tile, scratch(scratch_bytes(geometry, tile, sums != nullptr)), sums);
  };

  // Of all channels, shared out if they are many.
  auto fold = [&](const Sums* sums) {
    for_each_task(channels < kSharedFold ? 1 : plan.threads, ceil_div(channels, kSharedFold), [&](int64_t k) {
      const int64_t begin = k * kSharedFold;
      work.fold(begin, std::min(begin + kSharedFold, channels), sums == nullptr ? nullptr : sums + begin);
    });
  };

  if (plan.schedule == Schedule::split) {
    const int64_t tiles = plan.slabs * plan.chunks;
    std::vector<Sums> partial(static_cast<size_t>(plan.chunks * channels));
    work.prepare(0, channels);
    auto reduce = [&] {
      for_each_task(plan.threads, tiles, [&](int64_t k) {
        const Tile tile = tile_at(k % plan.slabs, k / plan.slabs);
        call(work.reduce, tile, partial.data() + k / plan.slabs * channels + tile.channel_begin);
      });
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
        for (int64_t c = 0; c < channels; ++c) partial[c] += partial[chunk * channels + c];
      }
    };
    reduce();
    if (work.recenter(0, channels, partial.data())) {
      std::fill(partial.begin(), partial.end(), Sums{});
      reduce();
    }
    fold(partial.data());
    if (work.map == nullptr) return;
    for_each_task<true>(plan.threads, tiles,
                        [&](int64_t k) { call(work.map, tile_at(k % plan.slabs, k / plan.slabs), nullptr); });
    return;
  }

  if (plan.schedule == Schedule::fused) {
    auto finish = [&](int64_t slab, bool last) {
      const Tile whole = tile_at(slab, 0);
      std::vector<Sums> sums(whole.channels()), part(plan.chunks > 1 ? whole.channels() : 0);
      work.prepare(whole.channel_begin, whole.channel_end);
      auto reduce = [&] {
        if (plan.chunks == 1) return call(work.reduce, whole, sums.data());
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
          std::fill(part.begin(), part.end(), Sums{});
          call(work.reduce, tile_at(slab, chunk), part.data());
          for (int64_t k = 0; k < whole.channels(); ++k) sums[k] += part[k];
        }
      };
      reduce();
      if (work.recenter(whole.channel_begin, whole.channel_end, sums.data())) {
        std::fill(sums.begin(), sums.end(), Sums{});
        reduce();
      }
      work.fold(whole.channel_begin, whole.channel_end, sums.data());
      if (work.map == nullptr) return;
      for (int64_t chunk = plan.chunks; chunk-- > 0;) {
        Tile tile = tile_at(slab, chunk);
        if (!last && plan.next_fits) tile.ahead = plan.slab_channels * geometry.extent.inner;
        call(work.map, tile, nullptr);
      }
    };
    for_each_range(plan.threads, plan.slabs, [&](int64_t begin, int64_t end) {
      for (int64_t slab = begin; slab < end; ++slab) finish(slab, slab + 1 == end);
    });
    return;
  }

  fold(nullptr);
  if (work.map == nullptr) return;
  for_each_task(plan.threads, plan.slabs * plan.chunks,
                [&](int64_t k) { call(work.map, tile_at(k % plan.slabs, k / plan.slabs), nullptr); });
}

}  // namespace bnext::cpu
