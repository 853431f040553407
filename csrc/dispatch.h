// Run-time enums to template arguments, once for both devices.
#pragma once

#include "storage.h"

namespace bnext {

// f.operator()<T>() for the storage type T of dtype.
template <class F>
BNEXT_HOST_DEVICE decltype(auto) dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float64:
      return f.template operator()<double>();
    case Dtype::bfloat16:
      return f.template operator()<bf16>();
    case Dtype::float16:
      return f.template operator()<f16>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace bnext
