// Runs one scenario of the execution model, named by argv[1]; exits with 0 if the model behaved, with 1 and a
// line on stderr if not. Without an argument it lists the names.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "scenarios.h"

namespace {

using namespace model;
using namespace scenarios;
using Order = Options::Order;

template <class Run>
void in_all_orders(Run run) {
  for (const Order order : {Order::ascending, Order::descending, Order::random}) {
    for (const unsigned resident : {1u, 3u, 100u}) {
      set_options({order, 7, resident});
      run();
    }
  }
}

constexpr unsigned kSum = kThreads * (kThreads - 1) / 2;

void require_sums(unsigned blocks) {
  const std::vector<unsigned> sums = sums_over_blocks(blocks);
  for (unsigned k = 0; k < sums.size(); ++k) require(sums[k] == kSum + k / kThreads, "sum");
}

void block_sum() {
  in_all_orders([] { require_sums(kBlocks); });
}

// More fibers, one after the other, than ThreadSanitizer knows at a time.
void many_blocks() {
  const Statistics before = statistics();
  require_sums(130);
  require_sums(3);
  const Statistics after = statistics();
  require(after.launches - before.launches == 2 && after.blocks - before.blocks == 133,
          "launches and blocks");
  require(after.barriers - before.barriers == 133 * 7, "barriers");
}

void fresh_memory() {
  constexpr size_t kBytes = 1000;
  in_all_orders([] {
    launch(kBlocks, 32, kBytes, [] {
      std::byte* const memory = block_memory();
      require(reinterpret_cast<uintptr_t>(memory) % 128 == 0, "alignment");
      for (size_t k = 0; k < kBytes; ++k) require(memory[k] == std::byte{0xCD}, "poison");
      sync_block();
      if (thread_index() == 0) std::memset(memory, 0, kBytes);
    });
  });
}

[[gnu::noinline]] void count_up(unsigned* values, unsigned count) {
  for (unsigned k = 0; k < count; ++k) values[k] = thread_index() + k;
}

// On stacks that other threads have used before.
void local_arrays() {
  in_all_orders([] {
    launch(kBlocks, kThreads, 0, [] {
      unsigned values[1000];
      count_up(values, 1000);
      sync_block();
      for (unsigned k = 0; k < 1000; ++k) require(values[k] == thread_index() + k, "array");
    });
  });
}

void warp_exchange() {
  in_all_orders([] {
    launch(kBlocks, kThreads, kThreads * sizeof(uint64_t), [] {
      const unsigned t = thread_index(), lane = t % 32;
      uint64_t sum = t;
      for (unsigned mask = 16; mask > 0; mask /= 2) sum += exchange(sum, lane ^ mask);
      require(sum == 32 * (t - lane) + 496, "sum over the warp");
      require(exchange(t, 5) == t - lane + 5, "broadcast");
      // Warps go on independently of one another.
      for (unsigned step = 0; step < 1 + t / 32; ++step) {
        shared<uint64_t>()[t] = step + lane;
        sync_warp();
        require(shared<uint64_t>()[t ^ 1] == step + (lane ^ 1), "through memory");
        sync_warp();
      }
    });
  });
}

// What kernels do: partial results, then the block that comes last adds them up.
void sum_over_grid(std::vector<unsigned>& partial, unsigned& counter) {
  unsigned times = 0;
  launch(kBlocks, kThreads, 0, [&] {
    partial[block_index() * kThreads + thread_index()] = block_index() + thread_index();
    if (!last_to_arrive(&counter, kBlocks)) return;
    unsigned sum = 0;
    for (unsigned k = 0; k < kBlocks; ++k) sum += partial[k * kThreads + (thread_index() + 1) % kThreads];
    require(sum == kBlocks * ((thread_index() + 1) % kThreads) + kBlocks * (kBlocks - 1) / 2,
            "partial results");
    if (thread_index() == 0) ++times;
  });
  require(times == 1, "last exactly once");
}

// Words that all threads of all blocks have a bit in.
void shared_bits() {
  in_all_orders([] {
    std::vector<uint32_t> words(kBlocks * kThreads / 32);
    launch(kBlocks, kThreads, 0, [&] {
      const unsigned bit = thread_index() * kBlocks + block_index();
      set_bits(&words[bit / 32], 1u << bit % 32);
    });
    for (const uint32_t word : words) require(word == 0xffffffffu, "bits");
  });
}

void last_arrival() {
  in_all_orders([] {
    std::vector<unsigned> partial(kBlocks * kThreads);
    unsigned counter = 0;
    for (int again = 0; again < 2; ++again) {
      std::fill(partial.begin(), partial.end(), 0u);
      sum_over_grid(partial, counter);
      require(counter == 0, "counter");
    }
    counter = kBlocks;
    bool thrown = false;
    try {
      sum_over_grid(partial, counter);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    require(thrown, "a counter that did not begin with zero");
  });
}

// The launch must fail with this in its message, and the model work after it.
template <class Body>
void must_fail(const char* phrase, Body body) {
  in_all_orders([&] {
    std::vector<unsigned> written(kBlocks * kThreads);  // by threads that never end
    std::string message;
    try {
      launch(kBlocks, kThreads, kThreads * sizeof(unsigned), [&] {
        written[block_index() * kThreads + thread_index()] = 1;
        body();
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    if (message.find(phrase) == std::string::npos) throw std::runtime_error("message: '" + message + "'");
    std::fill(written.begin(), written.end(), 2u);
    require_sums(kBlocks);
  });
}

void deadlock() {
  must_fail("deadlock in block", [] {
    sync_block();
    if (thread_index() != 3) sync_block();
  });
  must_fail("of 64 threads 1 have ended, 63 wait in sync_block", [] {
    if (thread_index() != 3) sync_block();
  });
  must_fail("16 have ended, 32 wait in sync_block, 16 wait in sync_warp", [] {
    if (thread_index() < 48) sync_warp();
    if (thread_index() < 32) sync_warp();
    if (thread_index() < 32) sync_block();
  });
}

void divergence() {
  must_fail("divergent barrier", [] {
    unsigned counter = 0;
    if (thread_index() % 2 == 0) {
      sync_block();
    } else {
      last_to_arrive(&counter, 1);
    }
  });
  must_fail("divergent barrier", [] {
    if (thread_index() % 2 == 0) {
      sync_warp();
    } else {
      exchange(1, 0);
    }
  });
}

void livelock() {
  set_options({});
  std::string message;
  try {
    launch(1, 32, 0, [] {
      while (block_index() == 0) sync_block();
    });
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  require(message.find("livelock in block 0") != std::string::npos, "message");
  require_sums(kBlocks);
}

void failing_thread() {
  must_fail("misaligned", [] {
    sync_block();
    if (block_index() == 1 && thread_index() == 40) throw std::runtime_error("misaligned");
    sync_block();
  });
}

const Scenarios kScenarios = {
    {"block_sum", block_sum},           {"many_blocks", many_blocks},
    {"fresh_memory", fresh_memory},     {"local_arrays", local_arrays},
    {"warp_exchange", warp_exchange},   {"shared_bits", shared_bits},
    {"last_arrival", last_arrival},     {"deadlock", deadlock},
    {"divergence", divergence},         {"livelock", livelock},
    {"failing_thread", failing_thread},
};

}  // namespace

int main(int count, char** arguments) {
  Scenarios all = kPlanted;
  for (const Scenarios& more : {kScenarios, kTogether, kCopies}) all.insert(more.begin(), more.end());
  if (count != 2) {
    for (const auto& [name, run] : all) std::puts(name.c_str());
    return 0;
  }
  try {
    all.at(arguments[1])();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
