// The heuristics of the resident engine: how wide a slab is, how many blocks own one, how many slabs are
// under way at once. Constants have their unit and reason; none of them was measured on a GPU yet.
#include <algorithm>
#include <numeric>

#include "plan_cuda.h"

namespace bnext::cuda {
namespace {

constexpr int kThreads = 256;     // of a block, with 128 registers each: two blocks to a multiprocessor
constexpr int kBlocks = 2;        // the same: one loads while the other waits or stores
constexpr int kMostSegments = 2;  // of a row that is one slab; a wider one is cut, a segment to a slab
constexpr int64_t kBlockReserve = 1 << 10;  // bytes of shared memory that a block takes besides
// One block takes as long to load so much as blocks take to wait for each other, about a microsecond.
constexpr int64_t kAloneBytes = 64 << 10;
constexpr int kLeastRows = 4;  // vectors of a thread where blocks share a slab

Tiling rows(const Extent& e, int lanes, int most) {
  Tiling t;
  t.traversal = Traversal::rows;
  const int64_t row = e.channels * e.inner, fold = rows_folded(e, lanes, most);
  const int64_t segment = kSegmentBytes / kVectorBytes * lanes;
  t.row_length = fold * row;
  t.rows = ceil_div(e.numel(), t.row_length);  // the last may be short
  if (fold > 1 || row <= kMostSegments * segment) {
    t.group_channels = e.channels;
  } else {
    const int64_t unit = lanes / std::gcd(e.inner, int64_t{lanes});  // channels per whole number of vectors
    t.group_channels = std::min(e.channels, unit * std::max<int64_t>(1, segment / (unit * e.inner)));
  }
  t.group_width = fold > 1 ? t.row_length : t.group_channels * e.inner;
  t.groups = ceil_div(e.channels, t.group_channels);
  t.vectors = ceil_div(t.group_width, lanes);
  t.height = static_cast<int>(std::clamp<int64_t>(most / t.vectors, 1, t.rows));
  t.threads = whole_warps(t.vectors * t.height);
  return t;
}

Tiling planes(const Extent& e, int lanes, bool aligned, int most) {
  Tiling t;
  t.traversal = Traversal::planes;
  t.rows = e.outer;
  t.row_length = e.channels * e.inner;
  t.group_width = e.inner;
  t.group_channels = 1;
  t.groups = e.channels;
  t.vectors = vectors_of_run(e.inner, lanes, aligned);
  t.threads = static_cast<int>(std::clamp<int64_t>(whole_warps(t.positions()), kWarp, most));
  return t;
}

// Positions that one vector of every thread covers.
int64_t stride(const Tiling& t) { return t.traversal == Traversal::planes ? t.threads : t.height; }

void cut(Tiling& t, int64_t chunks) {
  t.chunk = ceil_div(t.positions(), chunks);
  t.chunks = ceil_div(t.positions(), t.chunk);
}

}  // namespace

bool make_resident(const Problem& problem, const Device& device, bool aligned, Plan& plan) {
  const auto refuse = [&](const char* why) {
    plan.why = why;
    return false;
  };
  if (!plan.reduces || !plan.maps) return refuse("there is nothing to keep");
  if (problem.dtype == Dtype::float64) return refuse("float64 streams");
  const Extent& e = plan.extent;
  const int64_t element = size_of(problem.dtype), inputs = traffic(problem).read_by_reduce;
  const int lanes = static_cast<int>(kVectorBytes / element);
  const int most = std::min(kThreads, device.block_threads / kWarp * kWarp);
  Tiling t =
      plan.reduce.traversal == Traversal::planes ? planes(e, lanes, aligned, most) : rows(e, lanes, most);
  if (t.threads > most) return refuse("a row of a slab is wider than a block");

  // As many blocks on a multiprocessor as there is room for a slab to be kept at all.
  const int64_t overhead = ResidentMemory(t, lanes, inputs, 0).bytes;
  const int64_t vector_bytes = inputs * t.threads * kVectorBytes;  // of every thread one
  const int64_t multiprocessors = std::max(1, device.multiprocessors - device.spare_multiprocessors);
  int64_t blocks = 0, chunks = 0;
  for (int together = kBlocks; together > 0; --together) {
    const int64_t memory =
        std::min(device.shared_memory, device.multiprocessor_memory / together - kBlockReserve);
    const int64_t depth = (memory - overhead) / vector_bytes;
    if (memory < overhead || depth < 1) continue;
    blocks = multiprocessors * together;
    chunks = ceil_div(t.positions(), depth * stride(t));
    if (chunks <= blocks) break;
  }
  if (chunks == 0) return refuse("a block's shared memory holds no vectors");
  if (chunks > blocks) return refuse("a slab does not fit the device's shared memory");

  // Few slabs leave multiprocessors over: they share those that take a block alone too long.
  const int64_t slab_bytes =
      t.positions() * (t.traversal == Traversal::planes ? 1 : t.vectors) * inputs * kVectorBytes;
  if (chunks == 1 && slab_bytes > kAloneBytes && t.groups * 2 <= multiprocessors) chunks = 2;
  plan.together = t.groups;
  if (chunks > 1) {
    const int64_t turns = ceil_div(t.groups, std::min(t.groups, blocks / chunks));
    plan.together = ceil_div(t.groups, turns);
    const int64_t shares =
        std::min(ceil_div(slab_bytes, kAloneBytes / 2), ceil_div(t.positions(), kLeastRows * stride(t)));
    chunks = std::max(chunks, std::min(blocks / plan.together, shares));
  }
  cut(t, chunks);
  if (t.chunks == 1) plan.together = t.groups;
  plan.depth = static_cast<int>(ceil_div(t.chunk, stride(t)));
  plan.block_memory = ResidentMemory(t, lanes, inputs, plan.depth).bytes;
  plan.waiting_blocks = t.chunks > 1 ? plan.together * t.chunks : 0;
  plan.engine = Engine::resident;
  plan.reduce = t;
  plan.map = {};
  plan.map.traversal = t.traversal;
  plan.maps = false;
  plan.scratch_bytes = t.chunks * e.channels * int64_t{sizeof(double)} * 2;
  const int64_t mask_passes = traffic(problem).mask_passes;
  plan.bytes_moved = plan.bytes_minimum + std::max<int64_t>(0, mask_passes - 1) * mask_bytes(e.numel());
  plan.why = t.chunks == 1 ? "a block keeps a slab, in one launch" : "blocks that share a slab keep it";
  return true;
}

}  // namespace bnext::cuda
