// What threads ask of the execution model where blocks work together.
#include <stdexcept>

#include "model.h"
#include "scheduler.h"

namespace model {
namespace {

// Orders one generation: see Barrier.
void* token_of(unsigned* counter, unsigned generation) {
  return reinterpret_cast<char*>(counter) + generation % sizeof(unsigned);
}

Cluster& own_cluster() {
  Cluster* const cluster = current->block->cluster.get();
  if (cluster == nullptr) throw std::runtime_error("a block without a cluster");
  return *cluster;
}

}  // namespace

void arrive_and_wait(unsigned* counter, unsigned target) {
  const Unwatched unwatched;
  Thread& self = *current;
  Block& block = *self.block;
  wait_at(block.barrier, Place::group_begin);
  if (self.index == 0) {
    void* const token = token_of(counter, block.met++);
    release(token);
    if (*counter >= target)
      throw std::runtime_error("more blocks arrive than expected in " + describe(block));
    ++*counter;
    if (!process.faults.skip_group_barrier) {
      self.waits_for = counter;
      self.target = target;
      block.places[0] = Place::group;
      self.fiber.leave();
      block.places[0] = Place::running;
      acquire(token);
    }
  }
  wait_at(block.barrier, Place::group_end);
}

void leave_group(unsigned* counter, unsigned last) {
  const Unwatched unwatched;
  if (current->index == 0 && ++*counter == last) *counter = 0;
}

void arrive_at_cluster() {
  const Unwatched unwatched;
  Cluster& cluster = own_cluster();
  if (current->met != cluster.generation) throw std::runtime_error("a thread arrives twice without waiting");
  release(&cluster.tokens[current->met++ % 2]);
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    ++cluster.generation;
  }
}

void wait_for_cluster() {
  const Unwatched unwatched;
  Cluster& cluster = own_cluster();
  Thread& self = *current;
  Place& place = self.block->places[self.index];
  place = Place::cluster;
  if (!self.can_run()) self.fiber.leave();
  place = Place::running;
  if (self.cluster_waits++ != process.faults.unordered_wait) acquire(&cluster.tokens[(self.met + 1) % 2]);
}

const void* place_in_cluster(const void* own, unsigned rank) {
  const Unwatched unwatched;
  const Block& block = *current->block;
  const ptrdiff_t offset = static_cast<const std::byte*>(own) - block.memory.get();
  if (offset < 0 || static_cast<size_t>(offset) >= block.memory_bytes)
    throw std::runtime_error("no place of the block's memory");
  const Cluster& cluster = own_cluster();
  if (rank >= cluster.blocks.size()) throw std::runtime_error("no such block of the cluster");
  if (cluster.blocks[rank] == nullptr) throw std::runtime_error("memory of a block that has ended");
  return cluster.blocks[rank]->memory.get() + offset;
}

}  // namespace model
