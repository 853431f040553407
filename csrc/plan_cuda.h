// From a problem and a GPU's description to launches: the heuristics of the CUDA engines, as pure functions.
// plan_cuda.cpp has those of streaming and the choice, plan_resident.cpp those of resident.
//
// Kernels walk the tensor in vectors of 16 bytes. A pass is cut twice: groups are channels (planes) or
// columns (rows) that belong together, chunks are ranges of a group's positions. A block takes one chunk of
// one group. Both depend on shape and device alone, and partial sums are added in the order of chunks: the
// same bits from run to run.
#pragma once

#include <cstdint>
#include <string>

#include "args.h"
#include "plan.h"

namespace bnext::cuda {

// What a plan needs to know of a GPU. Names of devices decide nothing.
struct Device {
  int multiprocessors = 1;
  int block_threads = 1024;                  // a block may have
  int64_t shared_memory = 48 << 10;          // bytes a block may ask for
  int64_t l2 = 0;                            // bytes
  double bandwidth = 0;                      // bytes per second to and from memory
  int64_t multiprocessor_memory = 49 << 10;  // shared, of all its blocks and what each takes besides
  int spare_multiprocessors = 0;             // left to others by kernels whose blocks wait for each other
  int cluster_blocks = 1;                    // of a cluster at most, 1: there are none
  bool bulk_copies = false;                  // it has copies of many bytes to shared memory
  bool early_launches = false;               // a kernel may begin before the one that it follows has ended
};

constexpr int kVectorBytes = 16;
constexpr int kWarp = 32;

// Elements of a vector.
constexpr int lanes_of(Dtype dtype) { return kVectorBytes / static_cast<int>(size_of(dtype)); }

// streaming: a kernel that reduces, a kernel that maps. With fixed statistics one of them does: that which
// reduces writes dx as well, where dweight or dbias is wanted.
// resident: one kernel that keeps a slab of channels in the shared memory of the blocks that own it, so that
// the map finds there what the reduce read.
enum class Engine : uint8_t { streaming, resident };

// How a training pass gets its engine: by the plan, or as asked (BNEXT_CUDA_ENGINE, bnext.plan's engine).
// Other passes have nothing to keep, and stream.
enum class Choice : uint8_t { automatic, streaming, resident };

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
  constexpr int64_t vector_rows() const {  // resident rows: that sums come from, see add_up
    return kWarp % vectors == 0 ? threads / kWarp : height;
  }
  constexpr int64_t positions() const { return traversal == Traversal::planes ? rows * vectors : rows; }
  // Whether all vectors lie on boundaries in a tensor that begins on one.
  constexpr bool whole_vectors(int lanes) const {
    return row_length % lanes == 0 && group_width % lanes == 0;
  }
};

struct Plan {
  Engine engine = Engine::streaming;
  const char* why = "";  // this engine was chosen
  Extent extent;         // as walked: one channel is one run
  bool reduces = false, maps = true;
  Tiling reduce, map;             // resident: reduce alone, whose groups are slabs
  int64_t together = 0;           // resident: slabs under way at once
  int depth = 0;                  // resident: vectors that a thread keeps of each input
  int64_t block_memory = 0;       // resident: bytes of a block's shared memory, more than it uses to be alone
  int cluster = 1;                // resident: blocks of one, which share a slab and see each other's memory
  bool bulk_copies = false;       // resident: into shared memory, of whole runs
  int64_t waiting_blocks = 0;     // resident: that wait for each other, not in clusters: all run at once
  bool early_map = false;         // streaming: the map begins while the reduce runs, and then waits
  bool streaming_stores = false;  // outputs larger than what L2 keeps for whoever comes next
  int64_t scratch_bytes = 0;      // partial sums and totals
  int64_t bytes_moved = 0;        // to and from memory, as scheduled
  int64_t bytes_minimum = 0;      // every tensor once
  double floor_seconds = 0;       // bytes_minimum at the device's bandwidth

  // Zero whenever the reduce starts: one per group whose chunks wait for each other; resident, also one for
  // all blocks.
  constexpr int64_t counters() const {
    if (engine == Engine::resident) return (waiting_blocks > 0 ? together : 0) + 1;
    return reduces && reduce.chunks > 1 ? reduce.groups : 0;
  }
  constexpr int launches() const { return int{reduces} + int{maps}; }
  constexpr int64_t reduce_blocks() const {
    return engine == Engine::resident ? together * reduce.chunks : reduce.blocks();
  }
};

// Doubles of block memory that sums over a block's threads take: a value per row and column and what adding
// rows leaves, or the sums of several chunks and the same.
constexpr int64_t sums_memory(int64_t threads, int64_t rows, int64_t columns) {
  const int64_t left = rows == 1 ? 0 : threads > columns ? threads : columns;
  const int64_t values = rows * columns + left;
  return values > 2 * threads ? values : 2 * threads;
}

// Where things lie in the shared memory of a resident block, in bytes; the vectors of inputs come first.
struct ResidentMemory {
  int64_t barriers;      // of bulk copies, one to a vector of a thread at most
  int64_t turn;          // how many slabs the block is done with: registers are full while it sums
  int64_t values;        // doubles, for sums over threads
  int64_t totals;        // Sums of the slab's channels
  int64_t part;          // the block's share of them, for others of its cluster
  int64_t centers;       // kMostCenter bytes of each
  int64_t coefficients;  // kMostCoefficients floats of each
  int64_t bytes;

  static constexpr int kMostCenter = 16, kMostCoefficients = 6;

  constexpr ResidentMemory(const Tiling& t, int lanes, int64_t inputs, int depth)
      : barriers(inputs * depth * t.threads * kVectorBytes),
        turn(barriers + round_up(int64_t{sizeof(uint64_t)} * depth, kVectorBytes)),
        values(turn + kVectorBytes) {
    const bool planes = t.traversal == Traversal::planes;
    totals = values + int64_t{sizeof(double)} * sums_memory(t.threads, planes ? 0 : t.vector_rows(),
                                                            planes ? 0 : t.vectors * lanes);
    part = totals + int64_t{2 * sizeof(double)} * t.group_channels;
    centers = part + int64_t{2 * sizeof(double)} * t.group_channels;
    coefficients = centers + kMostCenter * t.group_channels;
    bytes = coefficients + int64_t{sizeof(float)} * kMostCoefficients * t.group_channels;
  }
};

// Turns a streaming plan that reduces and maps into a resident one. False: that is impossible, and plan.why
// says why.
bool make_resident(const Problem& problem, const Device& device, bool aligned, Plan& plan);

// aligned: every tensor begins at a multiple of 16 bytes.
// std::invalid_argument where what was chosen cannot be.
Plan make_plan(const Problem& problem, const Device& device, bool aligned, Choice choice);

const char* name(Engine engine);

// "automatic", "streaming" or "resident"; std::invalid_argument for anything else.
Choice choice_named(const std::string& name);

// A group to a channel; threads and chunks are for the engine to add.
Tiling planes_tiling(const Extent& extent, int lanes, bool aligned);

// Groups of `channels`, `fold` rows joined to one; rows, threads and chunks are for the engine to add.
Tiling rows_tiling(const Extent& extent, int lanes, int64_t fold, int64_t channels);

// Gives a rows tiling the block that walks it: as many rows high as `most` threads allow.
void set_block(Tiling& tiling, int most);

// Rows that are joined to one, so that short ones end with a vector; a row has a thread per vector at most.
int64_t rows_folded(const Extent& extent, int lanes, int threads);

constexpr int64_t kRunBytes = 512;      // from here on a plane's run fills a warp: planes, not rows
constexpr int64_t kSegmentBytes = 128;  // of a row at least: a line, below which DRAM gives half its rate

constexpr int whole_warps(int64_t threads) { return static_cast<int>(round_up(threads, kWarp)); }

// Vectors that cover a run of so many elements wherever it begins; on_boundaries: on one.
constexpr int64_t vectors_of_run(int64_t length, int lanes, bool on_boundaries) {
  return on_boundaries && length % lanes == 0 ? length / lanes : (length + lanes - 2) / lanes + 1;
}

}  // namespace bnext::cuda
