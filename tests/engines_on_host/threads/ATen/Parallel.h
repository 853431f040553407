// What the CPU engine has of torch, for programs without it: ranges of a loop, each on a thread of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

// Threads of every loop; overlap: by so many indices a range also does the work of the one behind it, a
// fault.
struct Loops {
  int threads = 1;
  int64_t overlap = 0;
};
inline Loops loops;

// f(range's begin, its end), as at::parallel_for cuts [begin, end): evenly, no range shorter than `grain`.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t most =
      std::min<int64_t>(loops.threads, (end - begin + grain - 1) / std::max<int64_t>(1, grain));
  const int64_t length = most > 0 ? (end - begin + most - 1) / most : 0;
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += length)
    threads.emplace_back(f, from, std::min(from + length + loops.overlap, end));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
