// The CPU engine behind engine.h, and the way to the CUDA engine where the build has it.
#include "engine.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "cpu/launch.h"
#include "engine_cuda.h"
#include "output_memory.h"

namespace bnext {
namespace {

template <class Args>
Plan cpu_plan(const Args& args, Pass pass) {
  return make_plan(Problem(args, pass), cpu::machine(at::get_num_threads()));
}

}  // namespace

void require_engine(const at::Tensor& x) {
  if (x.is_cuda()) require_cuda_engine(x.device());
}

at::Tensor empty_vector(at::IntArrayRef sizes, at::ScalarType dtype, const at::Tensor& like) {
  if (like.is_cpu()) {
    const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
    return at::detail::empty_generic(sizes, output_allocator(bytes),
                                     c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
  }
  return at::empty(sizes, like.options().dtype(dtype));
}

at::Tensor empty_output(const at::Tensor& like, at::MemoryFormat format, Output which) {
  if (!like.is_cpu()) return at::empty(like.sizes(), like.options(), format);
  return at::detail::empty_generic(like.sizes(), output_allocator(like.nbytes(), which),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type(), format);
}

void run(const ForwardArgs& args, Pass pass, const at::Tensor& x) {
  if (x.is_cuda()) return run_cuda(args, pass, x.device());
  cpu::forward(args, cpu_plan(args, pass));
}

void run(const BackwardArgs& args, Pass pass, const at::Tensor& x) {
  if (x.is_cuda()) return run_cuda(args, pass, x.device());
  cpu::backward(args, cpu_plan(args, pass));
}

}  // namespace bnext
