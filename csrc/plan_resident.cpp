// The heuristics of the resident engine: how wide a slab is, how many blocks own one, how many slabs are
// under way at once. Constants have their unit and reason; no GPU has compared them with others.
#include <algorithm>
#include <numeric>

#include "plan_cuda.h"

namespace bnext::cuda {
namespace {

constexpr int kThreads = 256;     // of a block, with 128 registers each: two blocks to a multiprocessor
constexpr int kBlocks = 2;        // the same: one loads while the other waits or stores
constexpr int kMostSegments = 2;  // of a row that is one slab; a wider one is cut, a segment to a slab
// Bytes of shared memory that a block takes besides: of what it may ask for, last_to_arrive has some, rounded
// up for what follows; of a multiprocessor's, CUDA has a kilobyte more.
constexpr int64_t kStaticMemory = 128, kBlockReserve = kStaticMemory + (1 << 10);
// One block takes as long to load so much as blocks take to wait for each other, about a microsecond.
constexpr int64_t kAloneBytes = 64 << 10;
constexpr int kLeastRows = 4;  // vectors of a thread where blocks share a slab
// Shorter runs take more instructions in bulk than with sixteen bytes to a lane of a warp.
constexpr int64_t kBulkBytes = kWarp * kVectorBytes;

Tiling rows(const Extent& e, int lanes, int most) {
  const int64_t row = e.channels * e.inner, fold = rows_folded(e, lanes, most);
  const int64_t segment = kSegmentBytes / kVectorBytes * lanes;
  int64_t channels = e.channels;
  if (fold == 1 && row > kMostSegments * segment) {
    const int64_t unit = lanes / std::gcd(e.inner, int64_t{lanes});  // channels per whole number of vectors
    channels = std::min(channels, unit * std::max<int64_t>(1, segment / (unit * e.inner)));
  }
  Tiling t = rows_tiling(e, lanes, fold, channels);
  t.rows = ceil_div(e.numel(), t.row_length);  // the last may be short
  set_block(t, most);
  return t;
}

Tiling planes(const Extent& e, int lanes, bool aligned, int most) {
  Tiling t = planes_tiling(e, lanes, aligned);
  t.threads = static_cast<int>(std::clamp<int64_t>(whole_warps(t.positions()), kWarp, most));
  return t;
}

// Positions that one vector of every thread covers.
int64_t stride(const Tiling& t) { return t.traversal == Traversal::planes ? t.threads : t.height; }

void cut(Tiling& t, int64_t chunks) {
  t.chunk = ceil_div(t.positions(), chunks);
  t.chunks = ceil_div(t.positions(), t.chunk);
}

// What a slab is to its blocks.
struct Room {
  int64_t multiprocessors = 1;  // but for those that are spared
  int64_t blocks = 0;           // that the device holds at once
  int64_t chunks = 0;           // blocks that a slab takes at least; 0: none holds a vector of every thread
};

// Blocks on a multiprocessor at most. Two to each would be spread over all, also over those that are spared.
int most_blocks(const Device& device) { return device.spare_multiprocessors > 0 ? 1 : kBlocks; }

// Shared memory of a block that leaves no room for another.
int64_t more_than_half(const Device& device) {
  return std::min(device.shared_memory - kStaticMemory,
                  round_up(device.multiprocessor_memory / 2 - kBlockReserve + 1, kVectorBytes));
}

// As many blocks on a multiprocessor as there is room for a slab to be kept at all.
Room find_room(const Tiling& t, const Device& device, int lanes, int64_t inputs) {
  const int64_t overhead = ResidentMemory(t, lanes, inputs, 0).bytes + kVectorBytes;
  const int64_t vector_bytes =  // of every thread one, and a barrier
      inputs * t.threads * kVectorBytes + int64_t{sizeof(uint64_t)};
  Room room;
  room.multiprocessors = std::max(1, device.multiprocessors - device.spare_multiprocessors);
  for (int together = most_blocks(device); together > 0; --together) {
    const int64_t memory = std::min(device.shared_memory - kStaticMemory,
                                    device.multiprocessor_memory / together - kBlockReserve);
    const int64_t depth = (memory - overhead) / vector_bytes;
    if (memory < overhead || depth < 1) continue;
    room.blocks = room.multiprocessors * together;
    room.chunks = ceil_div(t.positions(), depth * stride(t));
    if (room.chunks <= room.blocks) break;
  }
  return room;
}

// Cuts slabs into chunks, and says how many slabs are under way at once.
void share(Plan& plan, Tiling& t, const Room& room, const Device& device, int64_t inputs) {
  plan.together = t.groups;
  const int64_t slab_bytes =
      t.positions() * (t.traversal == Traversal::planes ? 1 : t.vectors) * inputs * kVectorBytes;
  int64_t chunks = room.chunks;
  // Few slabs leave multiprocessors over: they share those that take a block alone too long.
  if (chunks == 1 && slab_bytes > kAloneBytes && t.groups * 2 <= room.multiprocessors) chunks = 2;
  if (chunks == 1) return cut(t, 1);
  const int64_t most =
      std::min(ceil_div(slab_bytes, kAloneBytes / 2), ceil_div(t.positions(), kLeastRows * stride(t)));
  // Clusters start as others end, and need no room for all at once. More blocks than they have only where
  // those would load long.
  const int64_t wanted = std::max(chunks, std::min(room.blocks / t.groups, most));
  const int64_t largest = device.cluster_blocks;
  const bool is_small = chunks <= largest && slab_bytes <= largest * kAloneBytes;
  if (largest > 1 && (wanted <= largest || is_small)) {
    cut(t, std::min(wanted, largest));
    plan.cluster = static_cast<int>(t.chunks);
    return;
  }
  const int64_t turns = ceil_div(t.groups, std::min(t.groups, room.blocks / chunks));
  plan.together = ceil_div(t.groups, turns);
  cut(t, std::max(chunks, std::min(room.blocks / plan.together, most)));
  if (t.chunks == 1) plan.together = t.groups;
  plan.waiting_blocks = t.chunks > 1 ? plan.together * t.chunks : 0;
}

// Whether vectors of every slab lie in runs long enough, and in the order of threads.
bool has_long_runs(const Tiling& t, int lanes) {
  if (!t.whole_vectors(lanes) || t.row_length % t.group_width != 0) return false;
  if (t.traversal == Traversal::planes) return t.vectors * kVectorBytes >= kBulkBytes;
  const int64_t run = t.group_width == t.row_length ? t.vectors * t.chunk : t.vectors;
  return run * kVectorBytes >= kBulkBytes && t.threads == t.vectors * t.height;
}

}  // namespace

bool make_resident(const Problem& problem, const Device& device, bool aligned, Plan& plan) {
  const auto refuse = [&](const char* why) {
    plan.why = why;
    return false;
  };
  if (problem.dtype == Dtype::float64) return refuse("float64 streams");
  const Extent& e = plan.extent;
  const int64_t inputs = traffic(problem).read_by_reduce;
  const int lanes = lanes_of(problem.dtype);
  const int most = std::min(kThreads, device.block_threads / kWarp * kWarp);
  Tiling t =
      plan.reduce.traversal == Traversal::planes ? planes(e, lanes, aligned, most) : rows(e, lanes, most);
  if (t.threads > most) return refuse("a row of a slab is wider than a block");
  const Room room = find_room(t, device, lanes, inputs);
  if (room.chunks == 0) return refuse("a block's shared memory holds no vectors");
  if (room.chunks > room.blocks) return refuse("a slab does not fit the device's shared memory");
  share(plan, t, room, device, inputs);
  plan.early_map = false;
  plan.bulk_copies = device.bulk_copies && aligned && has_long_runs(t, lanes);
  plan.depth = static_cast<int>(ceil_div(t.chunk, stride(t)));
  plan.block_memory = ResidentMemory(t, lanes, inputs, plan.depth).bytes;
  if (plan.waiting_blocks > 0 && device.spare_multiprocessors > 0)
    plan.block_memory = std::max(plan.block_memory, more_than_half(device));
  plan.engine = Engine::resident;
  plan.reduce = t;
  plan.map = {};
  plan.map.traversal = t.traversal;
  plan.maps = false;
  plan.scratch_bytes = plan.waiting_blocks > 0 ? t.chunks * e.channels * int64_t{sizeof(double)} * 2 : 0;
  const int64_t mask_passes = traffic(problem).mask_passes;
  plan.bytes_moved = plan.bytes_minimum + std::max<int64_t>(0, mask_passes - 1) * mask_bytes(e.numel());
  plan.why = t.chunks == 1             ? "a block keeps a slab, in one launch"
             : plan.waiting_blocks > 0 ? "blocks that share a slab keep it"
                                       : "a cluster keeps a slab, in one launch";
  return true;
}

}  // namespace bnext::cuda
