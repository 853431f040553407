// Scenarios of the execution model's test that a sanitizer must report.
#include <cstddef>
#include <vector>

#include "model.h"
#include "scenarios.h"

namespace scenarios {
namespace {

using namespace model;
using Order = Options::Order;

// ---- faults for ThreadSanitizer ----

// A neighbour's value, with nothing or too little in between.
template <class Between>
void read_neighbour(unsigned distance, Between between) {
  launch(kBlocks, kThreads, kThreads * sizeof(unsigned), [&] {
    const unsigned t = thread_index();
    shared<unsigned>()[t] = t;
    between();
    const unsigned read = shared<unsigned>()[t ^ distance];
    sync_block();
    shared<unsigned>()[t] = read;
  });
}

void race_missing_barrier() {
  read_neighbour(1, [] {});
}
void race_warp_barrier_between_warps() {
  read_neighbour(32, [] { sync_warp(); });
}
void race_exchange_orders_nothing() {
  read_neighbour(1, [] { exchange(0, 0); });
}

// The second of two barriers is missing: what is read before it may be overwritten.
void race_one_generation_late() {
  launch(1, kThreads, kThreads * sizeof(unsigned), [] {
    const unsigned t = thread_index();
    shared<unsigned>()[t] = t;
    sync_block();
    const unsigned read = shared<unsigned>()[t ^ 1];
    shared<unsigned>()[t] = read;
    sync_block();
  });
}

void race_skipped_barrier() {
  Faults faults;
  faults.skip_barrier = 3;
  set_faults(faults);
  launch(kBlocks, kThreads, kThreads * sizeof(unsigned), [] { sum_block(thread_index()); });
}

void race_early_arrival() {
  Faults faults;
  faults.early_arrival = true;
  set_faults(faults);
  unsigned counter = 0, sum = 0;
  std::vector<unsigned> partial(kBlocks);
  launch(kBlocks, kThreads, 0, [&] {
    if (thread_index() == 0) partial[block_index()] = 1;
    if (!last_to_arrive(&counter, kBlocks) || thread_index() != 9) return;
    for (const unsigned value : partial) sum += value;
  });
}

// The blocks never run side by side.
void race_between_blocks() {
  set_options({Order::ascending, 0, 1});
  unsigned place = 0;
  sums_over_blocks(kBlocks);  // fibers have been there before
  launch(2, kThreads, 0, [&] {
    sync_block();
    if (thread_index() == 40 - block_index()) place = block_index();
    sync_block();
  });
}

// An atomic access orders nothing, and does not help against one that is none.
void race_bits_read_too_early() {
  uint32_t word = 0, read = 0;
  launch(1, kThreads, 0, [&] {
    if (thread_index() < 32) set_bits(&word, 1u << thread_index());
    if (thread_index() == 40) read = word;
  });
}

// ---- faults for AddressSanitizer ----

void overrun_block_memory() {
  launch(2, 32, 100, [] { block_memory()[69 + thread_index()] = std::byte{1}; });
}

void overrun_displaced_store() {
  Faults faults;
  faults.displace_stores = sizeof(float);
  set_faults(faults);
  std::vector<float> out(kThreads);
  launch(1, kThreads, 0, [&] { *displaced(&out[thread_index()]) = 1; });
}

}  // namespace

const Scenarios kPlanted = {
    {"race_missing_barrier", race_missing_barrier},
    {"race_warp_barrier_between_warps", race_warp_barrier_between_warps},
    {"race_exchange_orders_nothing", race_exchange_orders_nothing},
    {"race_one_generation_late", race_one_generation_late},
    {"race_skipped_barrier", race_skipped_barrier},
    {"race_early_arrival", race_early_arrival},
    {"race_between_blocks", race_between_blocks},
    {"race_bits_read_too_early", race_bits_read_too_early},
    {"overrun_block_memory", overrun_block_memory},
    {"overrun_displaced_store", overrun_displaced_store},
};

}  // namespace scenarios
