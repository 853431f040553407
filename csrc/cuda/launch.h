// What the CUDA engines offer to the tensor level. Nothing here waits for the device.
#pragma once

#include "args.h"
#include "plan_cuda.h"

namespace bnext::cuda {

// What a call needs besides its tensors, all on the device of the call.
struct Workspace {
  void* stream = nullptr;        // cudaStream_t
  void* scratch = nullptr;       // plan.scratch_bytes, aligned for double; any content
  unsigned* counters = nullptr;  // plan.counters(), zero; zero again when the call's kernels have run
};

// Errors are std::runtime_error and name the operator. y may be x; a mask begins at a multiple of 4 bytes.
void forward(const ForwardArgs& args, const Plan& plan, const Workspace& workspace);

// Null dx: no input gradient, and no dresidual. Null dweight and dbias: no sums for them.
void backward(const BackwardArgs& args, const Plan& plan, const Workspace& workspace);

// Whether the current device runs the plan: it holds all blocks at once that wait for each other. Otherwise
// the call must stream. To be asked before forward and backward.
bool can_run(const ForwardArgs& args, const Plan& plan);
bool can_run(const BackwardArgs& args, const Plan& plan);

// Whether the tensors of a call begin at multiples of 16 bytes, which its plan needs to know.
bool aligned(const ForwardArgs& args);
bool aligned(const BackwardArgs& args);

// What kernels were compiled for, as __CUDA_ARCH__ has it, of those that the current device runs.
int compiled_for();

// Of the GPU with this index; read once.
const Device& device(int index);

// A number that no other stream has or will have; a handle may stand for another stream in another thread, or
// later.
uint64_t stream_id(void* stream);

// Whether what is launched on the stream goes into a graph.
bool is_capturing(void* stream);

// kCounters of the current device, zero since its module was loaded. They are no allocation: nothing to make
// inside a capture, nothing that a graph's memory pool could count as its own.
constexpr int64_t kCounters = 1 << 18;
unsigned* counters();

// Zeroes memory in the order of the stream.
void clear(void* data, int64_t bytes, void* stream);

}  // namespace bnext::cuda
