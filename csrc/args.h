// One call in plain data: what a device engine gets instead of tensors. All pointers are dense and belong to
// the device the engine runs on; null means absent.
#pragma once

#include <cstdint>

#include "activation.h"
#include "storage.h"

namespace bnext {

// The tensor in memory order: `channels` lies between `outer` and `inner`; inner == 1 is the channels-last
// family.
struct Extent {
  int64_t outer = 0;
  int64_t channels = 0;
  int64_t inner = 0;

  constexpr int64_t count() const { return outer * inner; }  // elements per channel
  constexpr int64_t numel() const { return outer * channels * inner; }
};

// A per-channel vector in its storage type.
struct ChannelVector {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;

  constexpr explicit operator bool() const { return data != nullptr; }
};

// y = act(z), and what it takes besides z.
struct ActivationSpec {
  Activation kind = Activation::none;
  double param = 0;

  constexpr explicit operator bool() const { return kind != Activation::none; }
};

// A mask has bit i % 8 of byte i / 8 for element i in memory order. Whole words of 32 bits, and one more: any
// four bytes that begin with a bit's byte may be read.
template <class Size>
constexpr Size mask_bytes(const Size& numel) {
  return numel / 32 * 4 + 8;
}

// Rows of the statistics, float64: mean, invstd; then, kept for a backward pass, weight (or 1), bias (or 0).
constexpr int64_t kStatisticsRows = 2, kKeptWeight = 2, kKeptBias = 3, kKeptRows = 4;

struct Sums;  // formulas.h

struct ForwardArgs {
  Extent extent;
  Dtype dtype = Dtype::float32;
  const void* x = nullptr;
  const void* residual = nullptr;  // added before the activation
  void* y = nullptr;               // may be x; null: statistics alone
  void* mask = nullptr;            // out: see activation_passes
  ChannelVector weight, bias, running_mean, running_var;
  int64_t* num_batches_tracked = nullptr;
  double* mean = nullptr;    // out: statistics the output was normalised with
  double* invstd = nullptr;  // out
  double* var = nullptr;     // out: biased, of the batch
  double* kept = nullptr;    // out, for a backward pass: rows kKeptWeight and kKeptBias
  double eps = 0;
  double momentum = 0;      // weight of the new value
  bool cumulative = false;  // momentum = 1 / num_batches_tracked instead
  bool batch_statistics = false;
  bool unbiased_running_var = true;
  bool skip_nonfinite = false;  // running statistics stay where new ones would not be finite
  ActivationSpec activation;
};

// The activation's input is computed again from x, and the residual if there is one; where the forward pass
// left a mask, that says what of dy passes.
struct BackwardArgs {
  Extent extent;
  Dtype dtype = Dtype::float32;
  const void* x = nullptr;  // from_output: y
  const void* dy = nullptr;
  const void* residual = nullptr;
  const void* mask = nullptr;
  void* dx = nullptr;
  void* dresidual = nullptr;   // dz
  ChannelVector weight, bias;  // bias: with an activation, whose input is computed again
  const double* mean = nullptr;
  const double* invstd = nullptr;
  void* dweight = nullptr;  // opmath of dtype
  void* dbias = nullptr;    // opmath of dtype
  // Per channel, around the mean rounded to arithmetic precision. sums_out: written by a call without dx.
  // sums_in: instead of a reduction, those of more elements than this call's, times its share of them.
  Sums* sums_out = nullptr;
  const Sums* sums_in = nullptr;
  bool batch_statistics = false;
  bool from_output = false;  // the forward pass wrote over x: y stands for it, through activation_inverse
  ActivationSpec activation;
};

// Whether dz is found from what stands for x.
constexpr bool needs_input(const BackwardArgs& args) { return args.activation && args.mask == nullptr; }

}  // namespace bnext
