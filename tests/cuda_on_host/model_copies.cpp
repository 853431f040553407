// Copies that run beside the threads that began them: of the execution model.
#include <cstring>
#include <stdexcept>

#include "model.h"
#include "scheduler.h"

#if defined(MODEL_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace model {
namespace {

constexpr size_t kBoundary = 16;
constexpr int kPoison = 0xCD;

void require_boundary(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % kBoundary != 0) throw std::runtime_error("misaligned copy");
}

void begin(const Copy& copy) {
  require_boundary(copy.to);
  require_boundary(copy.from);
  std::memset(copy.to, kPoison, copy.bytes);
#if defined(MODEL_ADDRESS_SANITIZER)
  __asan_poison_memory_region(copy.to, copy.bytes);
#endif
}

void make(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
#if defined(MODEL_ADDRESS_SANITIZER)
    __asan_unpoison_memory_region(copy.to, copy.bytes);
#endif
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

// For ThreadSanitizer the word itself is written when it is prepared, and read ever after.
Arrivals& arrivals_at(const uint64_t* barrier) {
  const volatile uint64_t* const word = barrier;
  static_cast<void>(*word);
  const Unwatched unwatched;
  const auto found = current->block->arrivals.find(barrier);
  if (found == current->block->arrivals.end()) throw std::runtime_error("a barrier that nobody prepared");
  return found->second;
}

}  // namespace

void begin_copy(void* to, const void* from) {
  const Copy copy{static_cast<std::byte*>(to), static_cast<const std::byte*>(from), kBoundary};
  begin(copy);
  const Unwatched unwatched;
  current->copies.back().push_back(copy);
}

void commit_copies() {
  const Unwatched unwatched;
  current->copies.emplace_back();
}

void wait_for_copies(unsigned pending) {
  std::vector<Copy> due;
  {
    const Unwatched unwatched;
    if (process.faults.skip_async_wait) return;
    auto& batches = current->copies;
    while (batches.size() > pending + 1) {
      due.insert(due.end(), batches.front().begin(), batches.front().end());
      batches.pop_front();
    }
  }
  make(due);
}

void prepare_barrier(uint64_t* barrier) {
  *barrier = 0;
  const Unwatched unwatched;
  if (!current->block->arrivals.try_emplace(barrier).second)
    throw std::runtime_error("a barrier that is prepared twice");
}

void expect_bytes(uint64_t* barrier, unsigned bytes) {
  Arrivals& arrivals = arrivals_at(barrier);
  const Unwatched unwatched;
  if (arrivals.expects) throw std::runtime_error("a barrier expects bytes twice");
  release(&arrivals.tokens[arrivals.generation % 2]);
  arrivals.expects = true;
  arrivals.expected = bytes;
}

void begin_bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  Arrivals& arrivals = arrivals_at(barrier);
  if (bytes % kBoundary != 0) throw std::runtime_error("a bulk copy of part of 16 bytes");
  const Copy copy{static_cast<std::byte*>(to), static_cast<const std::byte*>(from), bytes};
  begin(copy);
  const Unwatched unwatched;
  release(&arrivals.tokens[arrivals.generation % 2]);
  arrivals.begun += bytes;
  arrivals.copies.push_back(copy);
  if (arrivals.expects && arrivals.begun > arrivals.expected)
    throw std::runtime_error("more bytes than a barrier expects");
}

void wait_for_bytes(uint64_t* barrier, unsigned generation) {
  Arrivals& arrivals = arrivals_at(barrier);
  void* const token = &arrivals.tokens[generation % 2];
  std::vector<Copy> due;
  {
    const Unwatched unwatched;
    if (process.faults.skip_async_wait) return;
    Thread& self = *current;
    Place& place = self.block->places[self.index];
    self.arrivals = &arrivals;
    self.target = generation;
    place = Place::bytes;
    if (!self.can_run()) self.fiber.leave();
    place = Place::running;
    acquire(token);
    if (arrivals.has_passed(generation)) return;
    due.swap(arrivals.copies);
    arrivals.expects = false;
    arrivals.begun = arrivals.expected = 0;
    ++arrivals.generation;
  }
  make(due);
  release(token);
}

}  // namespace model
