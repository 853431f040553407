// What threads ask of the execution model where blocks work together and copies run beside them.
#include <cstring>
#include <stdexcept>

#include "model.h"
#include "scheduler.h"

#if defined(MODEL_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace model {
namespace {

constexpr size_t kCopyBytes = 16;
constexpr int kPoison = 0xCD;

// Orders one generation: see Barrier.
void* token_of(unsigned* counter, unsigned generation) {
  return reinterpret_cast<char*>(counter) + generation % sizeof(unsigned);
}

void require_boundary(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % kCopyBytes != 0) throw std::runtime_error("misaligned copy");
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

void begin_copy(void* to, const void* from) {
  require_boundary(to);
  require_boundary(from);
  std::memset(to, kPoison, kCopyBytes);
#if defined(MODEL_ADDRESS_SANITIZER)
  __asan_poison_memory_region(to, kCopyBytes);
#endif
  const Unwatched unwatched;
  current->copies.back().push_back({static_cast<std::byte*>(to), static_cast<const std::byte*>(from)});
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
  for (const Copy& copy : due) {
#if defined(MODEL_ADDRESS_SANITIZER)
    __asan_unpoison_memory_region(copy.to, kCopyBytes);
#endif
    std::memcpy(copy.to, copy.from, kCopyBytes);
  }
}

}  // namespace model
