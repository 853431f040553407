// Where the CUDA engine gets its device, its stream and its workspace from.
#include "engine_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch.h"

#if BNEXT_TORCH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace bnext {

#if !BNEXT_CUDA

void require_cuda_engine(c10::Device device) {
  TORCH_CHECK(false, "expected input on the CPU, but got one on ", device,
              ": bnext was built without its CUDA kernels (", BNEXT_CUDA_REASON, ")");
}

void run_cuda(const ForwardArgs&, Pass, c10::Device device) { require_cuda_engine(device); }
void run_cuda(const BackwardArgs&, Pass, c10::Device device) { require_cuda_engine(device); }

#elif !BNEXT_TORCH_CUDA

// The kernels are built and linked; a torch that makes tensors for them is what is missing.
void require_cuda_engine(c10::Device device) {
  TORCH_CHECK(false, "expected input on the CPU, but got one on ", device,
              ": bnext was built beside a torch without CUDA");
}

void run_cuda(const ForwardArgs&, Pass, c10::Device device) { require_cuda_engine(device); }
void run_cuda(const BackwardArgs&, Pass, c10::Device device) { require_cuda_engine(device); }

#else

namespace {

at::TensorOptions ints(c10::Device device) { return at::TensorOptions().device(device).dtype(at::kInt); }

// Counters that are zero whenever a kernel starts: every call leaves them so. One set per stream, whose
// kernels run one after another. A captured graph may be replayed beside anything, so each captured call gets
// counters of its own, for good: from a reserve made outside of captures or, where that is used up, zeroed by
// a node of the graph.
class Counters {
 public:
  explicit Counters(c10::Device device) : device_(device) {}

  at::Tensor get(void* stream, bool capturing, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing) {
      if (!reserve_.defined() || used_ + count > reserve_.numel()) return at::zeros({count}, ints(device_));
      used_ += count;
      return reserve_.narrow(0, used_ - count, count);
    }
    if (!reserve_.defined() || used_ > reserve_.numel() / 2) {
      reserve_ = at::zeros({kReserve}, ints(device_));  // the old one lives on in no graph's way: see kept_
      kept_.push_back(reserve_);
      used_ = 0;
    }
    at::Tensor& counters = of_stream_[stream];
    if (!counters.defined() || counters.numel() < count) counters = at::zeros({2 * count}, ints(device_));
    return counters;
  }

 private:
  static constexpr int64_t kReserve = 1 << 16;  // of 4 bytes: some thousand captured calls

  c10::Device device_;
  std::mutex mutex_;
  std::map<void*, at::Tensor> of_stream_;
  at::Tensor reserve_;
  int64_t used_ = 0;
  std::vector<at::Tensor> kept_;  // graphs hold addresses, not tensors
};

// Never destroyed: at exit the driver may be gone before static objects are.
Counters& counters_of(c10::Device device) {
  static std::mutex mutex;
  static auto& all = *new std::map<c10::DeviceIndex, Counters>();
  const std::lock_guard<std::mutex> lock(mutex);
  return all.try_emplace(device.index(), device).first->second;
}

template <class Args, class Launch>
void run_on(const Args& args, Pass pass, c10::Device device, Launch launch) {
  const c10::DeviceGuard guard(device);
  const cuda::Plan plan =
      cuda::make_plan({args.extent, args.dtype, pass}, cuda::device(device.index()), cuda::aligned(args));
  cuda::Workspace workspace;
  workspace.stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  at::Tensor scratch, counters;  // freed in the order of the stream
  if (plan.reduces) {
    scratch = at::empty({plan.scratch_bytes}, at::TensorOptions().device(device).dtype(at::kByte));
    counters =
        counters_of(device).get(workspace.stream, cuda::is_capturing(workspace.stream), plan.reduce.groups);
    workspace.scratch = scratch.data_ptr();
    workspace.counters = static_cast<unsigned*>(counters.data_ptr());
  }
  launch(args, plan, workspace);
}

}  // namespace

void require_cuda_engine(c10::Device) {}

void run_cuda(const ForwardArgs& args, Pass pass, c10::Device device) {
  run_on(args, pass, device, cuda::forward);
}

void run_cuda(const BackwardArgs& args, Pass pass, c10::Device device) {
  run_on(args, pass, device, cuda::backward);
}

#endif

}  // namespace bnext
