// The operator called from Python without torch.ops' conversion of each argument.
#pragma once

#include <Python.h>

namespace bnext {

// bnext::batch_norm through the dispatcher, positional arguments in the schema's order; returns y. Returns
// None, and has done nothing, unless the arguments are just what the schema names (tensors: Tensor or
// Parameter, no subclass) and no one watches calls from Python (torch function modes, jit.trace): those are
// for torch.ops.
PyObject* batch_norm_direct(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace bnext
