// From Python objects to the dispatcher in one step.
#include "direct_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "ops.h"

namespace bnext {
namespace {

// Each reads one argument and says whether it could.
bool read(PyObject* object, at::Tensor& tensor) {
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

bool read(PyObject* object, OptionalTensor& tensor) {
  return Py_IsNone(object) || (THPVariable_CheckExact(object) && (tensor = THPVariable_Unpack(object), true));
}

bool read(PyObject* object, bool& value) {
  value = object == Py_True;
  return PyBool_Check(object);
}

bool read(PyObject* object, double& value) {
  if (!PyFloat_CheckExact(object)) return false;
  value = PyFloat_AS_DOUBLE(object);
  return true;
}

bool read(PyObject* object, std::optional<double>& value) {
  return Py_IsNone(object) || read(object, value.emplace());
}

bool read(PyObject* object, ActivationName& name) {
  if (Py_IsNone(object)) return true;
  if (!PyUnicode_CheckExact(object)) return false;
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(object, &size);  // as long as the object lives
  if (text == nullptr) {
    PyErr_Clear();
    return false;
  }
  name.emplace(text, static_cast<size_t>(size));
  return true;
}

bool read(PyObject* object, c10::SmallVector<int64_t, 4>& values) {
  if (!PyTuple_CheckExact(object)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
    PyObject* item = PyTuple_GET_ITEM(object, i);
    if (!PyLong_CheckExact(item)) return false;
    int overflow = 0;
    values.push_back(PyLong_AsLongLongAndOverflow(item, &overflow));
    if (overflow != 0) return false;
  }
  return true;
}

// All of them, in order.
template <class... Values>
bool read_all(PyObject* const* args, Py_ssize_t count, Values&... values) {
  return count == Py_ssize_t{sizeof...(values)} && (read(*args++, values) && ...);
}

}  // namespace

PyObject* batch_norm_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  at::Tensor x;
  OptionalTensor residual, weight, bias, running_mean, running_var, num_batches_tracked;
  bool training = false, unbiased_running_var = false;
  std::optional<double> momentum;
  double eps = 0;
  c10::SmallVector<int64_t, 4> ndims;
  ActivationName activation;
  std::optional<double> activation_param;
  bool for_backward = false, skip_nonfinite = false;
  const bool direct = read_all(args, count, x, residual, weight, bias, running_mean, running_var,
                               num_batches_tracked, training, momentum, eps, unbiased_running_var, ndims,
                               activation, activation_param, for_backward, skip_nonfinite) &&
                      !at::impl::torch_function_mode_enabled() && !torch::jit::tracer::isTracing();
  if (!direct) Py_RETURN_NONE;
  at::Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    y = std::get<0>(forward_operator().call(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
        unbiased_running_var, ndims, activation, activation_param, for_backward, skip_nonfinite,
        /*keeps_input=*/true));
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

}  // namespace bnext
