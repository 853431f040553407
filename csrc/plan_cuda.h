// From a problem and a GPU's description to launches: the heuristics of the CUDA engines, as pure functions.
//
// Kernels walk the tensor in vectors of 16 bytes. A pass is cut twice: groups are channels (planes) or
// columns (rows) that belong together, chunks are ranges of a group's positions. A block takes one chunk of
// one group. Both depend on shape and device alone, and partial sums are added in the order of chunks: the
// same bits from run to run.
#pragma once

#include <cstdint>

#include "args.h"
#include "plan.h"

namespace bnext::cuda {

// What a plan needs to know of a GPU. Names of devices decide nothing.
struct Device {
  int multiprocessors = 1;
  int block_threads = 1024;          // a block may have
  int64_t shared_memory = 48 << 10;  // bytes a block may ask for
  int64_t l2 = 0;                    // bytes
  double bandwidth = 0;              // bytes per second to and from memory
};

// streaming: a kernel that reduces, a kernel that maps. With fixed statistics one of them does: that which
// reduces writes dx as well, where dweight or dbias is wanted.
enum class Engine : uint8_t { streaming };

// How one kernel walks the tensor.
// - rows: a matrix of `rows` whole rows. A block takes `vectors` of a row's vectors and `chunk` rows, with
//   `height` threads to a column. A thread stays in its column.
// - planes: a group is a channel. Its vectors are numbered run by run, `vectors` to a run (one more than fill
//   it where runs begin inside a vector), and a block takes `chunk` of them.
struct Tiling {
  Traversal traversal = Traversal::planes;
  int threads = 0;             // of a block: whole warps
  int height = 1;              // rows
  int64_t vectors = 0;         // see above
  int64_t rows = 0;            // whole rows of the matrix; runs of a channel
  int64_t row_length = 0;      // elements from one row, or run of a channel, to the next
  int64_t group_width = 0;     // elements of a row, or run, in one group
  int64_t group_channels = 0;  // that a group sums (a reduce only)
  int64_t groups = 0;
  int64_t chunk = 0;  // rows, or (planes) vectors
  int64_t chunks = 0;

  constexpr int64_t blocks() const { return groups * chunks; }
  constexpr int64_t positions() const { return traversal == Traversal::planes ? rows * vectors : rows; }
};

struct Plan {
  Engine engine = Engine::streaming;
  Extent extent;  // as walked: one channel is one run
  bool reduces = false, maps = true;
  Tiling reduce, map;
  bool streaming_stores = false;  // outputs larger than what L2 keeps for whoever comes next
  int64_t scratch_bytes = 0;      // partial sums and totals
  int64_t bytes_moved = 0;        // to and from memory, as scheduled
  int64_t bytes_minimum = 0;      // every tensor once
  double floor_seconds = 0;       // bytes_minimum at the device's bandwidth

  // Of the reduce, zero whenever it starts: one per group whose chunks wait for each other.
  constexpr int64_t counters() const { return reduces && reduce.chunks > 1 ? reduce.groups : 0; }
  constexpr int launches() const { return int{reduces} + int{maps}; }
};

// aligned: every tensor begins at a multiple of 16 bytes.
Plan make_plan(const Problem& problem, const Device& device, bool aligned = true);

const char* name(Engine engine);

}  // namespace bnext::cuda
