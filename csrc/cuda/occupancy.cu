// What the driver says of resident kernels, asked once per kernel and shape.
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "cuda/resident_launch.cuh"

namespace bnext::cuda {
namespace {

// Of a kernel on a device: more than what every kernel may have of shared memory must be asked for.
void allow_all_memory(const char* name, const void* kernel, int device) {
  cudaFuncAttributes attributes;
  int most = 0;
  require(name, cudaFuncGetAttributes(&attributes, kernel));
  require(name, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  most -= static_cast<int>(attributes.sharedSizeBytes);
  require(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  require(name, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
}

bool fits(const char* name, const void* kernel, int device, const Plan& plan) {
  int count = 0;
  if (plan.cluster > 1) {
    const LaunchShape shape(plan, nullptr);
    if (cudaOccupancyMaxActiveClusters(&count, kernel, shape.get()) == cudaSuccess) return count > 0;
    cudaGetLastError();  // the device has no such clusters: the answer, and nobody else's error
    return false;
  }
  int multiprocessors = 0, cooperative = 0;
  require(name, cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  if (cooperative == 0) return false;
  require(name, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  require(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, plan.reduce.threads,
                                                              static_cast<size_t>(plan.block_memory)));
  return count > 0 && int64_t{count} * multiprocessors >= plan.waiting_blocks;
}

}  // namespace

bool can_launch(const char* name, const void* kernel, const Plan& plan) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  static std::map<std::tuple<const void*, int, int64_t, int, int64_t, int>, bool> answers;
  int device = 0;
  require(name, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto shape = std::make_tuple(kernel, device, plan.waiting_blocks, plan.reduce.threads,
                                     plan.block_memory, plan.cluster);
  const auto known = answers.find(shape);
  if (known != answers.end()) return known->second;
  if (!allowed.contains({kernel, device})) {
    allow_all_memory(name, kernel, device);
    allowed.insert({kernel, device});
  }
  return answers[shape] = fits(name, kernel, device, plan);
}

}  // namespace bnext::cuda
