// The table of contents: every operator's schema and implementations, and the Python module bnext._C, which
// carries what is not an operator.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/launch.h"
#include "cpu/memory.h"
#include "cpu/tiles.h"
#include "direct_call.h"
#include "ops.h"

#if !defined(BNEXT_CUDA_REASON)
#define BNEXT_CUDA_REASON "not decided by the build"
#endif

TORCH_LIBRARY(bnext, m) {
  // Batch normalization of x over all dimensions but 1. stats (2, C), float64: the mean and 1/sqrt(var + eps)
  // that y was normalised with. training: batch statistics, running ones are updated if given; momentum None:
  // cumulative average over num_batches_tracked. ndims: the ranks allowed, any from 2 if empty.
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, bool "
      "unbiased_running_var, "
      "int[] ndims) -> (Tensor y, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  // Its gradients, from the stats it returned. dweight and dbias are float32 (float64 for float64 x); those
  // not in output_mask are empty.
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor stats, bool training, bool[3] "
      "output_mask) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(bnext, CPU, m) {
  m.impl("batch_norm", bnext::batch_norm_cpu);
  m.impl("batch_norm_backward", bnext::batch_norm_backward_cpu);
}

TORCH_LIBRARY_IMPL(bnext, Meta, m) {
  m.impl("batch_norm", bnext::batch_norm_meta);
  m.impl("batch_norm_backward", bnext::batch_norm_backward_meta);
}

TORCH_LIBRARY_IMPL(bnext, Autograd, m) {
  m.impl("batch_norm", bnext::batch_norm_autograd);
  m.impl("batch_norm_backward", bnext::batch_norm_backward_autograd);
}

namespace {

namespace py = pybind11;
using bnext::Plan;

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
  info["private_cache"] = machine.private_cache;
  info["shared_cache"] = machine.shared_cache;
  info["cuda"] = false;
  info["cuda_reason"] = BNEXT_CUDA_REASON;
  return info;
}

bnext::Dtype dtype_named(const std::string& name) {
  if (name == "float32") return bnext::Dtype::float32;
  if (name == "float64") return bnext::Dtype::float64;
  if (name == "bfloat16") return bnext::Dtype::bfloat16;
  if (name == "float16") return bnext::Dtype::float16;
  throw py::value_error("expected dtype float32, float64, bfloat16 or float16, but got " + name);
}

Plan plan(const std::vector<int64_t>& shape, const std::string& dtype, const std::string& layout,
          bool training, bool backward, std::optional<int> threads) {
  if (shape.size() < 2) throw py::value_error("expected a shape of at least 2 dimensions");
  for (const int64_t size : shape) {
    if (size < 0) throw py::value_error("expected sizes of 0 and more in shape");
  }
  if (shape[1] == 0) throw py::value_error("expected at least one channel in shape");
  if (layout != "contiguous" && layout != "channels_last") {
    throw py::value_error("expected layout contiguous or channels_last, but got " + layout);
  }
  const int used = threads.value_or(at::get_num_threads());
  if (used < 1) throw py::value_error("expected at least 1 thread, but got " + std::to_string(used));
  const auto order = layout == "contiguous" ? bnext::Layout::contiguous : bnext::Layout::channels_last;
  const auto pass = backward ? (training ? bnext::Pass::backward : bnext::Pass::frozen_backward)
                             : (training ? bnext::Pass::forward : bnext::Pass::inference);
  return make_plan({bnext::extent_of(shape, order), dtype_named(dtype), pass}, bnext::cpu::machine(used));
}

std::string plan_text(const Plan& p) {
  auto number = [](const char* key, int64_t value) {
    return std::string(", ") + key + "=" + std::to_string(value);
  };
  return std::string("Plan(traversal='") + name(p.geometry.traversal) + "', schedule='" + name(p.schedule) +
         "'" + number("slabs", p.slabs) + number("slab_channels", p.slab_channels) +
         number("chunks", p.chunks) + number("threads", p.threads) + number("cache_bytes", p.cache_bytes) +
         number("bytes_moved", p.bytes_moved) + number("bytes_minimum", p.bytes_minimum) + ")";
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
  m.def("plan", plan, py::arg("shape"), py::arg("dtype"), py::arg("layout"), py::arg("training"),
        py::arg("backward"), py::arg("threads"));
  m.attr("batch_norm") = py::reinterpret_steal<py::object>(PyCFunction_New(&batch_norm_method, nullptr));
  py::class_<Plan>(m, "Plan")
      .def_property_readonly("traversal", [](const Plan& p) { return name(p.geometry.traversal); })
      .def_property_readonly("schedule", [](const Plan& p) { return name(p.schedule); })
      .def_readonly("slabs", &Plan::slabs)
      .def_readonly("slab_channels", &Plan::slab_channels)
      .def_readonly("chunks", &Plan::chunks)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("streaming_stores", &Plan::streaming_stores)
      .def_readonly("cache_bytes", &Plan::cache_bytes)
      .def_readonly("bytes_moved", &Plan::bytes_moved)
      .def_readonly("bytes_minimum", &Plan::bytes_minimum)
      .def("__repr__", plan_text);
}
