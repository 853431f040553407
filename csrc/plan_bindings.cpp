// The classes Plan, CudaPlan and CudaDevice of bnext._C, and the functions that make them.
#include "plan_bindings.h"

#include <ATen/Parallel.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"  // written by setup.py
#include "checks.h"
#include "cpu/launch.h"
#include "cuda/launch.h"
#include "engine_cuda.h"
#include "ops.h"
#include "plan_cuda.h"

namespace bnext {
namespace {

namespace py = pybind11;

constexpr int64_t kMostElements = (int64_t{1} << 48) - 1;  // more than machines address: bytes stay 64-bit

Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw py::value_error("expected dtype float32, float64, bfloat16 or float16, but got " + name);
}

// A forward pass with the batch's statistics, or of a frozen layer, is one of training: it leaves the mask
// that backward reads.
Problem problem_of(const std::vector<int64_t>& shape, const std::string& dtype, bool channels_last,
                   bool training, bool backward, bool residual, const ActivationName& activation,
                   bool frozen) {
  if (training && frozen) throw py::value_error("expected frozen=True with training=False only");
  if (shape.size() < 2) throw py::value_error("expected a shape of at least 2 dimensions");
  int64_t numel = 1;
  bool too_many = false;
  for (const int64_t size : shape) {
    if (size < 0) throw py::value_error("expected sizes of 0 and more in shape");
    too_many |= __builtin_mul_overflow(numel, size, &numel);
  }
  if (shape[1] == 0) throw py::value_error("expected at least one channel in shape");
  if (too_many || numel > kMostElements) {
    throw py::value_error(
        c10::str("expected fewer than 2^48 elements, but got shape ", at::IntArrayRef(shape)));
  }
  const auto pass = backward ? (training ? Pass::backward : Pass::frozen_backward)
                             : (training ? Pass::forward : Pass::inference);
  const Activation kind = require_activation(activation, std::nullopt).kind;
  const bool mask = is_masked(kind) && (frozen || (residual && (training || backward)));
  const bool read = residual && (!backward || (kind != Activation::none && !mask));
  const bool dresidual = residual && backward && kind != Activation::none;
  Problem problem(extent_of(shape, channels_last), dtype_named(dtype), pass, read, mask, dresidual);
  problem.sums = !frozen;
  problem.needs_input = kind != Activation::none && !mask;
  return problem;
}

Plan cpu_plan(const std::vector<int64_t>& shape, const std::string& dtype, bool channels_last, bool training,
              bool backward, std::optional<int> threads, bool residual, std::optional<std::string> activation,
              bool frozen) {
  const int used = threads.value_or(at::get_num_threads());
  if (used < 1) throw py::value_error("expected at least 1 thread, but got " + std::to_string(used));
  return make_plan(problem_of(shape, dtype, channels_last, training, backward, residual, activation, frozen),
                   cpu::machine(used));
}

cuda::Plan cuda_plan(const std::vector<int64_t>& shape, const std::string& dtype, bool channels_last,
                     bool training, bool backward, const cuda::Device& device, bool residual,
                     std::optional<std::string> activation, bool frozen, const std::string& engine) {
  return cuda::make_plan(
      problem_of(shape, dtype, channels_last, training, backward, residual, activation, frozen), device, true,
      cuda::choice_named(engine));
}

cuda::Device described(int multiprocessors, double bandwidth, int64_t l2, int64_t shared_memory,
                       int block_threads, std::optional<int64_t> multiprocessor_memory,
                       int spare_multiprocessors, int cluster_blocks, bool bulk_copies, bool early_launches) {
  constexpr int64_t beside = 1 << 10;  // of a block's own
  const int64_t memory = multiprocessor_memory.value_or(shared_memory + beside);
  const auto require = [](bool good, const char* what) {
    if (!good) throw py::value_error(std::string("expected ") + what);
  };
  require(multiprocessors > 0, "at least 1 multiprocessor");
  require(bandwidth > 0, "bandwidth in bytes per second, above 0");
  require(l2 >= 0, "l2 in bytes, 0 or more");
  require(shared_memory >= 48 << 10, "shared_memory of a block in bytes, 49152 or more");
  require(block_threads >= 64 && block_threads % 32 == 0, "block_threads in whole warps of 32, at least 2");
  require(memory >= shared_memory, "multiprocessor_memory in bytes, no less than shared_memory");
  require(spare_multiprocessors >= 0 && spare_multiprocessors < multiprocessors,
          "spare_multiprocessors from 0 to fewer than all");
  require(cluster_blocks >= 1 && cluster_blocks <= 8, "cluster_blocks from 1 (no clusters) to 8");
  return {multiprocessors, block_threads,         shared_memory,  l2,          bandwidth,
          memory,          spare_multiprocessors, cluster_blocks, bulk_copies, early_launches};
}

cuda::Device real_device(int index) {
#if BNEXT_CUDA && BNEXT_TORCH_CUDA
  return cuda::device(index);
#else
  require_cuda_engine(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)));
  return {};
#endif
}

// "Name(key=value, ...)" with strings in quotes.
template <class... Pairs>
std::string text(const char* type, const Pairs&... pairs) {
  std::ostringstream out;
  const char* separator = "";
  out << type << '(';
  ((out << separator << pairs.first << '=' << pairs.second, separator = ", "), ...);
  out << ')';
  return out.str();
}

template <class V>
std::pair<const char*, V> field(const char* key, V value) {
  return {key, value};
}
std::pair<const char*, std::string> field(const char* key, bool value) {
  return {key, value ? "True" : "False"};
}
std::pair<const char*, std::string> field(const char* key, const char* value) {
  return {key, std::string("\'") + value + "\'"};
}

std::string plan_text(const Plan& p) {
  return text("Plan", field("traversal", name(p.geometry.traversal)), field("schedule", name(p.schedule)),
              field("slabs", p.slabs), field("slab_channels", p.slab_channels), field("chunks", p.chunks),
              field("threads", p.threads), field("cache_bytes", p.cache_bytes),
              field("bytes_moved", p.bytes_moved), field("bytes_minimum", p.bytes_minimum));
}

std::string cuda_plan_text(const cuda::Plan& p) {
  return text("CudaPlan", field("engine", name(p.engine)), field("why", p.why),
              field("traversal", name(p.map.traversal)), field("launches", p.launches()),
              field("reduce_blocks", p.reduce_blocks()), field("map_blocks", p.map.blocks()),
              field("cluster", p.cluster), field("bulk_copies", p.bulk_copies),
              field("early_map", p.early_map), field("bytes_moved", p.bytes_moved),
              field("bytes_minimum", p.bytes_minimum), field("floor_seconds", p.floor_seconds));
}

std::string device_text(const cuda::Device& d) {
  return text(
      "CudaDevice", field("multiprocessors", d.multiprocessors), field("bandwidth", d.bandwidth),
      field("l2", d.l2), field("shared_memory", d.shared_memory), field("block_threads", d.block_threads),
      field("multiprocessor_memory", d.multiprocessor_memory),
      field("spare_multiprocessors", d.spare_multiprocessors), field("cluster_blocks", d.cluster_blocks),
      field("bulk_copies", d.bulk_copies), field("early_launches", d.early_launches));
}

}  // namespace

void bind_plans(py::module_& m) {
  py::class_<Plan>(m, "Plan")
      .def_property_readonly("traversal", [](const Plan& p) { return name(p.geometry.traversal); })
      .def_property_readonly("schedule", [](const Plan& p) { return name(p.schedule); })
      .def_readonly("slabs", &Plan::slabs)
      .def_readonly("slab_channels", &Plan::slab_channels)
      .def_readonly("chunks", &Plan::chunks)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("beyond_cache", &Plan::beyond_cache)
      .def_readonly("streaming_stores", &Plan::streaming_stores)
      .def_readonly("dresidual_first", &Plan::dresidual_first)
      .def_readonly("cache_bytes", &Plan::cache_bytes)
      .def_readonly("bytes_moved", &Plan::bytes_moved)
      .def_readonly("bytes_minimum", &Plan::bytes_minimum)
      .def("__repr__", plan_text);
  py::class_<cuda::Device>(m, "CudaDevice")
      .def(py::init(&described), py::arg("multiprocessors"), py::arg("bandwidth"), py::arg("l2"),
           py::arg("shared_memory") = int64_t{48 << 10}, py::arg("block_threads") = 1024,
           py::arg("multiprocessor_memory") = py::none(), py::arg("spare_multiprocessors") = 0,
           py::arg("cluster_blocks") = 1, py::arg("bulk_copies") = false, py::arg("early_launches") = false)
      .def_readonly("multiprocessors", &cuda::Device::multiprocessors)
      .def_readonly("bandwidth", &cuda::Device::bandwidth)
      .def_readonly("l2", &cuda::Device::l2)
      .def_readonly("shared_memory", &cuda::Device::shared_memory)
      .def_readonly("block_threads", &cuda::Device::block_threads)
      .def_readonly("multiprocessor_memory", &cuda::Device::multiprocessor_memory)
      .def_readonly("spare_multiprocessors", &cuda::Device::spare_multiprocessors)
      .def_readonly("cluster_blocks", &cuda::Device::cluster_blocks)
      .def_readonly("bulk_copies", &cuda::Device::bulk_copies)
      .def_readonly("early_launches", &cuda::Device::early_launches)
      .def("__repr__", device_text);
  py::class_<cuda::Plan>(m, "CudaPlan")
      .def_property_readonly("engine", [](const cuda::Plan& p) { return name(p.engine); })
      .def_property_readonly("traversal", [](const cuda::Plan& p) { return name(p.map.traversal); })
      .def_property_readonly("launches", &cuda::Plan::launches)
      .def_property_readonly("why", [](const cuda::Plan& p) { return p.why; })
      .def_property_readonly("reduce_blocks", &cuda::Plan::reduce_blocks)
      .def_readonly("waiting_blocks", &cuda::Plan::waiting_blocks)
      .def_readonly("cluster", &cuda::Plan::cluster)
      .def_readonly("bulk_copies", &cuda::Plan::bulk_copies)
      .def_readonly("early_map", &cuda::Plan::early_map)
      .def_readonly("block_memory", &cuda::Plan::block_memory)
      .def_property_readonly("reduce_threads", [](const cuda::Plan& p) { return p.reduce.threads; })
      .def_property_readonly("map_blocks", [](const cuda::Plan& p) { return p.map.blocks(); })
      .def_property_readonly("map_threads", [](const cuda::Plan& p) { return p.map.threads; })
      .def_readonly("scratch_bytes", &cuda::Plan::scratch_bytes)
      .def_readonly("streaming_stores", &cuda::Plan::streaming_stores)
      .def_readonly("bytes_moved", &cuda::Plan::bytes_moved)
      .def_readonly("bytes_minimum", &cuda::Plan::bytes_minimum)
      .def_readonly("floor_seconds", &cuda::Plan::floor_seconds)
      .def("__repr__", cuda_plan_text);
  m.def("plan", cpu_plan, py::arg("shape"), py::arg("dtype"), py::arg("channels_last"), py::arg("training"),
        py::arg("backward"), py::arg("threads"), py::arg("residual"), py::arg("activation"),
        py::arg("frozen"));
  m.def("cuda_plan", cuda_plan, py::arg("shape"), py::arg("dtype"), py::arg("channels_last"),
        py::arg("training"), py::arg("backward"), py::arg("device"), py::arg("residual"),
        py::arg("activation"), py::arg("frozen"), py::arg("engine"));
  m.def("cuda_device", real_device, py::arg("index"));
}

}  // namespace bnext
