// From a plan to a launch, checked.
#pragma once

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "plan_cuda.h"

namespace bnext::cuda {

#if defined(__CUDACC__)

inline void require(const char* name, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  }
}

// early: before the kernel that was launched before it has ended, see let_next_begin().
template <class Params>
void launch(const char* name, void (*kernel)(Params), const Tiling& tiling, int64_t shared, void* stream,
            Params params, bool early = false) {
  void* arguments[] = {&params};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{dim3(static_cast<unsigned>(tiling.blocks())),
                                  dim3(static_cast<unsigned>(tiling.threads)),
                                  static_cast<size_t>(shared),
                                  static_cast<cudaStream_t>(stream),
                                  &attribute,
                                  early ? 1u : 0u};
  require(name, cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments));
}

inline void fill_zero(const char* name, void* data, int64_t bytes, void* stream) {
  if (bytes == 0) return;
  require(name, cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

#else

template <class Params>
void launch(const char*, void (*kernel)(Params), const Tiling& tiling, int64_t shared, void*, Params params,
            bool early = false) {
  const auto launch = early ? model::launch_early : model::launch;
  launch(static_cast<unsigned>(tiling.blocks()), static_cast<unsigned>(tiling.threads),
         static_cast<size_t>(shared), [kernel, params] { kernel(params); });
}

inline void fill_zero(const char*, void* data, int64_t bytes, void*) {
  std::fill_n(static_cast<unsigned char*>(data), bytes, static_cast<unsigned char>(0));
}

#endif

inline bool on_boundary(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline Reduction reduction_of(const Plan& plan, int lanes, bool aligned, const Workspace& workspace) {
  Sums* const scratch = static_cast<Sums*>(workspace.scratch);  // totals, then partial sums
  return {plan.extent,
          plan.reduce,
          aligned && plan.reduce.whole_vectors(lanes),
          plan.early_map,
          scratch == nullptr ? nullptr : scratch + plan.extent.channels,
          workspace.counters};
}

// Bytes of block memory: sums of every lane of every thread, or before them a center per channel of the
// group.
template <class Reducer>
int64_t reduce_memory(const Tiling& t) {
  constexpr int lanes = kLanes<typename Reducer::Storage>;
  const bool planes = t.traversal == Traversal::planes;
  const int64_t values = sums_memory(t.threads, planes ? 0 : t.height, planes ? 0 : t.vectors * lanes);
  const int64_t centers = t.group_channels * int64_t{sizeof(typename Reducer::Center)};
  return centers > values * int64_t{sizeof(double)} ? centers : values * int64_t{sizeof(double)};
}

// A coefficient per column of the group, or per channel.
template <class Map>
int64_t map_memory(const Tiling& t) {
  constexpr int lanes = kLanes<typename Map::Storage>;
  return int64_t{sizeof(typename Map::Math)} * Map::kCoefficients *
         (t.traversal == Traversal::planes ? 1 : int64_t{t.vectors} * lanes);
}

}  // namespace bnext::cuda
