// What resident kernels use of the machine besides primitives.cuh: blocks that wait for each other, and
// copies to block memory that run beside the thread. Clusters and copies of more than sixteen bytes are of
// compute capability 9.0 and up: nobody asks others for them.
#pragma once

#include "cuda/primitives.cuh"

namespace bnext::cuda {

#if defined(__CUDACC__)

// Called by all threads of `target` blocks that run at the same time: each counts up by one and waits for the
// others, whose writes it sees by load16_fresh. The counter goes on counting: for the next time the target is
// as many more.
BNEXT_DEVICE void arrive_and_wait(unsigned* counter, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    while (true) {
      unsigned seen;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      if (seen >= target) break;
      __nanosleep(32);
    }
  }
  __syncthreads();
}

// Counts up once more without waiting; the last block leaves the counter zero.
BNEXT_DEVICE void leave_group(unsigned* counter, unsigned last) {
  if (threadIdx.x == 0) count_to(counter, last);
}

#if __CUDA_ARCH__ >= 900
#define BNEXT_FROM_90(...) __VA_ARGS__
#else
#define BNEXT_FROM_90(...) __trap()
#endif

// All threads of a cluster arrive, then wait: what any did before it arrived, in the memory of its block too,
// is seen by all that have waited.
BNEXT_DEVICE void arrive_at_cluster() {
  BNEXT_FROM_90(asm volatile("barrier.cluster.arrive.release;" :: : "memory"));
}
BNEXT_DEVICE void wait_for_cluster() {
  BNEXT_FROM_90(asm volatile("barrier.cluster.wait.acquire;" :: : "memory"));
}

BNEXT_DEVICE unsigned shared_place(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// What the cluster's block `rank` has where this block has `own`.
BNEXT_DEVICE Vector16 load16_in_cluster([[maybe_unused]] const void* own, [[maybe_unused]] unsigned rank) {
  Vector16 v{};
  BNEXT_FROM_90(unsigned there;
                asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_place(own)), "r"(rank));
                asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]),
                             "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "r"(there) : "memory"));
  return v;
}

// A barrier for copies is a word of block memory. One thread prepares it, before a sync_block(); then each
// generation has expect_bytes() once and copies of as many bytes together, in any order. Generation k passes
// when all are there, and whoever has waited for it sees them. (PTX ISA, mbarrier and cp.async.bulk.)
BNEXT_DEVICE void prepare_barrier([[maybe_unused]] uint64_t* barrier) {
  BNEXT_FROM_90(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_place(barrier)) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

BNEXT_DEVICE void expect_bytes([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] unsigned bytes) {
  BNEXT_FROM_90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_place(barrier)),
                   "r"(bytes) : "memory"));
}

// bytes: a multiple of 16, as are both places.
BNEXT_DEVICE void begin_bulk_copy([[maybe_unused]] void* to, [[maybe_unused]] const void* from,
                                  [[maybe_unused]] unsigned bytes, [[maybe_unused]] uint64_t* barrier) {
  BNEXT_FROM_90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_place(to)),
      "l"(from), "r"(bytes), "r"(shared_place(barrier)) : "memory"));
}

BNEXT_DEVICE void wait_for_bytes([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] unsigned generation) {
  BNEXT_FROM_90(unsigned passed; do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(passed)
        : "r"(shared_place(barrier)), "r"(generation % 2)
        : "memory");
  } while (passed == 0));
}

// Of the calling thread: what it accessed in block memory, before copies that begin after a sync_block().
BNEXT_DEVICE void yield_to_bulk_copies() {
  BNEXT_FROM_90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// Sixteen bytes to block memory; there when wait_for_copies() says so.
BNEXT_DEVICE void begin_copy(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_place(to)), "l"(from) : "memory");
#else
  *static_cast<Vector16*>(to) = load16<Reuse::no>(from);
#endif
}

// What was begun since the last time becomes a batch.
BNEXT_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all of the calling thread's batches but the latest `pending` are there, for that thread. The
// instruction has the number in it: more than seven count as seven.
BNEXT_DEVICE void wait_for_copies([[maybe_unused]] int pending) {
#if __CUDA_ARCH__ >= 800
  switch (pending) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    case 4:
      asm volatile("cp.async.wait_group 4;" ::: "memory");
      break;
    case 5:
      asm volatile("cp.async.wait_group 5;" ::: "memory");
      break;
    case 6:
      asm volatile("cp.async.wait_group 6;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 7;" ::: "memory");
  }
#endif
}

#else

using model::arrive_and_wait;
using model::arrive_at_cluster;
using model::begin_bulk_copy;
using model::begin_copy;
using model::commit_copies;
using model::expect_bytes;
using model::leave_group;
using model::prepare_barrier;
using model::wait_for_bytes;
using model::wait_for_cluster;
using model::wait_for_copies;

inline Vector16 load16_in_cluster(const void* own, unsigned rank) {
  return aligned_at<Vector16>(model::place_in_cluster(own, rank));
}
inline void yield_to_bulk_copies() {}

#endif

}  // namespace bnext::cuda
