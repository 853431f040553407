// The heuristics of plan.h, each constant with its unit and reason.
#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext {
namespace {

constexpr int64_t kLanes = 16;     // elements per vector step (cpu/vector.h)
constexpr int64_t kLongRun = 128;  // elements: from here on the tail of a reduced plane does not matter
constexpr int64_t kShortRun = 64;  // elements: shorter planes lose too much between channels,
// and these where a channel has more of them: of 1024 runs of 8x8 rows take 0.4 to 0.9 times as long (Zen 4).
constexpr int64_t most_short_runs(int64_t element) { return element == 2 ? 16 : element == 4 ? 128 : 512; }
constexpr int64_t kMappedRun = 32;  // and where nothing is summed: memory order is worth the coefficients
constexpr int64_t kFewRows = 4;     // over so few a sum for each column costs more than ends of planes,
constexpr int64_t kRunOfFew = 24;   // which then may be as short
constexpr int64_t kRunBytes = 16 << 10;  // contiguous bytes a slab should read per outer index: four pages
constexpr int64_t kPageBytes = 4 << 10;  // and at least so many, if only the last cache has room
constexpr int64_t kMapBytes = 1 << 20;   // where nothing is reduced, of large tensors: memory order is best
constexpr int64_t kColumnBytes =
    8 << 10;  // narrowest column slab: with narrower ones a call takes up to twice as long
constexpr int64_t kLineBytes = 64;       // of a cache line, and of the widest vector
constexpr int64_t kTileBytes = 8 << 10;  // of one tensor in a row of a tile: what goes with it stays in L1/L2
constexpr int64_t kSharedColumns =
    512;  // elements: rows this many times wider need that many times fewer chunks
constexpr int64_t kFoldColumns = 128;         // rows narrower than this are folded
constexpr int64_t kSerialElements = 1 << 15;  // below this a parallel region costs more than it saves
constexpr int64_t kChunkElements = 1 << 16;   // smallest chunk worth its own partial sums
constexpr int64_t kFirstCache = 48 << 10;     // bytes: an L1 cache that holds what is fetched 16 KB ahead
constexpr int64_t kFewParts = 16;             // parts that still balance, give or take a half
constexpr int64_t kMaxParts = 64;  // slabs * chunks aimed at: enough for any thread count to balance

// Of the multiples of `unit` up to `most` and down to half of it the one that leaves the busiest thread the
// fewest channels; the widest of several.
int64_t balanced(int64_t most, int64_t unit, int64_t channels, int64_t threads) {
  const auto share = [&](int64_t width) { return ceil_div(ceil_div(channels, width), threads) * width; };
  int64_t best = most;
  for (int64_t width = most - unit; 2 * width >= most && width > 0; width -= unit) {
    if (share(width) < share(best)) best = width;
  }
  return best;
}

// element: bytes.
Geometry make_geometry(const Extent& extent, int64_t element, bool maps_only) {
  Geometry geometry{one_run_if_one_channel(extent)};
  const Extent& e = geometry.extent;
  const int64_t long_run = maps_only ? kMappedRun : kLongRun;
  const bool short_runs = e.inner == kShortRun && e.outer <= most_short_runs(element);
  const bool planes = e.channels == 1 || e.inner >= long_run || short_runs ||
                      (e.inner > kShortRun && e.inner % kLanes == 0) ||
                      (e.inner >= kRunOfFew && e.outer <= kFewRows);
  geometry.traversal = planes ? Traversal::planes : Traversal::rows;
  const int64_t row = e.channels * e.inner;
  if (geometry.traversal == Traversal::rows && row > 0 && row < kFoldColumns) {
    const int64_t whole = kLanes / std::gcd(row, kLanes);  // rows per whole number of vectors
    const int64_t fold = round_up(ceil_div(kFoldColumns, row), whole);
    if (e.outer >= 4 * fold) geometry.fold = fold;
  }
  return geometry;
}

}  // namespace

Traffic traffic(const Problem& problem) {
  const int64_t residual = problem.residual, mask = problem.mask, dresidual = problem.dresidual;
  switch (problem.pass) {
    case Pass::forward:
      return {1, 1 + residual, 1, mask};
    case Pass::inference:
      return {0, 1 + residual, 1, mask};
    case Pass::backward:
      return {2 + residual, 2 + residual, 1 + dresidual, 2 * mask};
    case Pass::frozen_backward:
      if (!problem.sums && !problem.needs_input) return {0, 1, 1 + dresidual, mask};
      return {2 + residual, 0, 1 + dresidual, mask};  // the reduce writes dx as it goes
    case Pass::input_grad:
      return {0, 2 + residual, 1 + dresidual, mask};
  }
  return {};
}

Plan make_plan(const Problem& problem, const Machine& machine) {
  Plan plan;
  const Traffic tensors = traffic(problem);
  const bool maps_only = tensors.read_by_reduce == 0;
  const int64_t element = size_of(problem.dtype);
  plan.geometry = make_geometry(problem.extent, element, maps_only);
  const Extent& e = plan.geometry.extent;
  if (e.numel() == 0) {  // nothing to cut
    plan.slab_channels = e.channels;
    plan.schedule = maps_only ? Schedule::map : Schedule::fused;
    return plan;
  }
  const int64_t tensor_bytes = e.numel() * element;
  const int64_t kept = std::max<int64_t>(tensors.read_by_reduce, 1);  // tensors between the two passes

  // Slab width. Channels are grouped until a slab reads kRunBytes in one go, as far as a core's own cache
  // allows, or for kPageBytes the last one; where nothing is reduced, until it reads kMapBytes or one of few
  // parts.
  const int64_t threads = e.numel() < kSerialElements ? 1 : std::max(1, machine.threads);
  const int64_t parts = threads == 1 ? 1 : kFewParts;
  const int64_t share = std::max(machine.private_cache, machine.shared_cache / 2 / threads);
  const int64_t channel_bytes = e.count() * element * kept;
  bool fits = true;
  if (plan.geometry.traversal == Traversal::planes) {
    const int64_t unit =
        kLineBytes / std::gcd(e.inner * element, kLineBytes);  // channels per whole number of lines
    const int64_t run_bytes = maps_only ? std::min(tensor_bytes / parts, kMapBytes) : kRunBytes;
    const int64_t wanted = round_up(ceil_div(run_bytes, e.inner * element), unit);
    const int64_t affordable =
        maps_only ? wanted
                  : std::max({int64_t{1}, machine.private_cache / 2 / channel_bytes,
                              std::min(ceil_div(kPageBytes, e.inner * element), share / channel_bytes)});
    // For whole lines a slab may lie in the shared cache.
    const int64_t step = affordable >= unit || unit * channel_bytes <= share / 2 ? unit : 1;
    const int64_t widest =
        std::clamp(std::min(wanted, affordable) / step * step, step, round_up(e.channels, step));
    plan.slab_channels =
        std::min(maps_only ? widest : balanced(widest, step, e.channels, threads), e.channels);
    fits = plan.slab_channels * channel_bytes <= share;
  } else if (plan.geometry.fold > 1) {
    plan.slab_channels = e.channels;
    fits = e.channels * channel_bytes <= share;
  } else {
    const int64_t unit = kLanes / std::gcd(e.inner, kLanes);  // channels per whole number of vectors
    const int64_t widest = std::max(unit, kTileBytes / element / e.inner / unit * unit);
    const int64_t narrowest =
        std::min({widest, e.channels, round_up(ceil_div(kColumnBytes, e.inner * element), unit)});
    const int64_t affordable = share / channel_bytes / unit * unit;
    fits = affordable >= narrowest;
    plan.slab_channels = std::min(fits ? std::clamp(affordable, narrowest, widest) : widest, e.channels);
  }
  plan.slab_channels = std::max<int64_t>(1, plan.slab_channels);
  plan.slabs = ceil_div(e.channels, plan.slab_channels);
  plan.cache_bytes = maps_only ? 0 : plan.slab_channels * channel_bytes;
  plan.next_fits = 2 * plan.cache_bytes <= machine.private_cache;

  // Chunks, where sums are taken from the shape alone: slab widths above depend on caches.
  const int64_t positions = plan.geometry.positions();
  const int64_t per_position = std::max<int64_t>(1, e.numel() / std::max<int64_t>(1, positions));
  const int64_t shortest = std::max<int64_t>(1, kChunkElements / per_position);
  // Wide rows can also be shared out by columns, planes by channels.
  const int64_t across = plan.geometry.traversal == Traversal::rows
                             ? ceil_div(plan.geometry.row_length(), kSharedColumns)
                         : maps_only ? plan.slabs
                                     : e.channels;
  plan.chunk_length = std::max(ceil_div(positions, ceil_div(kMaxParts, across)), shortest);
  const bool whole_runs = plan.geometry.traversal == Traversal::planes &&
                          (plan.chunk_length >= e.inner || (maps_only && 2 * e.outer * plan.slabs >= parts));
  plan.chunk_length = round_up(plan.chunk_length, whole_runs ? e.inner : kLanes);
  plan.chunk_length = std::max<int64_t>(1, std::min(plan.chunk_length, positions));
  plan.chunks = std::max<int64_t>(1, ceil_div(positions, plan.chunk_length));

  plan.threads = static_cast<int>(std::min(threads, plan.slabs * plan.chunks));
  if (maps_only) {
    plan.schedule = Schedule::map;
  } else {
    // A thread's last slab must not leave the others idle: at most an eighth of the work may be lost to
    // imbalance. What is split shares out chunks, and gains nothing where a slab is one.
    const int64_t busiest = std::min(ceil_div(plan.slabs, plan.threads) * plan.slab_channels, e.channels);
    const bool shared_out = plan.chunks == 1 || busiest * plan.threads * 8 <= e.channels * 9;
    plan.schedule = fits && shared_out ? Schedule::fused : Schedule::split;
  }

  const bool cached = plan.schedule != Schedule::split || tensor_bytes * kept <= machine.shared_cache / 2;
  const int64_t reads = plan.schedule == Schedule::map ? tensors.read_by_map
                        : cached                       ? std::max(tensors.read_by_reduce, tensors.read_by_map)
                                                       : tensors.read_by_reduce + tensors.read_by_map;
  const int64_t mask = mask_bytes(e.numel());
  plan.bytes_moved =
      (reads + tensors.written) * tensor_bytes + (cached ? problem.mask : tensors.mask_passes) * mask;
  plan.bytes_minimum =
      (std::max(tensors.read_by_reduce, tensors.read_by_map) + tensors.written) * tensor_bytes +
      problem.mask * mask;

  // Past the cache only what would hardly stay there: the call's tensors exceed it, or two thirds of it where
  // others use it too, in training the rest of a step, on a host other machines. Rows of float32 that all but
  // fill it take 1.2 to 2 times as long within it, planes 0.7 to 1.2 (Zen 4). Whole lines only: a line that
  // is half streamed, half cached costs several times what streaming saves.
  const auto whole_lines = [&](int64_t elements) { return elements * element % kLineBytes == 0; };
  bool in_lines = whole_lines(e.inner);
  if (plan.geometry.traversal == Traversal::rows) {
    in_lines = whole_lines(plan.geometry.row_length());
  } else if (plan.chunk_length % e.inner == 0 && (maps_only || problem.pass != Pass::frozen_backward)) {
    // Maps walk on from one channel's run to the next; frozen backward's reducers do not.
    in_lines = whole_lines(plan.slab_channels * e.inner) && whole_lines(e.channels * e.inner);
  }
  const int64_t last_cache = std::max(machine.private_cache, machine.shared_cache);
  const bool alone = problem.pass == Pass::inference && !machine.cache_of_host;
  const bool float_rows = plan.geometry.traversal == Traversal::rows && problem.dtype == Dtype::float32;
  const int64_t room = !alone ? last_cache / 3 * 2 : float_rows ? last_cache / 16 * 15 : last_cache;
  plan.beyond_cache = plan.bytes_minimum > room;
  plan.fetches_first = plan.beyond_cache && machine.first_cache >= kFirstCache;
  plan.streaming_stores = plan.beyond_cache && in_lines && machine.shared_cache > 0;
  return plan;
}

const char* name(Traversal traversal) { return traversal == Traversal::planes ? "planes" : "rows"; }

const char* name(Schedule schedule) {
  switch (schedule) {
    case Schedule::fused:
      return "fused";
    case Schedule::split:
      return "split";
    case Schedule::map:
      return "map";
  }
  return "";
}

}  // namespace bnext
