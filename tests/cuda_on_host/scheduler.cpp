// Runs the threads of a launch in turns, and sees when a block cannot go on.
#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace model {
namespace {

// A block that is given so many turns in which no thread ends is not going to end.
constexpr unsigned kPatience = 20000;

constexpr const char* kNames[] = {"are running",
                                  "have ended",
                                  "wait in sync_block",
                                  "wait at the beginning of last_to_arrive",
                                  "wait at the end of last_to_arrive",
                                  "wait in sync_warp",
                                  "wait in exchange",
                                  "wait at the beginning of arrive_and_wait",
                                  "wait for other blocks",
                                  "wait at the end of arrive_and_wait",
                                  "wait for the cluster",
                                  "wait for bytes"};

Memory new_block_memory(size_t bytes) {
  auto* const memory = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kMemoryAlignment}));
  std::memset(memory, 0xCD, bytes);
  return Memory(memory);
}

void require_no_copies(const Block& block) {
  for (const auto& [barrier, arrivals] : block.arrivals) {
    if (!arrivals.copies.empty()) throw std::runtime_error("a block ends with copies under way");
  }
}

// The last thread of a block in a cluster takes its memory with it, for ThreadSanitizer a write: of nobody
// that still reads there.
void end_thread() {
  Block& block = *current->block;
  bool last = false;
  {
    const Unwatched unwatched;
    for (const auto& batch : current->copies) {
      if (!batch.empty()) throw std::runtime_error("a thread ends with copies under way");
    }
    release(&block.end_token);
    last = block.ended + 1 == launched->threads;
    if (!last) return;
    require_no_copies(block);
    acquire(&block.end_token);
  }
  if (block.cluster != nullptr) std::memset(block.memory.get(), 0xCD, block.memory_bytes);
}

MODEL_UNINSTRUMENTED void run_thread() {
  acquire(&launched->begin_token);
  try {
    launched->body();
    end_thread();
  } catch (...) {
    const Unwatched unwatched;
    launched->failure = std::current_exception();
  }
  {
    const Unwatched unwatched;
    Thread& self = *current;
    self.block->places[self.index] = Place::ended;
    ++self.block->ended;
    self.block->idle_turns = 0;
  }
  current->fiber.leave_for_good();
}

}  // namespace

Process process;
Launch* launched = nullptr;
Thread* current = nullptr;

Block::Block(unsigned index, unsigned count, size_t shared_bytes, std::shared_ptr<Cluster> cluster)
    : index(index),
      barrier{.first = 0, .count = count},
      places(count, Place::running),
      threads(std::make_unique<Thread[]>(count)),
      warps(std::make_unique<Warp[]>(count / kWarp)),
      memory(new_block_memory(shared_bytes)),
      memory_bytes(shared_bytes),
      cluster(std::move(cluster)) {
  for (unsigned t = 0; t < count; ++t) {
    Warp& warp = warps[t / kWarp];
    if (t % kWarp == 0) warp.barrier = {.first = t, .count = kWarp};
    threads[t].block = this;
    threads[t].index = t;
    threads[t].fiber.prepare(warp.stacks, t % kWarp, run_thread);
  }
}

std::string describe(const Block& block) {
  std::string text =
      "block " + std::to_string(block.index) + ": of " + std::to_string(block.places.size()) + " threads";
  const char* separator = " ";
  for (size_t place = 0; place < std::size(kNames); ++place) {
    const auto number = std::count(block.places.begin(), block.places.end(), static_cast<Place>(place));
    if (number == 0) continue;
    text += separator + std::to_string(number) + " " + kNames[place];
    separator = ", ";
  }
  return text;
}

Launch::Launch(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned alive, unsigned cluster,
               const std::function<void()>& body)
    : blocks(blocks),
      threads(threads),
      number(process.counts.launches),
      body(body),
      shared_bytes_(shared_bytes),
      alive_(alive),
      cluster_(cluster),
      block_order_(blocks),
      thread_order_(threads) {
  std::iota(thread_order_.begin(), thread_order_.end(), 0u);
  if (process.options.order == Options::Order::descending) {
    std::reverse(thread_order_.begin(), thread_order_.end());
  }
  order_blocks();
  release(&begin_token);
  launched = this;
}

Launch::~Launch() {
  for (auto& block : resident_) {
    if (block != nullptr) retire(std::move(block));
  }
  resident_.clear();
  process.ends_later = true;
  process.awaits_early = lets_next_begin && std::uncaught_exceptions() == 0;
  if (!lets_next_begin) synchronize();
  launched = nullptr;
  current = nullptr;
}

// Those of a cluster one after another.
void Launch::order_blocks() {
  std::vector<unsigned> clusters(blocks / std::max(cluster_, 1u));
  std::iota(clusters.begin(), clusters.end(), 0u);
  if (process.options.order == Options::Order::random) {
    std::shuffle(clusters.begin(), clusters.end(), process.generator);
  }
  auto to = block_order_.begin();
  for (const unsigned first : clusters) {
    const auto begin = to;
    for (unsigned rank = 0; rank < cluster_; ++rank) *to++ = first * cluster_ + rank;
    if (process.options.order == Options::Order::random) std::shuffle(begin, to, process.generator);
  }
  if (process.options.order == Options::Order::descending) {
    std::reverse(block_order_.begin(), block_order_.end());
  }
}

void Launch::start_blocks() {
  while (started_ < blocks && resident_.size() + cluster_ <= std::max(alive_, cluster_)) {
    std::shared_ptr<Cluster> cluster;
    if (cluster_ > 1) {
      cluster = std::make_shared<Cluster>();
      cluster->blocks.resize(cluster_);
      cluster->threads = size_t{cluster_} * threads;
    }
    for (unsigned k = 0; k < cluster_; ++k) {
      const unsigned index = block_order_[started_++];
      resident_.push_back(std::make_unique<Block>(index, threads, shared_bytes_, cluster));
      if (cluster != nullptr) cluster->blocks[index % cluster_] = resident_.back().get();
    }
  }
}

bool Thread::can_run() const {
  const Place place = block->places[index];
  switch (place) {
    case Place::running:
      return true;
    case Place::group:
      return *waits_for >= target;
    case Place::cluster:
      return block->cluster->generation >= met;
    case Place::bytes:
      return arrivals->has_passed(target) || arrivals->all_begun();
    default:
      return false;
  }
}

// Every thread that can run runs until it waits.
bool Launch::give_turn(Block& block) {
  if (process.options.order == Options::Order::random) {
    std::shuffle(thread_order_.begin(), thread_order_.end(), process.generator);
  }
  bool progress = false;
  for (const unsigned t : thread_order_) {
    if (!block.threads[t].can_run()) continue;
    progress = true;
    current = &block.threads[t];
    current->fiber.enter();
    if (failure) std::rethrow_exception(failure);
  }
  const bool waits = std::any_of(block.places.begin(), block.places.end(),
                                 [](Place p) { return p == Place::group || p == Place::cluster; });
  if (!progress && !waits) throw std::runtime_error("deadlock in " + describe(block));
  if (progress && ++block.idle_turns > kPatience) throw std::runtime_error("livelock in " + describe(block));
  return progress;
}

void Launch::retire(std::unique_ptr<Block> block) {
  for (unsigned t = 0; t < threads; ++t) block->threads[t].fiber.release_all(&process.end_tokens[number % 2]);
  if (block->cluster != nullptr) block->cluster->blocks[block->index % cluster_] = nullptr;
  if (kThreadSanitizer) process.memory_of_ended.push_back(std::move(block->memory));
}

void Launch::run() {
  while (true) {
    start_blocks();
    if (resident_.empty()) return;
    if (process.options.order == Options::Order::random) {
      std::shuffle(resident_.begin(), resident_.end(), process.generator);
    }
    bool progress = false;
    for (auto& block : resident_) {
      progress |= give_turn(*block);
      if (block->ended == threads) {
        ++process.counts.blocks;
        retire(std::move(block));
      }
    }
    if (!progress) throw std::runtime_error("deadlock between blocks: " + describe(*resident_.front()));
    std::erase(resident_, nullptr);
  }
}

}  // namespace model
