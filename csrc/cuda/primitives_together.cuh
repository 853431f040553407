// What resident kernels use of the machine besides primitives.cuh: blocks that wait for each other, and
// copies to block memory that run beside the thread.
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
  if (threadIdx.x == 0 && atomicAdd(counter, 1u) + 1 == last) *counter = 0;
}

// Sixteen bytes to block memory; there when wait_for_copies() says so.
BNEXT_DEVICE void begin_copy(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const auto place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
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
using model::begin_copy;
using model::commit_copies;
using model::leave_group;
using model::wait_for_copies;

#endif

}  // namespace bnext::cuda
