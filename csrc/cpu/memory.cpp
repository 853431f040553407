// Free blocks by size, most recently used first.
#include "cpu/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

namespace bnext::cpu {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostHotBytes = size_t{512} << 20;
// Blocks that are given back while one is kept and not asked for, some steps of a large network: from then on
// it makes room. No sooner, for a step that needs more than may be kept would push out what it asks for next.
constexpr uint64_t kForgotten = 1024;
constexpr int kMostFreed = 64;  // of those at a time

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
  size_t hot_limit() const { return std::min(limit / 4, kMostHotBytes); }
  bool stays_hot(size_t size) const { return hot_bytes + size <= hot_limit(); }

  void forget(size_t size, const Block& block) {
    bytes -= size;
    if (block.hot) hot_bytes -= size;
  }

  // Takes out what nobody has asked for in a long time, as much of it as another block needs to fit, and of
  // hot ones to stay hot: so many, whose pages are still to be given back.
  int make_room(size_t wanted, Freed (&freed)[kMostFreed]) {
    int count = 0;
    while (wanted <= limit && !fits(wanted) && take_oldest(false, freed, count)) {
    }
    while (wanted <= hot_limit() && !stays_hot(wanted) && take_oldest(true, freed, count)) {
    }
    return count;
  }

  bool take_oldest(bool hot_alone, Freed (&freed)[kMostFreed], int& count) {
    std::vector<Block>* from = nullptr;
    size_t size = 0, at = 0;
    for (auto& [of, list] : blocks) {
      size_t k = 0;  // the first of a size is its oldest
      while (k < list.size() && hot_alone && !list[k].hot) ++k;
      if (k == list.size() || (from != nullptr && list[k].since >= (*from)[at].since)) continue;
      from = &list;
      size = of;
      at = k;
    }
    if (count == kMostFreed || from == nullptr || given_back - (*from)[at].since < kForgotten) return false;
    const Block block = (*from)[at];
    from->erase(from->begin() + static_cast<std::ptrdiff_t>(at));
    forget(size, block);
    freed[count++] = {block.data, size};
    return true;
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
  bool hot;
  Freed forgotten[kMostFreed];
  int count;
  {
    const std::lock_guard lock(cache.mutex);
    ++cache.given_back;
    count = cache.make_room(size, forgotten);
    hot = cache.stays_hot(size);
  }
  // Not under the lock: what takes a while.
  for (int k = 0; k < count; ++k) unmap(forgotten[k].data, forgotten[k].size);
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

}  // namespace bnext::cpu
