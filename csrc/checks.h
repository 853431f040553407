// Every requirement on the tensors of a call, in words: argument, expected, got. The same functions serve the
// kernels and the meta implementations, so sizes are symbolic. All of them run before anything is written.
//
// Types and texts that torch.nn.functional.batch_norm also has are torch's own: programs match on them.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/SymInt.h>
#include <c10/util/string_view.h>

#include <charconv>
#include <optional>
#include <string>

#include "args.h"

namespace bnext {

inline bool present(const std::optional<at::Tensor>& t) { return t.has_value() && t->defined(); }

// A float as Python prints it.
inline std::string python_repr(double value) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  std::string text(buffer, end);
  if (text.find_first_not_of("-0123456789") == std::string::npos) text += ".0";
  return text;
}

inline std::string size_text(const at::Tensor& t) {
  std::string text = "torch.Size([";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + c10::str(t.sym_size(d));
  return text + "])";
}

inline bool is_16_bit(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

inline void require_input(const at::Tensor& x, at::IntArrayRef ndims) {
  const int64_t ndim = x.dim();
  if (!ndims.empty()) {
    bool allowed = false;
    std::string names;
    for (const int64_t n : ndims) {
      allowed |= n == ndim;
      names += (names.empty() ? "" : " or ") + std::to_string(n) + "D";
    }
    TORCH_CHECK_VALUE(allowed, "expected ", names, " input (got ", ndim, "D input)");
  }
  TORCH_CHECK_VALUE(ndim >= 2, "expected at least 2D input (got ", ndim, "D input)");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kDouble || is_16_bit(dtype),
                              "\"batch_norm\" not implemented for '", c10::toString(dtype),
                              "': expected input of dtype float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(x.sym_size(1) != 0, "expected input with at least one channel, but got input size ",
                    size_text(x));
}

inline void require_enough_values(const at::Tensor& x) {
  c10::SymInt count = x.sym_size(0);
  for (int64_t d = 2; d < x.dim(); ++d) count = count * x.sym_size(d);
  // A size that depends on data is asserted when the compiled graph runs.
  TORCH_CHECK_VALUE(count.sym_ne(1).expect_true(__FILE__, __LINE__),
                    "Expected more than 1 value per channel when training, got input size ", size_text(x));
}

inline void require_eps(double eps, bool training) {
  TORCH_CHECK_VALUE(!training || eps > 0, "batch_norm eps must be positive during training, but got ",
                    python_repr(eps));
  TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", python_repr(eps));
}

inline void require_same_device(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.device() == x.device(), "expected ", name, " on the input's device ", x.device(),
              ", but got ", t.device());
}

// One element per channel, on the input's device, strided.
inline void require_channel_vector(const char* name, const std::optional<at::Tensor>& v,
                                   const at::Tensor& x) {
  if (!present(v)) return;
  TORCH_CHECK(v->sym_numel() == x.sym_size(1), name, " should contain ", x.sym_size(1), " elements not ",
              v->sym_numel());
  require_same_device(name, *v, x);
  TORCH_CHECK(v->layout() == at::kStrided, "expected ", name, " to be a strided tensor, but got ",
              v->layout());
}

// The input's dtype, or float32 beside a 16-bit input; the same for all. Or float64, as the forward pass
// keeps them.
struct ParameterDtype {
  const at::Tensor& x;
  bool or_kept = false;
  const char* first_name = nullptr;
  at::ScalarType dtype = at::ScalarType::Undefined;

  void require(const char* name, const std::optional<at::Tensor>& v) {
    if (!present(v)) return;
    const auto got = v->scalar_type();
    const auto own = x.scalar_type();
    TORCH_CHECK(got == own || (got == at::kFloat && is_16_bit(own)) || (or_kept && got == at::kDouble),
                "expected ", name, " to have dtype ", c10::toString(own), is_16_bit(own) ? " or Float" : "",
                or_kept && own != at::kDouble ? " or Double" : "", " beside an input of dtype ",
                c10::toString(own), ", but got ", c10::toString(got));
    if (first_name == nullptr) {
      first_name = name;
      dtype = got;
    }
    TORCH_CHECK(got == dtype, "expected ", name, " to have the dtype of ", first_name, ", ",
                c10::toString(dtype), ", but got ", c10::toString(got));
  }
};

inline std::string activation_names() {
  std::string names;
  for (int k = 1; k < kActivationCount; ++k) names += (k > 1 ? ", " : "") + std::string(kActivations[k].name);
  return names;
}

inline ActivationSpec require_activation(std::optional<c10::string_view> name, std::optional<double> param) {
  ActivationSpec spec;
  if (name.has_value()) {
    int k = 1;  // 0 is none
    while (k < kActivationCount && *name != kActivations[k].name) ++k;
    TORCH_CHECK_VALUE(k < kActivationCount, "expected activation one of ", activation_names(),
                      " or None, but got ", *name);
    spec.kind = static_cast<Activation>(k);
  }
  const ActivationEntry& entry = activation_entry(spec.kind);
  TORCH_CHECK_VALUE(!param.has_value() || entry.takes_parameter,
                    "expected activation_param with leaky_relu or elu only, but got ",
                    python_repr(param.value_or(0)), " with ", spec ? entry.name : "None");
  spec.param = param.value_or(entry.parameter);
  TORCH_CHECK_VALUE(std::isfinite(spec.param), "expected a finite activation_param, but got ",
                    python_repr(spec.param));
  return spec;
}

inline void require_running_pair(const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& var,
                                 bool training) {
  TORCH_CHECK_VALUE(!training || present(mean) == present(var),
                    "running_mean and running_var must either both be None or neither be None");
  TORCH_CHECK(training || present(mean), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(training || present(var), "running_var must be defined in evaluation mode");
}

inline void require_counter(const std::optional<at::Tensor>& counter, const at::Tensor& x) {
  if (!present(counter)) return;
  TORCH_CHECK(counter->scalar_type() == at::kLong && counter->sym_numel() == 1,
              "expected num_batches_tracked to be a single int64, but got ", counter->sym_numel(),
              " elements of ", c10::toString(counter->scalar_type()));
  require_same_device("num_batches_tracked", *counter, x);
}

// In torch's words, of what a call writes to.
inline void require_writable(const at::Tensor& t) {
  TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(),
              "Inplace update to inference tensor outside InferenceMode is not allowed.");
  at::assert_no_internal_overlap(t);
}

inline void require_not_differentiable(const char* name, const std::optional<at::Tensor>& t) {
  TORCH_CHECK(!present(t) || !t->requires_grad(), name,
              " is not differentiable: it cannot have requires_grad=True");
}

// A tensor beside the input and like it.
inline void require_like_input(const char* name, const std::optional<at::Tensor>& t, const at::Tensor& x) {
  if (!present(t)) return;
  TORCH_CHECK(t->sym_sizes() == x.sym_sizes(), "expected ", name, " of the input's size ", size_text(x),
              ", but got ", size_text(*t));
  TORCH_CHECK(t->scalar_type() == x.scalar_type(), "expected ", name, " of the input's dtype ",
              c10::toString(x.scalar_type()), ", but got ", c10::toString(t->scalar_type()));
  require_same_device(name, *t, x);
}

// Of batch_norm_backward: what it recovers the activation's slope from.
inline void require_slope_source(const std::optional<at::Tensor>& residual,
                                 const std::optional<at::Tensor>& mask, bool from_output,
                                 const ActivationSpec& activation, const at::Tensor& x, bool dresidual) {
  require_like_input("residual", residual, x);
  TORCH_CHECK(present(residual) + present(mask) + from_output <= 1,
              "expected one of residual, mask and from_output at most");
  if (present(mask)) {
    TORCH_CHECK(is_masked(activation.kind), "expected a mask with relu, leaky_relu or relu6 only");
    const c10::SymInt bytes = mask_bytes(x.sym_numel());
    TORCH_CHECK(mask->scalar_type() == at::kByte && mask->dim() == 1 && mask->sym_size(0) == bytes,
                "expected mask to be ", bytes, " elements of Byte, but got ", size_text(*mask), " of ",
                c10::toString(mask->scalar_type()));
    require_same_device("mask", *mask, x);
  }
  TORCH_CHECK(!dresidual || (activation && (present(residual) || present(mask))),
              "expected dresidual only with an activation and a residual: it is dy otherwise");
}

// Of batch_norm_. The parameter is rounded to what x is computed in, where little of it may be left.
inline void require_invertible(const ActivationSpec& activation, at::ScalarType x) {
  const bool wide = x == at::kDouble;
  const double param = wide ? activation.param : static_cast<float>(activation.param);
  TORCH_CHECK_VALUE(
      is_invertible(activation.kind, param),
      "inplace=True keeps the output alone, so backward has to recover the input from it: expected "
      "activation None, leaky_relu or elu, with a positive parameter, but got ",
      activation ? activation_name(activation.kind) : "None",
      activation_entry(activation.kind).takes_parameter ? " with " + python_repr(activation.param)
                                                        : std::string(),
      activation.kind == Activation::relu
          ? " (what relu sets to 0 is lost; leaky_relu with a small slope is the usual choice)"
          : "");
}

// Of batch_norm_ before a backward. Only asked on the CPU: elsewhere it would wait for the device.
inline void require_recoverable(const std::optional<at::Tensor>& weight) {
  if (!present(weight) || !weight->is_cpu() || weight->all().item<bool>()) return;
  TORCH_CHECK(false, "inplace=True recovers the input from the output, but the weight of channel ",
              weight->view(-1).ne(0).to(at::kInt).argmin().item<int64_t>(),
              " is 0: expected weights other than 0");
}

inline void require_per_channel(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.scalar_type() == at::kDouble, "expected ", name, " of dtype Double, but got ",
              c10::toString(t.scalar_type()));
  require_same_device(name, t, x);
}

inline void require_statistics(const at::Tensor& stats, const at::Tensor& x) {
  TORCH_CHECK(stats.dim() == 2 && (stats.sym_size(0) == kStatisticsRows || stats.sym_size(0) == kKeptRows) &&
                  stats.sym_size(1) == x.sym_size(1),
              "expected stats of size torch.Size([", kStatisticsRows, ", ", x.sym_size(1),
              "]) or torch.Size([", kKeptRows, ", ", x.sym_size(1), "]), but got ", size_text(stats));
  require_per_channel("stats", stats, x);
}

// For normalize.
inline void require_moments(const at::Tensor& moments, const at::Tensor& x) {
  TORCH_CHECK(moments.dim() == 2 && moments.sym_size(0) == 2 && moments.sym_size(1) == x.sym_size(1),
              "expected moments of size torch.Size([2, ", x.sym_size(1), "]), but got ", size_text(moments));
  require_per_channel("moments", moments, x);
}

// Of grad_sums, for input_grad.
inline void require_sums(const at::Tensor& sums, const at::Tensor& x) {
  TORCH_CHECK(sums.dim() == 2 && sums.sym_size(0) == x.sym_size(1) && sums.sym_size(1) == 2,
              "expected sums of size torch.Size([", x.sym_size(1), ", 2]), but got ", size_text(sums));
  require_per_channel("sums", sums, x);
}

}  // namespace bnext
