// What the launching side and threads ask of the execution model.
#include "model.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "scheduler.h"

namespace model {
namespace {

constexpr unsigned kMostThreads = 1024;  // of a block, as on every device
constexpr unsigned kMostOfCluster = 8;   // blocks, as on every device that has clusters

Warp& own_warp() { return current->block->warps[current->index / kWarp]; }

void run(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned alive, unsigned cluster,
         const std::function<void()>& body) {
  if (launched != nullptr) throw std::logic_error("a launch within a launch");
  if (blocks == 0 || threads == 0 || threads % kWarp != 0 || threads > kMostThreads) {
    throw std::invalid_argument("launch of " + std::to_string(blocks) + " blocks of " +
                                std::to_string(threads) + " threads");
  }
  const Unwatched unwatched;
  ++process.counts.launches;
  process.bodies.push_back(std::make_unique<std::function<void()>>(body));
  Launch(blocks, threads, shared_bytes, alive, cluster, *process.bodies.back()).run();
}

unsigned blocks_at_once(unsigned blocks, unsigned threads) {
  const unsigned known = kThreadSanitizer && threads > 0 ? kMostFibers / threads : blocks;
  return std::min(process.options.resident_blocks, known);
}

}  // namespace

void wait_at(Barrier& barrier, Place place) {
  Thread& self = *current;
  std::vector<Place>& places = self.block->places;
  if (barrier.arrived == 0) barrier.place = place;
  places[self.index] = place;
  if (place != barrier.place) throw std::runtime_error("divergent barrier in " + describe(*self.block));
  void* const token = &barrier.tokens[barrier.generation % 2];
  if (place != Place::exchange) release(token);
  if (++barrier.arrived == barrier.count) {
    barrier.arrived = 0;
    ++barrier.generation;
    if (place == Place::sync_block) ++process.counts.barriers;
    std::fill_n(places.begin() + barrier.first, barrier.count, Place::running);
  }
  self.fiber.leave();
  if (place != Place::exchange) acquire(token);
}

void set_options(const Options& chosen) {
  process.options = chosen;
  process.generator.seed(chosen.seed);
}

void set_faults(const Faults& planted) { process.faults = planted; }

Statistics statistics() { return process.counts; }

void synchronize() {
  if (!process.ends_later) return;
  if (std::exchange(process.awaits_early, false)) {
    throw std::runtime_error("a launch lets the next begin, which is none that begins early and waits");
  }
  const Unwatched unwatched;
  for (char& token : process.end_tokens) acquire(&token);
  forget_fibers();
  process.memory_of_ended.clear();
  process.bodies.clear();
  process.ends_later = false;
}

void launch_early(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  process.awaits_early = false;
  run(blocks, threads, shared_bytes, blocks_at_once(blocks, threads), 1, body);
}

void launch(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  synchronize();
  run(blocks, threads, shared_bytes, blocks_at_once(blocks, threads), 1, body);
}

void launch_clusters(unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes,
                     const std::function<void()>& body) {
  if (cluster < 1 || cluster > kMostOfCluster || blocks % cluster != 0) {
    throw std::invalid_argument("launch of " + std::to_string(blocks) + " blocks in clusters of " +
                                std::to_string(cluster));
  }
  synchronize();
  run(blocks, threads, shared_bytes, blocks_at_once(blocks, threads), cluster, body);
}

void launch_cooperative(unsigned blocks, unsigned threads, size_t shared_bytes,
                        const std::function<void()>& body) {
  if (blocks > process.options.device_blocks) {
    throw std::runtime_error("a cooperative launch of " + std::to_string(blocks) +
                             " blocks, of which the device holds " +
                             std::to_string(process.options.device_blocks));
  }
  synchronize();
  run(blocks, threads, shared_bytes, blocks, 1, body);
}

unsigned thread_index() { return current->index; }
unsigned thread_count() { return launched->threads; }
unsigned block_index() { return current->block->index; }
unsigned block_count() { return launched->blocks; }
std::byte* block_memory() { return current->block->memory.get(); }
ptrdiff_t store_displacement() { return process.faults.displace_stores; }
bool atomics_are_torn() { return process.faults.tear_atomics; }

void let_next_begin() {
  const Unwatched unwatched;
  launched->lets_next_begin = true;
}

void wait_for_previous() {
  const Unwatched unwatched;
  if (!process.faults.skip_previous) acquire(&process.end_tokens[(launched->number + 1) % 2]);
}

void sync_block() {
  const Unwatched unwatched;
  if (current->barriers++ == process.faults.skip_barrier) return;
  wait_at(current->block->barrier, Place::sync_block);
}

void sync_warp() {
  const Unwatched unwatched;
  wait_at(own_warp().barrier, Place::sync_warp);
}

uint64_t exchange(uint64_t value, unsigned source_lane) {
  const Unwatched unwatched;
  Warp& warp = own_warp();
  uint64_t* const values = warp.values[warp.barrier.generation % 2];
  values[current->index % kWarp] = value;
  wait_at(warp.barrier, Place::exchange);
  return values[source_lane % kWarp];
}

bool last_to_arrive(unsigned* counter, unsigned expected) {
  const Unwatched unwatched;
  Block& block = *current->block;
  wait_at(block.barrier, Place::arrival_begin);
  if (current->index == 0) {
    release(counter);
    const unsigned before = (*counter)++;
    if (before >= expected)
      throw std::runtime_error("more blocks arrive than expected in " + describe(block));
    const bool all = before + 1 == expected;
    if (all) {
      acquire(counter);
      *counter = 0;
    }
    block.last = process.faults.early_arrival ? before == 0 : all;
  }
  wait_at(block.barrier, Place::arrival_end);
  return block.last;
}

}  // namespace model
