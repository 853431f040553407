// Where the CUDA engine gets its device, its stream and its workspace from.
#include "engine_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <charconv>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>
#include <system_error>

#include "build_config.h"  // written by setup.py
#include "cuda/launch.h"

#if BNEXT_TORCH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace bnext {

#if !(BNEXT_CUDA && BNEXT_TORCH_CUDA)

#if BNEXT_CUDA  // the kernels are there; a torch that makes tensors for them is not
constexpr char kMissing[] = "built beside a torch without CUDA";
#else
constexpr char kMissing[] = "built without its CUDA kernels (" BNEXT_CUDA_REASON ")";
#endif

void require_cuda_engine(c10::Device device) {
  TORCH_CHECK(false, "expected input on the CPU, but got one on ", device, ": bnext was ", kMissing);
}

void run_cuda(const ForwardArgs&, Pass, c10::Device device) { require_cuda_engine(device); }
void run_cuda(const BackwardArgs&, Pass, c10::Device device) { require_cuda_engine(device); }

#else

namespace {

// Which of a device's counters a call gets. Every call leaves them zero, so that the calls of a stream, which
// run one after another, can share theirs. A captured graph may be replayed beside anything: each captured
// call gets counters of its own, for good.
class Counters {
 public:
  // Of the first, or -1: there are not enough left.
  int64_t get(void* where, int64_t count) {
    const bool capturing = cuda::is_capturing(where);
    const uint64_t stream = capturing ? 0 : cuda::stream_id(where);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing) return take(count);
    Range& range = of_stream_[stream];
    if (range.count < count) {
      const int64_t rounded = (count + kTogether - 1) / kTogether * kTogether, first = take(rounded);
      if (first < 0) return -1;
      range = {first, rounded};
    }
    return range.first;
  }

 private:
  static constexpr int64_t kTogether = 1024;  // taken at a time: more groups than any device cuts into chunks

  struct Range {
    int64_t first = -1, count = 0;
  };

  int64_t take(int64_t count) {
    if (used_ + count > cuda::kCounters) return -1;
    used_ += count;
    return used_ - count;
  }

  std::mutex mutex_;
  std::map<uint64_t, Range> of_stream_;  // by stream_id
  int64_t used_ = 0;
};

// Never destroyed: at exit the driver may be gone before static objects are.
Counters& counters_of(c10::Device device) {
  static std::mutex mutex;
  static auto& all = *new std::map<c10::DeviceIndex, Counters>();
  const std::lock_guard<std::mutex> lock(mutex);
  return all[device.index()];
}

cuda::Choice chosen_engine() {
  const char* const wish = std::getenv("BNEXT_CUDA_ENGINE");
  return cuda::choice_named(wish == nullptr ? "automatic" : wish);
}

// With BNEXT_CUDA_SPARE: multiprocessors that kernels whose blocks wait for each other leave to others.
cuda::Device device_of(c10::Device where) {
  cuda::Device device = cuda::device(where.index());
  static const char* const spare = std::getenv("BNEXT_CUDA_SPARE");
  if (spare == nullptr) return device;
  const std::string_view text(spare);
  int& count = device.spare_multiprocessors;
  const auto [end, error] = std::from_chars(text.begin(), text.end(), count);
  const bool whole = error == std::errc() && end == text.end();
  TORCH_CHECK_VALUE(whole && count >= 0 && count < device.multiprocessors,
                    "BNEXT_CUDA_SPARE: expected a number of multiprocessors from 0 to ",
                    device.multiprocessors - 1, ", but got ", text);
  return device;
}

template <class Args>
cuda::Plan plan_for(const Args& args, Pass pass, c10::Device where) {
  static const cuda::Choice choice = chosen_engine();
  const Problem problem(args, pass);
  const cuda::Device device = device_of(where);
  const bool aligned = cuda::aligned(args);
  const cuda::Plan plan = cuda::make_plan(problem, device, aligned, choice);
  if (cuda::can_run(args, plan)) return plan;
  return cuda::make_plan(problem, device, aligned, cuda::Choice::streaming);
}

template <class Args, class Launch>
void run_on(const Args& args, Pass pass, c10::Device device, Launch launch) {
  const c10::DeviceGuard guard(device);
  const cuda::Plan plan = plan_for(args, pass, device);
  cuda::Workspace workspace;
  workspace.stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  at::Tensor scratch;  // freed in the order of the stream
  if (plan.reduces) {
    const int64_t count = plan.counters(), bytes = count * int64_t{sizeof(unsigned)};
    int64_t first = 0;
    if (count > 0) first = counters_of(device).get(workspace.stream, count);
    const bool own = first < 0;  // none are left: some of the call's own, cleared by a node more
    const int64_t wanted = plan.scratch_bytes + (own ? bytes : 0);
    if (wanted > 0) scratch = at::empty({wanted}, at::TensorOptions().device(device).dtype(at::kByte));
    workspace.scratch = wanted > 0 ? scratch.data_ptr() : nullptr;
    if (own) {
      workspace.counters =
          reinterpret_cast<unsigned*>(static_cast<char*>(workspace.scratch) + plan.scratch_bytes);
      cuda::clear(workspace.counters, bytes, workspace.stream);
    } else if (count > 0) {
      workspace.counters = cuda::counters() + first;
    }
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
