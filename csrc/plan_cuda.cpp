// The heuristics of plan_cuda.h, each constant with its unit and reason.
#include "plan_cuda.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace bnext::cuda {
namespace {

constexpr int kRowThreads = 384;  // of a rows reduce: 168 registers each, 48 KB in flight per multiprocessor
constexpr int kPlaneThreads = 256;  // of a planes reduce: channels are short, and several blocks overlap
constexpr int kMapThreads = 256;
constexpr int kBatch = 8;               // vectors a thread should get at least, for loads to overlap
constexpr int64_t kFoldElements = 128;  // rows shorter than this are joined until they end with a vector
constexpr int kWidest = 256;            // vectors of a row in a group: centers and sums fit shared memory
constexpr int kMapWidth = 32;           // vectors of a row in a map's group
constexpr int kShortRunVectors = 64;    // the same where channels are short runs
constexpr int kPlaneBlocks = 3;         // blocks per multiprocessor of a planes reduce: as many as it holds
constexpr int kMapBlocks = 8;           // the same of maps, which only stream
// The last block of a group adds chunks * channels partial sums alone. With multiprocessors / groups chunks
// that is proportional to channels_of_group^2 / channels; this share of it takes about a microsecond.
constexpr double kFoldShare = 64;

// Chunks of at least `least` positions, at most `wanted` of them.
void cut(Tiling& tiling, int64_t wanted, int64_t least) {
  const int64_t positions = std::max<int64_t>(1, tiling.positions());
  const int64_t chunks = std::clamp<int64_t>(wanted, 1, ceil_div(positions, std::max<int64_t>(1, least)));
  tiling.chunk = ceil_div(positions, chunks);
  tiling.chunks = ceil_div(positions, tiling.chunk);
}

Tiling planes(const Extent& e, int lanes, const Device& device, bool aligned, int blocks_per_multiprocessor,
              int most_threads) {
  Tiling t = planes_tiling(e, lanes, aligned);
  const int most = std::min(most_threads, device.block_threads);
  t.threads = static_cast<int>(std::clamp<int64_t>(whole_warps(t.positions() / 2), kWarp, most));
  cut(t, int64_t{blocks_per_multiprocessor} * device.multiprocessors / e.channels,
      int64_t{t.threads} * kBatch);
  return t;
}

// Channels a group of a rows reduce should have.
int64_t group_channels(const Extent& e, int lanes, int threads) {
  const int64_t unit = lanes / std::gcd(e.inner, int64_t{lanes});  // channels per whole number of vectors
  int64_t channels = 0;
  if (e.inner == 1) {
    const int64_t segment = kSegmentBytes / kVectorBytes * lanes;
    const int64_t height = threads / (kSegmentBytes / kVectorBytes);
    channels = segment;
    if (e.outer > height * kBatch) {  // otherwise a block takes all rows in one go: no partial sums
      const double balanced = std::sqrt(kFoldShare * static_cast<double>(e.channels));
      channels = std::max(channels, static_cast<int64_t>(balanced));
    }
    // Fewer rows than a column of threads takes: threads side by side rather than idle.
    channels = std::max(channels, threads / std::max<int64_t>(1, e.outer) * lanes);
    channels = channels / segment * segment;
  } else {
    channels = kShortRunVectors * lanes / e.inner;
  }
  channels = std::min({channels, int64_t{kWidest} * lanes / e.inner, e.channels});
  return std::max(unit, channels / unit * unit);
}

Tiling rows_reduce(const Extent& e, int lanes, const Device& device) {
  int most = std::min(kRowThreads, device.block_threads);
  const int64_t fold = rows_folded(e, lanes, most);
  int64_t channels = fold > 1 ? e.channels : group_channels(e, lanes, most);
  // A narrow block of few threads takes fewer vectors, whole channels all the same.
  while (channels > 1 && fold == 1 && ceil_div(channels * e.inner, lanes) > most) {
    channels = ceil_div(channels, 2);
  }
  Tiling t = rows_tiling(e, lanes, fold, std::min(channels, e.channels));
  t.rows = e.outer / fold;
  // Groups enough for several turns: smaller blocks, of which one begins while another ends.
  if (t.groups >= 2 * device.multiprocessors && t.vectors <= most / 2) most /= 2;
  set_block(t, most);
  const int64_t per_multiprocessor = std::max(1, kRowThreads / t.threads);
  cut(t, per_multiprocessor * device.multiprocessors / t.groups, int64_t{t.height} * kBatch);
  return t;
}

// Columns of a map are vectors of a period: the shortest stretch of memory after which channels and vector
// boundaries coincide again.
Tiling rows_map(const Extent& e, int lanes, const Device& device) {
  Tiling t;
  t.traversal = Traversal::rows;
  const int most = std::min(kMapThreads, device.block_threads);
  t.row_length = std::lcm(e.channels * e.inner, int64_t{lanes});
  const int64_t columns = std::min(t.row_length, round_up(e.numel() + lanes, lanes)) / lanes;
  t.vectors = std::min<int64_t>({columns, kMapWidth, most});
  t.group_width = int64_t{t.vectors} * lanes;
  t.groups = ceil_div(columns, t.vectors);
  t.rows = ceil_div(e.numel() + lanes - 1, t.row_length);  // the first may begin inside a vector
  set_block(t, most);
  cut(t, ceil_div(int64_t{kMapBlocks} * device.multiprocessors, t.groups), int64_t{t.height} * kBatch);
  return t;
}

// Whether resident is sure to gain: one launch beside two, where nothing waits.
bool is_sure_to_gain(const Plan& resident, int lanes, bool aligned, const char*& why) {
  const Tiling& t = resident.reduce;
  if (!aligned || (t.traversal == Traversal::rows && !t.whole_vectors(lanes))) {
    why = "vectors of rows lie off boundaries";
  } else if (t.chunks > 1) {  // on an H200 0.94 to 1.97 times as long
    why = "blocks that share a slab mostly lose more by meeting than reading it twice costs";
  } else {
    return true;
  }
  return false;
}

// Of what was asked for: traffic() is of all of it.
Traffic wanted_traffic(const Problem& problem) {
  if (!problem.sums && !problem.input_grad) return {};
  Traffic tensors = traffic(problem);
  if (problem.pass == Pass::frozen_backward && !problem.sums) {  // a map finds dz from x as well
    tensors.read_by_map += std::exchange(tensors.read_by_reduce, 0);
  }
  if (!problem.input_grad || !problem.output) {
    tensors.written = tensors.read_by_map = 0;
    tensors.mask_passes = problem.mask;
  }
  return tensors;
}

}  // namespace

Tiling planes_tiling(const Extent& e, int lanes, bool aligned) {
  Tiling t;
  t.traversal = Traversal::planes;
  t.rows = e.outer;
  t.row_length = e.channels * e.inner;
  t.group_width = e.inner;
  t.group_channels = 1;
  t.groups = e.channels;
  t.vectors = vectors_of_run(e.inner, lanes, aligned);
  return t;
}

Tiling rows_tiling(const Extent& e, int lanes, int64_t fold, int64_t channels) {
  Tiling t;
  t.traversal = Traversal::rows;
  t.row_length = fold * e.channels * e.inner;
  t.group_channels = channels;
  t.group_width = fold > 1 ? t.row_length : channels * e.inner;
  t.groups = ceil_div(e.channels, channels);
  t.vectors = ceil_div(t.group_width, lanes);
  return t;
}

void set_block(Tiling& t, int most) {
  t.height = static_cast<int>(std::clamp<int64_t>(most / t.vectors, 1, t.rows));
  t.threads = whole_warps(t.vectors * t.height);
}

int64_t rows_folded(const Extent& e, int lanes, int threads) {
  const int64_t row = e.channels * e.inner;
  const int64_t fold = row <= kFoldElements ? lanes / std::gcd(row, int64_t{lanes}) : 1;
  return e.outer < 2 * fold || fold * row > int64_t{threads} * lanes ? 1 : fold;
}

Plan make_plan(const Problem& problem, const Device& device, bool aligned, Choice choice) {
  Plan plan;
  const Traffic tensors = wanted_traffic(problem);
  plan.extent = one_run_if_one_channel(problem.extent);
  plan.why = "there is nothing to keep";
  plan.reduces = tensors.read_by_reduce > 0;
  plan.maps = tensors.read_by_map > 0;
  const Extent& e = plan.extent;
  const int64_t element = size_of(problem.dtype);
  const int lanes = lanes_of(problem.dtype);
  if (e.numel() == 0) {  // nothing to walk: one block counts the batch
    plan.reduces = false;
    plan.maps = problem.output && (problem.pass == Pass::forward || problem.pass == Pass::inference);
    plan.extent = {0, e.channels, 1};
    plan.map.traversal = Traversal::rows;
    if (!plan.maps) return plan;
    plan.map.threads = kWarp;
    plan.map.vectors = 1;
    plan.map.groups = plan.map.chunks = 1;
    return plan;
  }
  const bool in_planes = e.channels == 1 || e.inner * element >= kRunBytes;
  plan.reduce.traversal = plan.map.traversal = in_planes ? Traversal::planes : Traversal::rows;
  if (plan.reduces) {
    plan.reduce = in_planes ? planes(e, lanes, device, aligned, kPlaneBlocks, kPlaneThreads)
                            : rows_reduce(e, lanes, device);
  }
  if (plan.maps) {
    plan.map =
        in_planes ? planes(e, lanes, device, aligned, kMapBlocks, kMapThreads) : rows_map(e, lanes, device);
  }

  const int64_t tensor_bytes = e.numel() * element, mask = problem.mask ? mask_bytes(e.numel()) : 0;
  const int64_t again = std::min(tensors.read_by_reduce, tensors.read_by_map);
  const int64_t mask_again = std::max<int64_t>(tensors.mask_passes - 1, 0) * mask;
  // The map walks backwards: what the reduce read last it finds in L2, of which a fifth goes to the output.
  const int64_t kept = std::min(again * tensor_bytes + mask_again, device.l2 * 4 / 5);
  plan.bytes_moved = (tensors.read_by_reduce + tensors.read_by_map + tensors.written) * tensor_bytes + mask +
                     mask_again - kept;
  plan.bytes_minimum =
      (std::max(tensors.read_by_reduce, tensors.read_by_map) + tensors.written) * tensor_bytes + mask;
  plan.floor_seconds = device.bandwidth > 0 ? static_cast<double>(plan.bytes_minimum) / device.bandwidth : 0;
  plan.streaming_stores = tensor_bytes > device.l2 / 2;
  plan.early_map = device.early_launches && plan.reduces && plan.maps;
  if (plan.reduces) plan.scratch_bytes = (plan.reduce.chunks + 1) * e.channels * int64_t{sizeof(double)} * 2;
  if (choice == Choice::streaming) plan.why = "asked for";
  if (choice == Choice::streaming || !plan.reduces || !plan.maps) return plan;

  Plan resident = plan;
  const bool possible = make_resident(problem, device, aligned, resident);
  if (choice == Choice::resident) {
    if (!possible) {
      throw std::invalid_argument(std::string("expected a call that the resident engine takes, but ") +
                                  resident.why);
    }
    resident.why = "asked for";
    return resident;
  }
  plan.why = resident.why;
  return possible && is_sure_to_gain(resident, lanes, aligned, plan.why) ? resident : plan;
}

const char* name(Engine engine) {
  switch (engine) {
    case Engine::streaming:
      return "streaming";
    case Engine::resident:
      return "resident";
  }
  return "";
}

Choice choice_named(const std::string& name) {
  if (name == "automatic") return Choice::automatic;
  if (name == "streaming") return Choice::streaming;
  if (name == "resident") return Choice::resident;
  throw std::invalid_argument("expected engine automatic, streaming or resident, but got " + name);
}

}  // namespace bnext::cuda
