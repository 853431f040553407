// Scenarios of the execution model's test, and the small kernels that they have in common.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"

namespace scenarios {

using Scenarios = std::map<std::string, void (*)()>;

// Those with a fault that a sanitizer must report: race_... ThreadSanitizer, overrun_... AddressSanitizer.
extern const Scenarios kPlanted;

// Blocks that wait for each other, and copies that run beside threads; poison_... AddressSanitizer.
extern const Scenarios kTogether, kCopies;

constexpr unsigned kThreads = 64, kBlocks = 7;

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

template <class Launch>
std::string message_of(Launch launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

template <class T>
T* shared() {
  return reinterpret_cast<T*>(model::block_memory());
}

// The sum over the block in all threads, by way of block memory: 7 barriers for 64 threads.
inline unsigned sum_block(unsigned value) {
  unsigned* const memory = shared<unsigned>();
  const unsigned t = model::thread_index();
  memory[t] = value;
  model::sync_block();
  for (unsigned half = model::thread_count() / 2; half > 0; half /= 2) {
    if (t < half) memory[t] += memory[t + half];
    model::sync_block();
  }
  return memory[0];
}

// One per thread.
inline std::vector<unsigned> sums_over_blocks(unsigned blocks) {
  std::vector<unsigned> sums(blocks * kThreads, 0);
  model::launch(blocks, kThreads, kThreads * sizeof(unsigned), [&] {
    sums[model::block_index() * kThreads + model::thread_index()] =
        model::block_index() + sum_block(model::thread_index());
  });
  return sums;
}

}  // namespace scenarios
