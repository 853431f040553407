// From a problem and a machine to a schedule: a pure function, and the only home of the CPU's heuristics.
//
// A channel's elements are cut twice. Slabs are groups of channels, small enough to stay in cache between the
// reduce and the map; chunks are ranges of a slab's positions (flattened outer*inner, or rows). Partial sums
// are kept per chunk and added in order, and chunks depend on the shape alone, so that the same bits come out
// for any number of threads.
#pragma once

#include <cstdint>

#include "args.h"

namespace bnext {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// planes: long runs of one channel. rows: short runs or channels last, walked as a matrix whose columns are
// elements.
enum class Traversal : uint8_t { planes, rows };

// fused: per slab reduce, fold, map while the slab is in cache. split: reduce everything, fold, map
// everything. map: nothing to reduce.
enum class Schedule : uint8_t { fused, split, map };

// input_grad: a backward whose sums are given.
enum class Pass : uint8_t { forward, inference, backward, frozen_backward, input_grad };

struct Problem {
  Extent extent;
  Dtype dtype = Dtype::float32;
  Pass pass = Pass::forward;
  bool residual = false;    // is read: forward to add it, backward to compute the activation's input again
  bool mask = false;        // is written by forward, read by backward
  bool dresidual = false;   // backward: is written, beside dx
  bool output = true;       // forward: y is wanted
  bool sums = true;         // backward: dweight, dbias or the sums themselves are wanted
  bool input_grad = true;   // backward: dx is wanted
  bool needs_input = true;  // backward: finds dz from what stands for x, not from dy and a mask alone

  constexpr Problem(const Extent& of, Dtype type, Pass kind, bool with_residual, bool with_mask,
                    bool with_dresidual)
      : extent(of),
        dtype(type),
        pass(kind),
        residual(with_residual),
        mask(with_mask),
        dresidual(with_dresidual) {}
  Problem(const ForwardArgs& args, Pass kind)
      : Problem(args.extent, args.dtype, kind, args.residual != nullptr, args.mask != nullptr, false) {
    output = args.y != nullptr;
  }
  Problem(const BackwardArgs& args, Pass kind)
      : Problem(args.extent, args.dtype, kind, args.residual != nullptr, args.mask != nullptr,
                args.dresidual != nullptr) {
    sums = args.dweight != nullptr || args.dbias != nullptr || args.sums_out != nullptr;
    input_grad = args.dx != nullptr;
    needs_input = bnext::needs_input(args);
  }
};

struct Machine {
  int threads = 1;
  int64_t first_cache = 0;          // bytes of a core's L1 data cache
  int64_t private_cache = 1 << 20;  // bytes of the largest cache a core has to itself
  int64_t shared_cache = 0;         // bytes of the last-level cache that can be counted on
  bool cache_of_host = false;       // there is more of it, which other machines on the host use too
};

// How positions and columns follow from an extent.
struct Geometry {
  Extent extent;
  Traversal traversal = Traversal::planes;
  int64_t fold = 1;  // rows: outer indices joined to one row, so that few channels still fill a vector

  constexpr int64_t row_length() const { return fold * extent.channels * extent.inner; }
  // Positions that chunks divide: elements of a channel (planes), or rows, the last of which may be short.
  constexpr int64_t positions() const {
    return traversal == Traversal::planes ? extent.count() : ceil_div(extent.outer, fold);
  }
};

struct Plan {
  Geometry geometry;
  Schedule schedule = Schedule::fused;
  int64_t slab_channels = 1;
  int64_t slabs = 1;
  int64_t chunk_length = 1;  // positions
  int64_t chunks = 1;
  int threads = 1;
  bool beyond_cache = false;   // the call's tensors fill the last cache: tiles fetch ahead
  bool fetches_first = false;  // reducers fetch into the L1 cache, not only into L2
  bool next_fits = false;      // two slabs fit the private cache: one is fetched while the other is mapped
  bool streaming_stores = false;
  bool dresidual_first = false;  // is streamed while sums are taken, not with dx
  int64_t cache_bytes = 0;       // what one slab wants to keep in cache
  int64_t bytes_moved = 0;       // to and from memory, as scheduled
  int64_t bytes_minimum = 0;     // every tensor once
};

Plan make_plan(const Problem& problem, const Machine& machine);

// What a pass moves, in tensors, and how often the mask. A reduce without sums is one that finds dz from x
// and writes dx as it goes.
struct Traffic {
  int64_t read_by_reduce, read_by_map, written, mask_passes;
};
Traffic traffic(const Problem& problem);

// A single channel is one run whatever the layout says.
constexpr Extent one_run_if_one_channel(const Extent& e) {
  return e.channels == 1 ? Extent{1, 1, e.numel()} : e;
}

const char* name(Traversal traversal);
const char* name(Schedule schedule);

}  // namespace bnext
