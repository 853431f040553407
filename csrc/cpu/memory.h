// Memory for large new tensors: huge pages, and kept for the next tensor of the size.
//
// Memory fresh from the system faults at every first touch and is zeroed there, which costs as much as
// normalizing it. A training step asks for the same sizes again and again, so freed blocks are kept: a
// quarter of what may be kept, at most 512 MB, as they are, the others so that the system may take their
// pages back while they are unused (MADV_FREE). That costs nobody anything under memory pressure, but 10
// microseconds a megabyte each time, two thirds of what normalizing it takes. Where no more may be kept,
// blocks that nobody has asked for in a long time make room.
#pragma once

#include <cstddef>

namespace bnext::cpu {

// Below this size the C library's allocator mostly hands out memory that was touched before.
constexpr size_t kLargeBytes = size_t{2} << 20;

// Bytes that a block has beyond those asked for: a page of any system, of which only what is used takes
// memory.
constexpr size_t kSpareBytes = size_t{64} << 10;

// A block of at least `bytes`, and the spare ones, aligned to a huge page; null where the system has none.
// Thread-safe, as all here.
void* acquire_block(size_t bytes) noexcept;

// Gives back what acquire_block returned for the same number of bytes.
void release_block(void* data, size_t bytes) noexcept;

// Unmaps every block that is kept. Returns their bytes.
size_t empty_cache() noexcept;

// Bytes of blocks that are kept for reuse.
size_t cached_bytes() noexcept;

// From now on at most that many bytes are kept; at first a quarter of the memory that the process may have.
void set_cache_limit(size_t bytes) noexcept;

}  // namespace bnext::cpu
