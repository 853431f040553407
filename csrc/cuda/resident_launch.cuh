// From a resident plan to its one launch, checked.
#pragma once

#include <initializer_list>

#include "cuda/launching.cuh"
#include "cuda/resident.cuh"

namespace bnext::cuda {

void resident_forward(const ForwardArgs& args, const Plan& plan, const Workspace& workspace);
void resident_backward(const BackwardArgs& args, const Plan& plan, const Workspace& workspace);

// dispatch() over the types that the resident engine takes: all but float64.
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
  const bool whole = same_phase && on_boundary(written) && plan.reduce.whole_vectors(lanes) &&
                     plan.extent.numel() % lanes == 0;
  return {{plan.extent, plan.reduce, false, false, static_cast<Sums*>(workspace.scratch), workspace.counters},
          static_cast<unsigned>(plan.together),
          plan.depth,
          same_phase,
          whole,
          plan.cluster > 1,
          plan.bulk_copies && whole,
          ResidentMemory(plan.reduce, lanes, inputs, plan.depth),
          plan.extent.numel(),
          static_cast<int>(reinterpret_cast<uintptr_t>(written) % 16 / (16 / static_cast<unsigned>(lanes)))};
}

#if defined(__CUDACC__)

// The shape of a launch, in the driver's terms; it refers to itself.
class LaunchShape {
 public:
  LaunchShape(const Plan& plan, void* stream)
      : config_{dim3(static_cast<unsigned>(plan.reduce_blocks())),
                dim3(static_cast<unsigned>(plan.reduce.threads)),
                static_cast<size_t>(plan.block_memory),
                static_cast<cudaStream_t>(stream),
                &attribute_,
                0} {
    if (plan.cluster > 1) {
      attribute_.id = cudaLaunchAttributeClusterDimension;
      attribute_.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
      config_.numAttrs = 1;
    } else if (plan.waiting_blocks > 0) {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
      config_.numAttrs = 1;
    }
  }
  LaunchShape(const LaunchShape&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute attribute_{};
  cudaLaunchConfig_t config_;
};

// Whether the current device holds what must run at once: all waiting blocks, or a cluster. Where it does,
// the kernel may have the memory. The driver is asked once.
bool can_launch(const char* name, const void* kernel, const Plan& plan);

template <class Params>
bool can_launch(const char* name, void (*kernel)(Params), const Plan& plan) {
  return can_launch(name, reinterpret_cast<const void*>(kernel), plan);
}

template <class Params>
void launch_resident(const char* name, void (*kernel)(Params), const Plan& plan, void* stream,
                     Params params) {
  void* arguments[] = {&params};
  const LaunchShape shape(plan, stream);
  require(name, cudaLaunchKernelExC(shape.get(), reinterpret_cast<const void*>(kernel), arguments));
}

#else

template <class Params>
bool can_launch(const char*, void (*)(Params), const Plan&) {
  return true;
}

template <class Params>
void launch_resident(const char*, void (*kernel)(Params), const Plan& plan, void*, Params params) {
  const auto blocks = static_cast<unsigned>(plan.reduce_blocks()),
             threads = static_cast<unsigned>(plan.reduce.threads);
  const auto memory = static_cast<size_t>(plan.block_memory);
  const auto body = [&] { kernel(params); };
  if (plan.cluster > 1) {
    model::launch_clusters(blocks, static_cast<unsigned>(plan.cluster), threads, memory, body);
  } else if (plan.waiting_blocks > 0) {
    model::launch_cooperative(blocks, threads, memory, body);
  } else {
    model::launch(blocks, threads, memory, body);
  }
}

#endif

}  // namespace bnext::cuda
