// The table of contents: every operator's schema and implementations, and the Python module bnext._C, which
// carries what is not an operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "build_config.h"  // written by setup.py
#include "calls.h"
#include "cpu/launch.h"
#include "cpu/memory.h"
#include "cpu/tiles.h"
#include "direct_call.h"
#include "ops.h"
#include "phases.h"
#include "plan_bindings.h"
#include "versions.h"

TORCH_LIBRARY(bnext, m) {
  // Batch normalization of x over all dimensions but 1. stats (2, C), float64: the mean and 1/sqrt(var + eps)
  // that y was normalised with; for_backward (4, C), the weight (or 1) and the bias (or 0) besides. training:
  // batch statistics, running ones are updated if given; momentum None: cumulative average over
  // num_batches_tracked. ndims: the ranks allowed, any from 2 if empty. residual: added before the
  // activation, which goes by its name in activation.h. for_backward: also the mask (see args.h) that an
  // activation with two slopes needs beside a residual, or where keeps_input is false and backward will have
  // no x; else mask is empty. Autograd sets both of what it differentiates. skip_nonfinite: where new running
  // statistics would not be finite the old ones stay.
  m.def(
      "batch_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "bool unbiased_running_var, int[] ndims, str? activation, float? activation_param, bool for_backward, "
      "bool skip_nonfinite=False, bool keeps_input=True) -> (Tensor y, Tensor stats, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // The same where it writes nothing, with the running statistics or in training without any: for graphs,
  // which take what a schema may write as written.
  m.def(
      "batch_norm_no_update(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, bool training, float eps, int[] ndims, str? activation, "
      "float? activation_param, bool for_backward, bool keeps_input=True) -> (Tensor y, Tensor stats, Tensor "
      "mask)",
      {at::Tag::pt2_compliant_tag});
  // batch_norm over x, with an activation that has an inverse. for_backward: refuses what a backward could
  // not recover x from.
  m.def(
      "batch_norm_(Tensor(d!) x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "bool unbiased_running_var, int[] ndims, str? activation, float? activation_param, bool for_backward, "
      "bool skip_nonfinite=False) -> Tensor stats",
      {at::Tag::pt2_compliant_tag});
  // Their gradients, from the stats they returned and the mask, or else from the activation's input, computed
  // again from x and residual. weight and bias may also be those of stats. from_output: x is what batch_norm_
  // wrote. dweight and dbias are float32 (float64 for float64 x); those not in output_mask are empty. Without
  // an activation dresidual would be dy.
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? "
      "bias, "
      "Tensor stats, bool training, str? activation, float? activation_param, bool from_output, "
      "bool[4] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
      {at::Tag::pt2_compliant_tag});
  // The phases of a training step one by one, for statistics of more than x, without derivatives.
  // moments (2, C), float64: mean and biased variance, 0 of an empty x. The other arguments are those of the
  // call that it begins: checked here, before one process waits for another. normalize: with the moments of
  // anything, as an inference. grad_sums (C, 2), float64: of dz, and of dz times x's distance from the mean
  // as x's arithmetic holds it; they may be added up over all that has the same stats, and dweight and dbias
  // are those of this x. input_grad: of such sums over n elements of a channel, times x's share of n.
  m.def(
      "moments(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, Tensor? num_batches_tracked, float eps, str? activation, "
      "float? activation_param) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "normalize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor moments, float eps, "
      "str? activation, float? activation_param, bool for_backward) -> (Tensor y, Tensor stats, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "grad_sums(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, "
      "Tensor stats, str? activation, float? activation_param) "
      "-> (Tensor sums, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "input_grad(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, "
      "Tensor stats, Tensor sums, str? activation, float? activation_param, bool[2] output_mask) "
      "-> (Tensor dx, Tensor dresidual)",
      {at::Tag::pt2_compliant_tag});
}

namespace {

// The same for every device that has an engine.
void implement_dense(torch::Library& m) {
  m.impl("moments", bnext::moments<bnext::moments_dense>);
  m.impl("normalize", bnext::normalize<bnext::forward_dense>);
  m.impl("grad_sums", bnext::grad_sums<bnext::grad_sums_dense>);
  m.impl("input_grad", bnext::input_grad<bnext::input_grad_dense>);
  m.impl("batch_norm", bnext::batch_norm<bnext::forward_dense>);
  m.impl("batch_norm_no_update", bnext::batch_norm_no_update<bnext::forward_dense>);
  m.impl("batch_norm_", bnext::batch_norm_inplace<bnext::inplace_dense>);
  m.impl("batch_norm_backward", bnext::batch_norm_backward<bnext::backward_dense>);
}

}  // namespace

TORCH_LIBRARY_IMPL(bnext, CPU, m) { implement_dense(m); }
TORCH_LIBRARY_IMPL(bnext, CUDA, m) { implement_dense(m); }

TORCH_LIBRARY_IMPL(bnext, Meta, m) {
  m.impl("moments", bnext::moments<bnext::moments_meta>);
  m.impl("normalize", bnext::normalize<bnext::forward_meta>);
  m.impl("grad_sums", bnext::grad_sums<bnext::grad_sums_meta>);
  m.impl("input_grad", bnext::input_grad<bnext::input_grad_meta>);
  m.impl("batch_norm", bnext::batch_norm<bnext::forward_meta>);
  m.impl("batch_norm_no_update", bnext::batch_norm_no_update<bnext::forward_meta>);
  m.impl("batch_norm_", bnext::batch_norm_inplace<bnext::inplace_meta>);
  m.impl("batch_norm_backward", bnext::batch_norm_backward<bnext::backward_meta>);
}

TORCH_LIBRARY_IMPL(bnext, ADInplaceOrView, m) {
  m.impl("batch_norm", bnext::BelowAutograd<bnext::ForwardSignature, bnext::forward_operator>::call);
  m.impl("batch_norm_", bnext::BelowAutograd<bnext::InplaceSignature, bnext::inplace_operator>::call);
}

TORCH_LIBRARY_IMPL(bnext, Autograd, m) {
  for (const char* phase : {"moments", "normalize", "grad_sums", "input_grad"})
    m.impl(phase, torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm", bnext::batch_norm_autograd);
  m.impl("batch_norm_no_update", bnext::batch_norm_no_update_autograd);
  m.impl("batch_norm_", bnext::batch_norm_inplace_autograd);
  m.impl("batch_norm_backward", bnext::batch_norm_backward_autograd);
}

namespace {

namespace py = pybind11;

py::dict build_info() {
  std::vector<std::string> compiled;
  for (int i = 0; i < bnext::cpu::kInstructionSetCount; ++i)
    compiled.push_back(bnext::cpu::kInstructionSets[i].name);
  const bnext::Machine machine = bnext::cpu::machine(1);
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["instruction_sets"] = compiled;
  info["instruction_set"] = bnext::cpu::instruction_set().name;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["first_cache"] = machine.first_cache;
  info["private_cache"] = machine.private_cache;
  info["shared_cache"] = machine.shared_cache;
  info["cache_of_host"] = machine.cache_of_host;
#if BNEXT_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_reason"] = BNEXT_CUDA_REASON;
  return info;
}

// What the operators say to an activation, for who wants to know before there is an input.
void check_activation(const std::optional<std::string>& name, std::optional<double> param, bool inplace) {
  const bnext::ActivationSpec spec =
      bnext::require_activation(name ? bnext::ActivationName(*name) : std::nullopt, param);
  if (inplace) bnext::require_invertible(spec, at::kDouble);  // in a narrower type a call may still refuse
}

// Their names but none's, those that `chosen` picks.
py::tuple activations(bool (*chosen)(bnext::Activation)) {
  py::list names;
  for (int k = 1; k < bnext::kActivationCount; ++k) {
    if (chosen(static_cast<bnext::Activation>(k))) names.append(bnext::kActivations[k].name);
  }
  return names;
}

PyMethodDef batch_norm_method = {
    "batch_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bnext::batch_norm_direct)),
    METH_FASTCALL, nullptr};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "bnext's compiled half. Importing it registers the operators torch.ops.bnext.*";
  m.def("build_info", build_info);
  m.def("empty_cache", bnext::cpu::empty_cache, py::call_guard<py::gil_scoped_release>());
  m.def("cached_bytes", bnext::cpu::cached_bytes);
  m.def("set_cache_limit", bnext::cpu::set_cache_limit, py::arg("bytes"));
  m.def("check_activation", check_activation, py::arg("activation"), py::arg("activation_param"),
        py::arg("inplace"));
  m.attr("ACTIVATIONS") = activations([](bnext::Activation) { return true; });
  m.attr("WITH_PARAMETER") =
      activations([](bnext::Activation kind) { return bnext::activation_entry(kind).takes_parameter; });
  m.attr("MASKED") = activations(bnext::is_masked);
  bnext::bind_plans(m);
  m.attr("batch_norm") = py::reinterpret_steal<py::object>(PyCFunction_New(&batch_norm_method, nullptr));
}
