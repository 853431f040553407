// What a node keeps of a call, and gives back as it was.
#pragma once

#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "checks.h"
#include "ops.h"

namespace bnext {

using torch::autograd::SavedVariable;
using torch::autograd::Variable;

// What a parameter's gradient has to look like: any shape of C elements will do, in the input's dtype or
// float32.
struct Likeness {
  at::ScalarType dtype = at::ScalarType::Undefined;
  std::optional<c10::SymDimVector> sizes;  // of another shape than (C,)

  explicit Likeness(const OptionalTensor& parameter) {
    if (!present(parameter)) return;
    dtype = parameter->scalar_type();
    if (parameter->dim() != 1) sizes = parameter->sym_sizes();
  }
  explicit operator bool() const { return dtype != at::ScalarType::Undefined; }
  at::Tensor of(at::Tensor grad) const {
    if (grad.scalar_type() != dtype) grad = grad.to(dtype);
    return shaped(std::move(grad));
  }
  at::Tensor shaped(at::Tensor vector) const { return sizes ? vector.view_symint(*sizes) : vector; }
};

// Tensors of vmap, and what torch.func wraps.
inline bool is_transformed(const at::Tensor& t) {
  return t.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                           c10::DispatchKey::FuncTorchGradWrapper}));
}

// x beside a mask, whose bits lie in the order that x had: a hook may bring its values back in another.
class KeptInput {
 public:
  KeptInput() = default;
  KeptInput(const Variable& x, bool masked) : saved_(x, /*is_output=*/false) {
    if (masked && !is_transformed(x)) format_ = memory_format_of(x);
  }
  explicit KeptInput(SavedVariable output) : saved_(std::move(output)) {}

  template <class... Node>
  at::Tensor unpack(Node... node) const {
    at::Tensor x = saved_.unpack(std::move(node)...);
    return format_ && !is_transformed(x) ? x.contiguous(*format_) : x;
  }
  void reset_data() { saved_.reset_data(); }

 private:
  SavedVariable saved_;
  std::optional<at::MemoryFormat> format_;
};

// An activation that outlives the call.
struct SavedActivation {
  ActivationSpec spec;
  ActivationName name;  // of the table in activation.h
  std::optional<double> param;

  SavedActivation(ActivationName given, std::optional<double> given_param)
      : spec(require_activation(given, given_param)), param(given_param) {
    if (spec) name = activation_name(spec.kind);
  }
};

// A parameter as it was at the forward pass, in the graph where the parameter is.
class KeptParameter {
 public:
  Likeness like;

  // Under torch.func's transforms the outer levels have graphs of their own, in which only a copy stands; a
  // tangent, too, is in no row of stats.
  explicit KeptParameter(const OptionalTensor& parameter) : like(parameter) {
    if (!present(parameter)) return;
    const bool has_tangent = torch::autograd::isFwGradDefined(parameter);
    if (!has_tangent && !parameter->key_set().has(c10::DispatchKey::FuncTorchGradWrapper)) return;
    at::Tensor copy;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      copy = parameter->clone();
    }
    if (has_tangent) copy._set_fw_grad(parameter->_fw_grad(0), /*level=*/0, /*is_inplace_op=*/false);
    copy_ = SavedVariable(copy, /*is_output=*/false);
  }

  OptionalTensor unpack(const at::Tensor& stats, int64_t row, const torch::autograd::Edge& edge) const {
    if (!like) return std::nullopt;
    at::Tensor kept = copy_.unpack();
    if (!kept.defined()) {
      at::AutoDispatchBelowADInplaceOrView below;
      kept = like.shaped(stats.select(0, row));
    }
    if (edge.is_valid() && at::GradMode::is_enabled()) torch::autograd::impl::set_gradient_edge(kept, edge);
    return kept;
  }

  void reset() { copy_.reset_data(); }

 private:
  SavedVariable copy_;
};

}  // namespace bnext
