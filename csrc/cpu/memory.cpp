// Free blocks by size, most recently used first.
#include "cpu/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace bnext::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostHotBytes = size_t{512} << 20;
// Blocks that are given back while one is kept and not asked for, some steps of a large network: from then on
// it makes room. No sooner, for a step that needs more than may be kept would push out what it asks for next.
constexpr uint64_t kForgotten = 1024;

size_t round_up(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

struct Block {
  void* data;
  bool hot;        // its pages were not offered to the system
  uint64_t since;  // how many had been given back
};

struct Freed {
  void* data;
  size_t size;
};

// Bytes that a file of the system limits this process's memory to; `otherwise` where it does not say.
size_t limit_in(const char* path, size_t otherwise) {
  unsigned long long bytes = 0;
  std::FILE* const file = std::fopen(path, "r");
  if (file == nullptr) return otherwise;
  const bool is_number = std::fscanf(file, "%llu", &bytes) == 1;  // else "max"
  std::fclose(file);
  return is_number ? std::min<size_t>(bytes, otherwise) : otherwise;
}

// Of the machine, or less where the process, or the container it is in, may have less.
size_t memory_bytes() {
  size_t bytes = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    bytes = std::min<size_t>(bytes, limit.rlim_cur);
  bytes = limit_in("/sys/fs/cgroup/memory.max", bytes);
  return limit_in("/sys/fs/cgroup/memory/memory.limit_in_bytes", bytes);
}

struct Cache {
  std::mutex mutex;
  std::map<size_t, std::vector<Block>> blocks;  // by rounded size
  size_t bytes = 0;
  size_t hot_bytes = 0;
  size_t limit = memory_bytes() / 4;
  uint64_t given_back = 0;  // blocks, ever

  Cache() {
    // A child of fork must not find the mutex held by a thread that it does not have.
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); },
                   [] { cache().mutex.unlock(); });
  }

  bool fits(size_t size) const { return bytes + size <= limit; }
  bool stays_hot(size_t size) const { return hot_bytes + size <= std::min(limit / 4, kMostHotBytes); }

  void forget(size_t size, const Block& block) {
    bytes -= size;
    if (block.hot) hot_bytes -= size;
  }

  // Takes out what nobody has asked for in a long time until another block fits, and stays hot.
  std::vector<Freed> make_room(size_t wanted) {
    std::vector<Freed> freed;
    while (!fits(wanted) || !stays_hot(wanted)) {
      auto oldest = blocks.end();
      for (auto it = blocks.begin(); it != blocks.end(); ++it) {
        if (it->second.empty()) continue;  // the first of a size is its oldest
        if (oldest == blocks.end() || it->second.front().since < oldest->second.front().since) oldest = it;
      }
      if (oldest == blocks.end() || given_back - oldest->second.front().since < kForgotten) break;
      const Block block = oldest->second.front();
      freed.push_back({block.data, oldest->first});
      oldest->second.erase(oldest->second.begin());
      forget(oldest->first, block);
    }
    return freed;
  }

  // Never destroyed: tensors may outlive every static object.
  static Cache& cache() {
    static Cache& instance = *new Cache;
    return instance;
  }
};

// Anonymous memory, huge pages wished for, `size` being whole ones. Mapped with room for alignment, which is
// given back.
void* map_block(size_t size) {
  const size_t bytes = size + kSpareBytes;
  void* raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, head = begin - address;
  if (head != 0) munmap(raw, head);
  if (head != kHugePage) munmap(reinterpret_cast<void*>(begin + bytes), kHugePage - head);
  madvise(reinterpret_cast<void*>(begin), bytes, MADV_HUGEPAGE);  // advice: failure changes nothing
  return reinterpret_cast<void*>(begin);
}

void unmap(void* data, size_t size) { munmap(data, size + kSpareBytes); }

}  // namespace

void* acquire_block(size_t bytes) noexcept {
  const size_t size = round_up(bytes);
  {
    Cache& cache = Cache::cache();
    const std::lock_guard lock(cache.mutex);
    const auto found = cache.blocks.find(size);
    if (found != cache.blocks.end() && !found->second.empty()) {
      const Block block = found->second.back();
      found->second.pop_back();
      cache.forget(size, block);
      return block.data;
    }
  }
  void* data = map_block(size);
  return data == nullptr && empty_cache() > 0 ? map_block(size) : data;
}

void release_block(void* data, size_t bytes) noexcept {
  const size_t size = round_up(bytes);
  Cache& cache = Cache::cache();
  bool hot = false;
  try {  // not under the lock: what takes a while
    std::vector<Freed> forgotten;
    {
      const std::lock_guard lock(cache.mutex);
      ++cache.given_back;
      forgotten = cache.make_room(size);
      hot = cache.stays_hot(size);
    }
    for (const Freed& block : forgotten) unmap(block.data, block.size);
  } catch (...) {  // no memory for the list
  }
  if (!hot) madvise(data, size + kSpareBytes, MADV_FREE);
  const std::lock_guard lock(cache.mutex);
  try {
    if (cache.fits(size)) {
      cache.blocks[size].push_back({data, hot, cache.given_back});
      cache.bytes += size;
      if (hot) cache.hot_bytes += size;
      return;
    }
  } catch (...) {  // no memory for the list
  }
  unmap(data, size);
}

size_t empty_cache() noexcept {
  Cache& cache = Cache::cache();
  const std::lock_guard lock(cache.mutex);
  const size_t freed = cache.bytes;
  for (auto& [size, blocks] : cache.blocks) {
    for (const Block& block : blocks) unmap(block.data, size);
  }
  cache.blocks.clear();
  cache.bytes = cache.hot_bytes = 0;
  return freed;
}

void set_cache_limit(size_t bytes) noexcept {
  Cache& cache = Cache::cache();
  {
    const std::lock_guard lock(cache.mutex);
    cache.limit = bytes;
    if (cache.bytes <= bytes) return;
  }
  empty_cache();
}

size_t cached_bytes() noexcept {
  Cache& cache = Cache::cache();
  const std::lock_guard lock(cache.mutex);
  return cache.bytes;
}

#else

void* acquire_block(size_t) noexcept { return nullptr; }
void release_block(void*, size_t) noexcept {}
size_t empty_cache() noexcept { return 0; }
size_t cached_bytes() noexcept { return 0; }
void set_cache_limit(size_t) noexcept {}

#endif

}  // namespace bnext::cpu
