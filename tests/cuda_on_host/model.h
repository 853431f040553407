// An execution model of a CUDA launch on the CPU: one fiber per CUDA thread, all in one OS thread, so that
// the kernels' own sources run in tests, under AddressSanitizer and under ThreadSanitizer.
//
// A thread runs until it waits for others; a few blocks are under way at once. ThreadSanitizer reports
// accesses of two threads to one place that no barrier and no arrival orders, whatever order they happened to
// run in. What it costs grows with the threads that are alive and with those of a launch, and newer ones (of
// GCC 13, clang 14) tell some 250 apart at a time: look for races with small blocks, resident_blocks times
// threads below that. What this cannot show: fences and caches of a real device, warps in lockstep, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace model {

// ---- the launching side ----

struct Options {
  enum class Order {
    ascending,
    descending,
    random
  } order = Order::ascending;    // of blocks, threads in a block
  uint64_t seed = 0;             // of the random order, which goes on from launch to launch
  unsigned resident_blocks = 4;  // alive at once; the others start as these end, as in any ordinary launch
  unsigned device_blocks = 64;   // that the device holds at once, all of a cooperative launch among them
};

// Planted faults, for tests of the model and of the tests of kernels: something must catch each.
struct Faults {
  int skip_barrier = -1;  // each thread passes its k-th sync_block(), from 0, neither waiting nor ordering
  bool early_arrival = false;       // last_to_arrive() says true to the first block instead of the last
  ptrdiff_t displace_stores = 0;    // bytes that displaced() adds
  bool tear_atomics = false;        // set_bits() reads, and then writes
  bool skip_group_barrier = false;  // arrive_and_wait() waits for nobody
  bool skip_async_wait = false;     // wait_for_copies() and wait_for_bytes() return with copies under way
  bool skip_previous = false;       // wait_for_previous() orders nothing
  int unordered_wait = -1;          // the k-th wait_for_cluster() of each thread, from 0, orders nothing
};

void set_options(const Options& options);
void set_faults(const Faults& faults);

// Runs body once for every thread of every block; threads is a multiple of the 32 of a warp.
// Throws what body throws, and std::runtime_error where threads of a block wait for what the others never do,
// where they wait in different functions for one another, and where a block goes on and on (a thread that
// spins and never waits is not noticed). After an exception the next launch starts afresh; threads that were
// under way are left as they are, without running destructors.
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

// It may begin while the launch before it runs, if threads of that said let_next_begin(): for ThreadSanitizer
// its threads are ordered after those of the other only by wait_for_previous(). The host is ordered after
// both by the next launch of another kind, or by synchronize(): std::runtime_error where the last launch has
// let the next begin, which on a device may be anybody's.
void launch_early(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);
void synchronize();

// All blocks are alive at once; std::runtime_error where the device does not hold as many.
void launch_cooperative(unsigned blocks, unsigned threads, size_t shared_bytes,
                        const std::function<void()>& body);

// Each `cluster` blocks that follow one another start together, and see each other's memory; the memory of a
// block goes when the block ends.
void launch_clusters(unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes,
                     const std::function<void()>& body);

// Since the start of the process.
struct Statistics {
  uint64_t launches, blocks;
  uint64_t
      barriers;  // a block that passes sync_block() counts as one; those in last_to_arrive() do not count
};
Statistics statistics();

// ---- inside body ----

unsigned thread_index();  // in the block
unsigned thread_count();  // of a block
unsigned block_index();
unsigned block_count();

// The block's own, on a boundary of 128 bytes, exactly shared_bytes long, 0xCD everywhere when the block
// starts.
std::byte* block_memory();

// See launch_early().
void let_next_begin();
void wait_for_previous();

// All threads of the block call it; what any did before is visible to all after.
void sync_block();

// The same for the 32 threads of a warp.
void sync_warp();

// All lanes of the warp give a value, each gets source_lane's. As on a device this orders no access to
// memory.
uint64_t exchange(uint64_t value, unsigned source_lane);

// All threads of a block call it, and they wait for each other before and after. Each block counts *counter
// up by one; the one that makes it `expected` gets true in all threads, sees what the others wrote before,
// and leaves 0 behind.
bool last_to_arrive(unsigned* counter, unsigned expected);

// All threads of a block call it. Each block counts *counter up by one, then waits until it is `target`; what
// blocks did before they counted is visible after. Only blocks that are alive at once can wait for each
// other.
void arrive_and_wait(unsigned* counter, unsigned target);

// The same without waiting, and without ordering anything: the block that makes it `last` leaves 0 behind.
void leave_group(unsigned* counter, unsigned last);

// All threads of a cluster call both, one after the other: what any did before it arrived is visible to all
// that have waited.
void arrive_at_cluster();
void wait_for_cluster();

// Where a place of the calling block's memory is in that of the cluster's block `rank`, which must not have
// ended.
const void* place_in_cluster(const void* own, unsigned rank);

// Begins a copy of 16 bytes, which happens as late as it may: when the thread waits for it. Until then the
// destination, block memory, holds poison, and AddressSanitizer reports whoever reads it.
void begin_copy(void* to, const void* from);

// The copies begun since the last call are a batch.
void commit_copies();

// Until all batches but the latest `pending` are there; the calling thread sees them. A thread must not end
// with copies under way.
void wait_for_copies(unsigned pending);

// A barrier for copies of any number of bytes is a word of block memory that one thread prepares, others see
// after a sync_block(). Each of its generations has expect_bytes() once, and copies of as many bytes, which
// happen as late as they may: when a thread waits for the generation. Threads that have waited see them. A
// block must not end with copies under way.
void prepare_barrier(uint64_t* barrier);
void expect_bytes(uint64_t* barrier, unsigned bytes);
void begin_bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier);
void wait_for_bytes(uint64_t* barrier, unsigned generation);  // by its parity, as on a device

// Bytes of Faults::displace_stores.
ptrdiff_t store_displacement();

// Faults::tear_atomics.
bool atomics_are_torn();

// An atomic access, and it orders nothing else. Here, where a sanitizer sees it.
inline void set_bits(uint32_t* word, uint32_t bits) {
  if (atomics_are_torn()) {
    *word = *word | bits;
  } else {
    __atomic_fetch_or(word, bits, __ATOMIC_RELAXED);
  }
}

// Where a store to p goes.
template <class T>
T* displaced(T* p) {
  return reinterpret_cast<T*>(reinterpret_cast<std::byte*>(p) + store_displacement());
}

}  // namespace model
