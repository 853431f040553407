// Plans as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

namespace bnext {

void bind_plans(pybind11::module_& m);

}  // namespace bnext
