// The CUDA engine's own sources, run on the CPU: reads calls from the file argv[1], makes each one over the
// execution model, and writes what it gave to the file argv[2].
//
// Numbers are in the machine's own order. A call is a Call, then the tensors that it names, in that order; a
// result is y, mask, stats, running_mean, running_var, num_batches_tracked, dx, dweight, dbias, dresidual,
// each as far as it was asked for, then how many kernels forward and backward took, which is what their plans
// say, how many of their blocks wait for each other, how many are a cluster, and whether copies are in bulk.
// Every buffer lies between guard zones; outputs begin
// as NaN, and the mask as ones.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <list>
#include <stdexcept>
#include <vector>

#include "cuda/launch.h"
#include "formulas.h"
#include "model.h"
#include "plan_cuda.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

using namespace bnext;

struct Call {
  int64_t outer, channels, inner;
  int64_t dtype, parameter_dtype;  // as in storage.h
  int64_t has_residual, has_weight, has_bias, has_running, has_counter;
  int64_t training, cumulative, unbiased, skip_nonfinite;
  int64_t in_place, mask;  // y over x; forward writes a mask, which backward reads
  int64_t spoils_x;        // x is NaN in backward
  int64_t backward, want_dx, want_dweight, want_dbias, want_dresidual;
  // Elements from a boundary of 16 bytes to the tensor.
  int64_t shift_x, shift_dy, shift_out, shift_residual, shift_dresidual;
  int64_t order, seed, resident_blocks;
  int64_t multiprocessors, block_threads, l2, shared_memory, multiprocessor_memory;
  int64_t cluster_blocks, bulk_copies, early_launches;
  int64_t engine;  // as in plan_cuda.h's Choice
  int64_t phases;  // of a training step, one by one: statistics and sums pass through the caller's hands
  int64_t skip_barrier, early_arrival, displace_stores, tear_atomics, skip_group_barrier, skip_async_wait,
      skip_previous, unordered_wait;
  int64_t activation;  // as in activation.h
  double eps, momentum, activation_param;
};

// What a result says of each pass.
using Took = std::array<int64_t, 4>;

constexpr size_t kGuard = 256;  // bytes
constexpr unsigned char kGuardByte = 0xA5, kPoison = 0xFF;

// Memory of exactly this size, `shift` bytes past a boundary of 16, with guards on both sides.
class Buffer {
 public:
  Buffer(size_t bytes, size_t shift = 0) : bytes_(bytes), begin_(kGuard + shift) {
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(16, (begin_ + bytes + kGuard + 15) / 16 * 16));
    std::memset(memory_, kGuardByte, begin_ + bytes + kGuard);
    std::memset(data(), kPoison, bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory_, begin_);
    __asan_poison_memory_region(data() + bytes_, kGuard);
#endif
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, begin_ + bytes_ + kGuard);
#endif
    std::free(memory_);
  }

  unsigned char* data() { return memory_ + begin_; }
  size_t bytes() const { return bytes_; }

  void require_guards() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t k = 0; k < begin_; ++k) require(memory_[k]);
    for (size_t k = 0; k < kGuard; ++k) require(memory_[begin_ + bytes_ + k]);
#endif
  }

 private:
  static void require(unsigned char byte) {
    if (byte != kGuardByte) throw std::runtime_error("a guard zone was written to");
  }

  size_t bytes_, begin_;
  unsigned char* memory_;
};

class Buffers {
 public:
  explicit Buffers(std::istream& in) : in_(in) {}

  Buffer* empty(bool wanted, size_t bytes, size_t shift = 0) {
    return wanted ? &all_.emplace_back(bytes, shift) : nullptr;
  }
  Buffer* read(bool wanted, size_t bytes, size_t shift = 0) {
    Buffer* const buffer = empty(wanted, bytes, shift);
    if (buffer != nullptr)
      in_.read(reinterpret_cast<char*>(buffer->data()), static_cast<std::streamsize>(bytes));
    return buffer;
  }
  void require_guards() const {
    for (const Buffer& buffer : all_) buffer.require_guards();
  }

 private:
  std::istream& in_;
  std::list<Buffer> all_;
};

void* data(Buffer* buffer) { return buffer == nullptr ? nullptr : buffer->data(); }

void write(std::ostream& out, Buffer* buffer) {
  if (buffer == nullptr) return;
  out.write(reinterpret_cast<const char*>(buffer->data()), static_cast<std::streamsize>(buffer->bytes()));
}

// Counters are zero before and after; everything else in the workspace is dirty.
template <class Args, class Run>
Took run_planned(const Args& args, Pass pass, const cuda::Device& device, cuda::Choice engine, Run run) {
  const cuda::Plan plan = make_plan(Problem(args, pass), device, cuda::aligned(args), engine);
  const uint64_t before = model::statistics().launches;
  Buffer scratch(static_cast<size_t>(plan.scratch_bytes));
  std::vector<unsigned> counters(static_cast<size_t>(plan.counters()), 0u);
  run(args, plan,
      cuda::Workspace{nullptr, plan.scratch_bytes > 0 ? scratch.data() : nullptr, counters.data()});
  model::synchronize();
  scratch.require_guards();
  for (const unsigned counter : counters) {
    if (counter != 0) throw std::runtime_error("a counter was left behind");
  }
  const uint64_t launched = model::statistics().launches - before;
  if (launched != static_cast<uint64_t>(plan.launches())) throw std::runtime_error("launches nobody planned");
  return {static_cast<int64_t>(launched), plan.waiting_blocks, plan.cluster, plan.bulk_copies ? 1 : 0};
}

void make(const Call& call, std::istream& in, std::ostream& out) {
  const auto dtype = static_cast<Dtype>(call.dtype), vector_dtype = static_cast<Dtype>(call.parameter_dtype);
  const Extent extent{call.outer, call.channels, call.inner};
  const auto element = static_cast<size_t>(size_of(dtype)), channels = static_cast<size_t>(extent.channels);
  const size_t bytes = static_cast<size_t>(extent.numel()) * element;
  const size_t vector_bytes = channels * static_cast<size_t>(size_of(vector_dtype));
  const size_t grad_bytes = channels * (dtype == Dtype::float64 ? 8 : 4);
  auto shifted = [&](int64_t elements) { return static_cast<size_t>(elements) * element; };

  Buffers buffers(in);
  Buffer* const x = buffers.read(true, bytes, shifted(call.shift_x));
  Buffer* const dy = buffers.read(call.backward != 0, bytes, shifted(call.shift_dy));
  Buffer* const residual = buffers.read(call.has_residual != 0, bytes, shifted(call.shift_residual));
  Buffer* const weight = buffers.read(call.has_weight != 0, vector_bytes);
  Buffer* const bias = buffers.read(call.has_bias != 0, vector_bytes);
  Buffer* const running_mean = buffers.read(call.has_running != 0, vector_bytes);
  Buffer* const running_var = buffers.read(call.has_running != 0, vector_bytes);
  Buffer* const counter = buffers.read(call.has_counter != 0, sizeof(int64_t));
  Buffer* const y = call.in_place != 0 ? x : buffers.empty(true, bytes, shifted(call.shift_out));
  Buffer* const mask = buffers.empty(call.mask != 0, static_cast<size_t>(mask_bytes(extent.numel())));
  Buffer* const stats = buffers.empty(true, (call.backward != 0 ? 4 : 2) * channels * sizeof(double));
  Buffer* const dx = buffers.empty(call.want_dx != 0, bytes, shifted(call.shift_out));
  Buffer* const dweight = buffers.empty(call.want_dweight != 0, grad_bytes);
  Buffer* const dbias = buffers.empty(call.want_dbias != 0, grad_bytes);
  Buffer* const dresidual = buffers.empty(call.want_dresidual != 0, bytes, shifted(call.shift_dresidual));

  model::set_options({static_cast<model::Options::Order>(call.order), static_cast<uint64_t>(call.seed),
                      static_cast<unsigned>(call.resident_blocks),
                      static_cast<unsigned>(call.multiprocessors * 2)});
  model::set_faults({static_cast<int>(call.skip_barrier), call.early_arrival != 0,
                     static_cast<ptrdiff_t>(call.displace_stores), call.tear_atomics != 0,
                     call.skip_group_barrier != 0, call.skip_async_wait != 0, call.skip_previous != 0,
                     static_cast<int>(call.unordered_wait)});
  const cuda::Device device{static_cast<int>(call.multiprocessors),
                            static_cast<int>(call.block_threads),
                            call.shared_memory,
                            call.l2,
                            1e12,
                            call.multiprocessor_memory,
                            0,
                            static_cast<int>(call.cluster_blocks),
                            call.bulk_copies != 0,
                            call.early_launches != 0};
  const auto engine = static_cast<cuda::Choice>(call.engine);
  auto vector = [&](Buffer* buffer) { return ChannelVector{data(buffer), vector_dtype}; };

  ForwardArgs forward;
  forward.extent = extent;
  forward.dtype = dtype;
  forward.x = data(x);
  forward.residual = data(residual);
  forward.y = data(y);
  forward.mask = data(mask);
  forward.weight = vector(weight);
  forward.bias = vector(bias);
  forward.running_mean = vector(running_mean);
  forward.running_var = vector(running_var);
  if (call.training != 0) forward.num_batches_tracked = static_cast<int64_t*>(data(counter));
  forward.mean = static_cast<double*>(data(stats));
  forward.invstd = forward.mean + extent.channels;
  if (call.backward != 0) forward.kept = forward.invstd + extent.channels;
  forward.eps = call.eps;
  forward.momentum = call.momentum;
  forward.cumulative = call.cumulative != 0;
  forward.batch_statistics = call.training != 0;
  forward.unbiased_running_var = call.unbiased != 0;
  forward.skip_nonfinite = call.skip_nonfinite != 0;
  forward.activation = {static_cast<Activation>(call.activation), call.activation_param};
  Took forward_took{}, backward_took{};
  Buffer* const moments = buffers.empty(call.phases != 0, 3 * channels * sizeof(double));
  if (call.phases != 0) {
    ForwardArgs first;
    first.extent = extent;
    first.dtype = dtype;
    first.x = forward.x;
    first.batch_statistics = true;
    first.mean = static_cast<double*>(data(moments));
    first.var = first.mean + extent.channels;
    first.invstd = first.var + extent.channels;
    run_planned(first, Pass::forward, device, engine, cuda::forward);
    forward.batch_statistics = false;
    forward.running_mean = {first.mean, Dtype::float64};
    forward.running_var = {first.var, Dtype::float64};
  }
  forward_took = run_planned(forward, forward.batch_statistics ? Pass::forward : Pass::inference, device,
                             engine, cuda::forward);

  if (call.spoils_x != 0) std::memset(data(x), kPoison, static_cast<size_t>(extent.numel() * size_of(dtype)));
  if (call.backward != 0) {
    BackwardArgs backward;
    backward.extent = extent;
    backward.dtype = dtype;
    backward.x = data(x);
    backward.dy = data(dy);
    backward.dx = data(dx);
    if (forward.activation && mask == nullptr) backward.residual = forward.residual;
    backward.mask = forward.mask;
    backward.dresidual = data(dresidual);
    backward.from_output = call.in_place != 0;
    if (weight != nullptr) backward.weight = {forward.kept, Dtype::float64};
    if (bias != nullptr) backward.bias = {forward.kept + extent.channels, Dtype::float64};
    backward.activation = forward.activation;
    backward.mean = forward.mean;
    backward.invstd = forward.invstd;
    backward.dweight = data(dweight);
    backward.dbias = data(dbias);
    backward.batch_statistics = call.training != 0;
    const Pass pass = call.training != 0 ? Pass::backward : Pass::frozen_backward;
    Buffer* const sums = buffers.empty(call.phases != 0, channels * sizeof(Sums));
    if (call.phases != 0) {
      BackwardArgs first = backward;
      first.dx = first.dresidual = nullptr;
      first.sums_out = static_cast<Sums*>(data(sums));
      run_planned(first, pass, device, engine, cuda::backward);
      backward.dweight = backward.dbias = nullptr;
      backward.sums_in = first.sums_out;
    }
    backward_took =
        run_planned(backward, call.phases != 0 ? Pass::input_grad : pass, device, engine, cuda::backward);
  }
  buffers.require_guards();
  for (Buffer* result : {y, mask, stats, running_mean, running_var, counter, dx, dweight, dbias, dresidual})
    write(out, result);
  for (const auto& took : {forward_took, backward_took})
    out.write(reinterpret_cast<const char*>(took.data()), sizeof took);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "expected two arguments: the file of calls, the file for results\n");
    return 2;
  }
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  Call call;
  try {
    while (in.read(reinterpret_cast<char*>(&call), sizeof call)) make(call, in, out);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
