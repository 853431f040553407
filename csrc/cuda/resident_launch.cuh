// From a resident plan to its one launch, checked.
#pragma once

#include <initializer_list>

#include "cuda/launching.cuh"
#include "cuda/resident.cuh"

namespace bnext::cuda {

void resident_forward(const ForwardArgs& args, const Plan& plan, const Workspace& workspace);
void resident_backward(const BackwardArgs& args, const Plan& plan, const Workspace& workspace);

// The types that are kept.
template <class F>
auto dispatch_kept(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::bfloat16:
      return f.template operator()<bf16>();
    case Dtype::float16:
      return f.template operator()<f16>();
    default:
      return f.template operator()<float>();
  }
}

template <class Params>
struct ResidentParams {
  Params p;
  Resident resident;
};

// inputs: tensors that are kept. written: output 0 of the map. tensors: all others of the call, null where
// absent.
inline Resident resident_of(const Plan& plan, int lanes, int inputs, const void* written,
                            std::initializer_list<const void*> tensors, const Workspace& workspace) {
  bool same_phase = true;
  for (const void* data : tensors) {
    const uintptr_t distance = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(written);
    same_phase &= data == nullptr || distance % 16 == 0;
  }
  return {{plan.extent, plan.reduce, false, static_cast<Sums*>(workspace.scratch), workspace.counters},
          static_cast<unsigned>(plan.together),
          plan.depth,
          same_phase,
          same_phase && on_boundary(written) && whole_vectors(plan.reduce, lanes) &&
              plan.extent.numel() % lanes == 0,
          ResidentMemory(plan.reduce, lanes, inputs, plan.depth),
          plan.extent.numel(),
          static_cast<int>(reinterpret_cast<uintptr_t>(written) % 16 / (16 / static_cast<unsigned>(lanes)))};
}

#if defined(__CUDACC__)

constexpr int64_t kMemoryUnasked = 48 << 10;  // bytes of shared memory that every kernel may have

template <class Params>
void allow_memory(const char* name, void (*kernel)(Params), const Plan& plan) {
  const auto function = reinterpret_cast<const void*>(kernel);
  if (plan.block_memory > kMemoryUnasked) {
    require(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(plan.block_memory)));
  }
  require(name, cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
}

// Whether the current device holds the blocks that wait for each other, all at once.
template <class Params>
bool can_wait(const char* name, void (*kernel)(Params), const Plan& plan) {
  allow_memory(name, kernel, plan);
  int index = 0, multiprocessors = 0, blocks = 0;
  require(name, cudaGetDevice(&index));
  require(name, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  require(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel),
                                                              plan.reduce.threads,
                                                              static_cast<size_t>(plan.block_memory)));
  return int64_t{blocks} * multiprocessors >= plan.waiting_blocks;
}

template <class Params>
void launch_resident(const char* name, void (*kernel)(Params), const Plan& plan, void* stream,
                     Params params) {
  allow_memory(name, kernel, plan);
  void* arguments[] = {&params};
  const auto function = reinterpret_cast<const void*>(kernel);
  const dim3 grid(static_cast<unsigned>(plan.reduce_blocks())),
      block(static_cast<unsigned>(plan.reduce.threads));
  const auto memory = static_cast<size_t>(plan.block_memory);
  const auto on = static_cast<cudaStream_t>(stream);
  require(name, plan.waiting_blocks > 0
                    ? cudaLaunchCooperativeKernel(function, grid, block, arguments, memory, on)
                    : cudaLaunchKernel(function, grid, block, arguments, memory, on));
}

#else

template <class Params>
bool can_wait(const char*, void (*)(Params), const Plan&) {
  return true;
}

template <class Params>
void launch_resident(const char*, void (*kernel)(Params), const Plan& plan, void*, Params params) {
  const auto call = plan.waiting_blocks > 0 ? model::launch_cooperative : model::launch;
  call(static_cast<unsigned>(plan.reduce_blocks()), static_cast<unsigned>(plan.reduce.threads),
       static_cast<size_t>(plan.block_memory), [&] { kernel(params); });
}

#endif

}  // namespace bnext::cuda
