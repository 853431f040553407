// A whole call of an engine: read from a file, made phase by phase, written to another.
//
// Numbers are in the machine's own order. A call is a Call, then the tensors that it names, in that order; a
// result is y, mask, stats, running_mean, running_var, num_batches_tracked, dx, dweight, dbias, dresidual,
// each as far as it was asked for, then what the engine says of how forward and backward went. Outputs begin
// as NaN, and the mask as ones.
#pragma once

#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>

#include "args.h"
#include "buffers.h"
#include "formulas.h"
#include "plan.h"

namespace on_host {

using namespace bnext;

struct Call {
  int64_t outer, channels, inner;
  int64_t dtype, parameter_dtype;  // as in storage.h
  int64_t has_residual, has_weight, has_bias, has_running, has_counter;
  int64_t training, cumulative, unbiased, skip_nonfinite;
  int64_t in_place, mask;  // y over x; forward writes a mask, which backward reads
  int64_t spoils_x;        // x is NaN in backward
  int64_t backward, want_dx, want_dweight, want_dbias, want_dresidual;
  // Elements from where the place has the tensor; `last` knows none.
  int64_t shift_x, shift_dy, shift_out, shift_residual, shift_dresidual;
  int64_t place;  // as in buffers.h
  // What a CUDA call has besides.
  int64_t order, seed, resident_blocks;
  int64_t multiprocessors, block_threads, l2, shared_memory, multiprocessor_memory;
  int64_t cluster_blocks, bulk_copies, early_launches;
  int64_t engine;  // as in plan_cuda.h's Choice
  // What a CPU call has besides, as in plan.h's Machine.
  int64_t threads, first_cache, private_cache, shared_cache, cache_of_host;
  int64_t phases;  // of a training step, one by one: statistics and sums pass through the caller's hands
  int64_t skip_barrier, early_arrival, displace_stores, tear_atomics, skip_group_barrier, skip_async_wait,
      skip_previous, unordered_wait;
  int64_t overlap;     // as in threads/ATen/Parallel.h
  int64_t lacking;     // bytes at the end of x that are not there
  int64_t activation;  // as in activation.h
  double eps, momentum, activation_param;
};

// What a result says of each pass; see the engines.
using Took = std::array<int64_t, 4>;

// run(arguments, pass) has the engine do it.
template <class Run>
void make(const Call& call, std::istream& in, std::ostream& out, Run run) {
  const auto dtype = static_cast<Dtype>(call.dtype), vector_dtype = static_cast<Dtype>(call.parameter_dtype);
  const Extent extent{call.outer, call.channels, call.inner};
  const auto element = static_cast<size_t>(size_of(dtype)), channels = static_cast<size_t>(extent.channels);
  const size_t bytes = static_cast<size_t>(extent.numel()) * element;
  const size_t vector_bytes = channels * static_cast<size_t>(size_of(vector_dtype));
  const size_t grad_bytes = channels * (dtype == Dtype::float64 ? 8 : 4);
  auto shifted = [&](int64_t elements) { return static_cast<size_t>(elements) * element; };

  Buffers buffers(in, static_cast<Place>(call.place));
  const auto lacking = static_cast<size_t>(call.lacking);
  Buffer* const x = buffers.read(true, bytes - lacking, shifted(call.shift_x));
  in.ignore(static_cast<std::streamsize>(lacking));
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
    run(first, Pass::forward);
    forward.batch_statistics = false;
    forward.running_mean = {first.mean, Dtype::float64};
    forward.running_var = {first.var, Dtype::float64};
  }
  const Took forward_took = run(forward, forward.batch_statistics ? Pass::forward : Pass::inference);

  Took backward_took{};
  if (call.spoils_x != 0) std::memset(x->data(), kPoison, x->bytes());
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
      run(first, pass);
      backward.dweight = backward.dbias = nullptr;
      backward.sums_in = first.sums_out;
    }
    backward_took = run(backward, call.phases != 0 ? Pass::input_grad : pass);
  }
  buffers.require_zones();
  for (Buffer* result : {y, mask, stats, running_mean, running_var, counter, dx, dweight, dbias, dresidual})
    write(out, result);
  for (const auto& took : {forward_took, backward_took})
    out.write(reinterpret_cast<const char*>(took.data()), sizeof took);
}

// Every call of the file arguments[1], results to arguments[2]; the exit status.
template <class Engine>
int make_all(int count, char** arguments, Engine engine) {
  if (count != 3) {
    std::fprintf(stderr, "expected two arguments: the file of calls, the file for results\n");
    return 2;
  }
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  Call call;
  try {
    while (in.read(reinterpret_cast<char*>(&call), sizeof call)) {
      make(call, in, out, [&](const auto& args, Pass pass) { return engine(call, args, pass); });
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace on_host
