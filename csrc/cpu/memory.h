// Memory of the operating system: huge pages for large new tensors.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bnext::cpu {

// A fresh large allocation faults once per 4 KiB page, which costs more than the normalization itself; 2 MiB
// pages take that away. Below this size the allocator mostly hands out memory that was touched before.
constexpr size_t kHugePageBytes = size_t{4} << 20;

inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePageBytes) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure changes nothing
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace bnext::cpu
