// The heuristics of plan.h, each constant with its unit and reason.
#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext {
namespace {

constexpr int64_t kLanes = 16;  // elements per vector step (cpu/vector.h)

// Planes or rows, by `inner`, the elements of a run. Planes from kLongRun on, where the tail of a run no
// longer matters; from kMappedRun on where nothing is summed, as memory order is then worth more; above
// kShortRun if runs are whole vectors, and at kShortRun if a channel has at most most_short_runs of them (of
// 1024 runs of 8x8, rows take 0.4 to 0.9 times as long on Zen 4); from kRunOfFew on if `outer` is at most
// kFewRows, where a sum for each column costs more than the tails.
constexpr int64_t kLongRun = 128, kMappedRun = 32, kShortRun = 64, kRunOfFew = 24, kFewRows = 4;
constexpr int64_t most_short_runs(int64_t element) { return element == 2 ? 16 : element == 4 ? 128 : 512; }

constexpr int64_t kRunBytes = 16 << 10;    // contiguous bytes a slab should read per outer index: four pages
constexpr int64_t kPageBytes = 4 << 10;    // and at least so many, if only the last cache has room
constexpr int64_t kMapBytes = 1 << 20;     // where nothing is reduced, of large tensors: memory order is best
constexpr int64_t kColumnBytes = 8 << 10;  // narrowest column slab: narrower ones take up to twice as long
constexpr int64_t kLineBytes = 64;         // of a cache line, and of the widest vector
constexpr int64_t kTileBytes = 8 << 10;  // of one tensor in a row of a tile: what goes with it stays in L1/L2
constexpr int64_t kSharedColumns = 512;  // elements: rows k times as wide need k times fewer chunks
constexpr int64_t kFoldColumns = 128;    // rows narrower than this are folded
constexpr int64_t kSerialElements = 1 << 15;  // below this a parallel region costs more than it saves
constexpr int64_t kChunkElements = 1 << 16;   // smallest chunk worth its own partial sums
constexpr int64_t kFirstCache = 48 << 10;     // bytes: an L1 cache that holds what is fetched 16 KB ahead
constexpr int64_t kFewParts = 16;             // parts that still balance, give or take a half
constexpr int64_t kMaxParts = 64;  // slabs * chunks aimed at: enough for any thread count to balance

// Of the multiples of `unit` up to `most` and down to half of it the one that leaves the busiest thread the
// fewest channels; the widest of several.
int64_t balanced(int64_t most, int64_t unit, int64_t channels, int64_t threads) {
  const auto busiest = [&](int64_t width) { return ceil_div(ceil_div(channels, width), threads) * width; };
  int64_t best = most;
  for (int64_t width = most - unit; 2 * width >= most && width > 0; width -= unit) {
    if (busiest(width) < busiest(best)) best = width;
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

// A problem on a machine, as it is cut below.
struct Work {
  Geometry geometry;
  bool maps_only;                // nothing is summed
  int64_t element;               // bytes
  int64_t tensor_bytes;          // of one tensor
  int64_t channel_bytes;         // of all tensors that are kept between the two passes
  int64_t threads, parts;        // the parts are enough to balance the threads
  int64_t private_cache, share;  // bytes: a core's own, and with its part of the last one

  Work(const Problem& problem, const Machine& machine) {
    const int64_t kept = traffic(problem).read_by_reduce;
    maps_only = kept == 0;
    element = size_of(problem.dtype);
    geometry = make_geometry(problem.extent, element, maps_only);
    tensor_bytes = geometry.extent.numel() * element;
    channel_bytes = geometry.extent.count() * element * std::max<int64_t>(1, kept);
    threads = geometry.extent.numel() < kSerialElements ? 1 : std::max(1, machine.threads);
    parts = threads == 1 ? 1 : kFewParts;
    private_cache = machine.private_cache;
    share = std::max(private_cache, machine.shared_cache / 2 / threads);
  }
};

// Positions. Where sums are taken from the shape alone, for widths of slabs depend on caches; wide rows can
// also be shared out by columns, planes by channels or, where nothing is summed, by slabs.
int64_t chunk_length(const Work& work, int64_t slabs) {
  const Extent& e = work.geometry.extent;
  const bool planes = work.geometry.traversal == Traversal::planes;
  const int64_t positions = work.geometry.positions();
  const int64_t shortest = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, e.numel() / positions));
  const int64_t across = !planes          ? ceil_div(work.geometry.row_length(), kSharedColumns)
                         : work.maps_only ? slabs
                                          : e.channels;
  const int64_t length = std::max(ceil_div(positions, ceil_div(kMaxParts, across)), shortest);
  const bool whole_runs =
      planes && (length >= e.inner || (work.maps_only && 2 * e.outer * slabs >= work.parts));
  return std::min(round_up(length, whole_runs ? e.inner : kLanes), positions);
}

// Channels. They are grouped until a slab reads kRunBytes in one go, as far as a core's own cache allows, or
// for kPageBytes the last one; where nothing is summed, until it reads kMapBytes or one of few parts.
int64_t slab_of_planes(const Work& work) {
  const Extent& e = work.geometry.extent;
  const int64_t run_bytes = e.inner * work.element;
  const int64_t unit = kLineBytes / std::gcd(run_bytes, kLineBytes);  // channels per whole number of lines
  const int64_t read_at_once =
      work.maps_only ? std::min(work.tensor_bytes / work.parts, kMapBytes) : kRunBytes;
  const int64_t wanted = round_up(ceil_div(read_at_once, run_bytes), unit);
  const int64_t affordable =
      work.maps_only ? wanted
                     : std::max({int64_t{1}, work.private_cache / 2 / work.channel_bytes,
                                 std::min(ceil_div(kPageBytes, run_bytes), work.share / work.channel_bytes)});
  // For whole lines a slab may lie in the shared cache.
  const int64_t step = affordable >= unit || unit * work.channel_bytes <= work.share / 2 ? unit : 1;
  const int64_t widest =
      std::clamp(std::min(wanted, affordable) / step * step, step, round_up(e.channels, step));
  return std::min(work.maps_only ? widest : balanced(widest, step, e.channels, work.threads), e.channels);
}

int64_t slab_of_rows(const Work& work) {
  const Extent& e = work.geometry.extent;
  if (work.geometry.fold > 1) return e.channels;
  const int64_t unit = kLanes / std::gcd(e.inner, kLanes);  // channels per whole number of vectors
  const int64_t widest = std::max(unit, kTileBytes / work.element / e.inner / unit * unit);
  const int64_t narrowest =
      std::min({widest, e.channels, round_up(ceil_div(kColumnBytes, e.inner * work.element), unit)});
  const int64_t affordable = work.share / work.channel_bytes / unit * unit;
  return std::min(affordable < narrowest ? widest : std::clamp(affordable, narrowest, widest), e.channels);
}

void count_bytes(Plan& plan, const Problem& problem, const Work& work, const Machine& machine) {
  const Traffic tensors = traffic(problem);
  const Extent& e = plan.geometry.extent;
  const bool cached =
      plan.schedule != Schedule::split || e.channels * work.channel_bytes <= machine.shared_cache / 2;
  const int64_t reads = plan.schedule == Schedule::map ? tensors.read_by_map
                        : cached                       ? std::max(tensors.read_by_reduce, tensors.read_by_map)
                                                       : tensors.read_by_reduce + tensors.read_by_map;
  const int64_t mask = mask_bytes(e.numel());
  plan.bytes_moved =
      (reads + tensors.written) * work.tensor_bytes + (cached ? problem.mask : tensors.mask_passes) * mask;
  plan.bytes_minimum =
      (std::max(tensors.read_by_reduce, tensors.read_by_map) + tensors.written) * work.tensor_bytes +
      problem.mask * mask;
}

// Past the cache only what would hardly stay there: the call's tensors exceed it, or two thirds of it where
// others use it too, in training the rest of a step, on a host other machines. Rows of float32 that all but
// fill it take 1.2 to 2 times as long within it, planes 0.7 to 1.2 (Zen 4). Whole lines only: a line that
// is half streamed, half cached costs several times what streaming saves.
void look_past_cache(Plan& plan, const Problem& problem, const Work& work, const Machine& machine) {
  const Extent& e = plan.geometry.extent;
  const bool planes = plan.geometry.traversal == Traversal::planes;
  const auto whole_lines = [&](int64_t elements) { return elements * work.element % kLineBytes == 0; };
  bool in_lines = whole_lines(e.inner);
  if (!planes) {
    in_lines = whole_lines(plan.geometry.row_length());
  } else if (plan.chunk_length % e.inner == 0 && (work.maps_only || problem.pass != Pass::frozen_backward)) {
    // Maps walk on from one channel's run to the next; frozen backward's reducers do not.
    in_lines = whole_lines(plan.slab_channels * e.inner) && whole_lines(e.channels * e.inner);
  }
  const int64_t last_cache = std::max(machine.private_cache, machine.shared_cache);
  const bool alone = problem.pass == Pass::inference && !machine.cache_of_host;
  const bool float_rows = !planes && problem.dtype == Dtype::float32;
  const int64_t room = !alone ? last_cache / 3 * 2 : float_rows ? last_cache / 16 * 15 : last_cache;
  plan.beyond_cache = plan.bytes_minimum > room;
  plan.fetches_first = plan.beyond_cache && machine.first_cache >= kFirstCache;
  plan.streaming_stores = plan.beyond_cache && in_lines && machine.shared_cache > 0;
  // Reading and writing overlap where each pass has some of both: backward takes 0.79 to 1.01 of the time in
  // rows, 0.86 to 0.95 in planes of float32, but 0.93 to 1.05 in those of bfloat16 (Zen 5). Reducers stream
  // runs of whole lines alone; unless it is streamed it takes 1.2 to 1.4.
  const bool reducers_stream = !planes || (work.element >= 4 && whole_lines(e.inner));
  plan.dresidual_first =
      plan.streaming_stores && problem.pass == Pass::backward && problem.dresidual && reducers_stream;
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
  const Work work(problem, machine);
  plan.geometry = work.geometry;
  const Extent& e = plan.geometry.extent;
  if (e.numel() == 0) {  // nothing to cut
    plan.slab_channels = e.channels;
    plan.schedule = work.maps_only ? Schedule::map : Schedule::fused;
    return plan;
  }
  const bool planes = work.geometry.traversal == Traversal::planes;
  plan.slab_channels = planes ? slab_of_planes(work) : slab_of_rows(work);
  plan.slabs = ceil_div(e.channels, plan.slab_channels);
  plan.cache_bytes = work.maps_only ? 0 : plan.slab_channels * work.channel_bytes;
  plan.next_fits = 2 * plan.cache_bytes <= work.private_cache;
  plan.chunk_length = chunk_length(work, plan.slabs);
  plan.chunks = ceil_div(work.geometry.positions(), plan.chunk_length);

  plan.threads = static_cast<int>(std::min(work.threads, plan.slabs * plan.chunks));
  if (work.maps_only) {
    plan.schedule = Schedule::map;
  } else {
    // A thread's last slab must not leave the others idle: at most an eighth of the work may be lost to
    // imbalance. What is split shares out chunks, and gains nothing where a slab is one.
    const int64_t busiest = std::min(ceil_div(plan.slabs, plan.threads) * plan.slab_channels, e.channels);
    const bool shared_out = plan.chunks == 1 || busiest * plan.threads * 8 <= e.channels * 9;
    plan.schedule = plan.cache_bytes <= work.share && shared_out ? Schedule::fused : Schedule::split;
  }
  count_bytes(plan, problem, work, machine);
  look_past_cache(plan, problem, work, machine);
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
