// What a plan needs to know of a GPU, read from it once.
#include <mutex>
#include <vector>

#include "cuda/launch.h"
#include "cuda/launching.cuh"

namespace bnext::cuda {
namespace {

int64_t attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  require("bnext: a GPU's properties", cudaDeviceGetAttribute(&value, which, index));
  return value;
}

constexpr int kClusterBlocks = 8;      // of a cluster on every device that has any
constexpr int kEarlyInGraphs = 12030;  // driver whose graphs know of launches that begin early: CUDA 12.3

// Makes a device the current one as long as it lives. To set one makes a context on it, so no more than
// needed.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    require("bnext: the device", cudaGetDevice(&before_));
    changed_ = index != before_;
    if (changed_) require("bnext: the device", cudaSetDevice(index));
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The architecture of the kernels that this device runs.
int compiled_for_device(int index) {
  const OnDevice on(index);
  return compiled_for();
}

Device read_device(int index) {
  Device device;
  device.multiprocessors = static_cast<int>(attribute(cudaDevAttrMultiProcessorCount, index));
  device.block_threads = static_cast<int>(attribute(cudaDevAttrMaxThreadsPerBlock, index));
  device.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.multiprocessor_memory = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  device.l2 = attribute(cudaDevAttrL2CacheSize, index);
  const bool has_90 = compiled_for_device(index) >= 900;
  if (has_90 && attribute(cudaDevAttrClusterLaunch, index) != 0) device.cluster_blocks = kClusterBlocks;
  device.bulk_copies = has_90;
  int driver = 0;
  require("bnext: the driver's version", cudaDriverGetVersion(&driver));
  device.early_launches = has_90 && driver >= kEarlyInGraphs;
  // Two transfers per clock, in kHz, over a bus of so many bits.
  device.bandwidth = 2e3 * static_cast<double>(attribute(cudaDevAttrMemoryClockRate, index)) *
                     static_cast<double>(attribute(cudaDevAttrGlobalMemoryBusWidth, index)) / 8;
  return device;
}

BNEXT_DEVICE_MEMORY unsigned all_counters[kCounters];

}  // namespace

unsigned* counters() {
  void* address = nullptr;
  require("bnext: the counters", cudaGetSymbolAddress(&address, all_counters));
  return static_cast<unsigned*>(address);
}

void clear(void* data, int64_t bytes, void* stream) { fill_zero("bnext: clearing", data, bytes, stream); }

const Device& device(int index) {
  static std::mutex mutex;
  static std::vector<Device*> known;  // never freed: references are handed out
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= static_cast<int>(known.size())) known.resize(static_cast<size_t>(index) + 1);
  Device*& found = known[static_cast<size_t>(index)];
  if (found == nullptr) found = new Device(read_device(index));
  return *found;
}

uint64_t stream_id(void* stream) {
  unsigned long long id = 0;
  require("bnext: a stream's number", cudaStreamGetId(static_cast<cudaStream_t>(stream), &id));
  return id;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require("bnext: a stream's state", cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace bnext::cuda
