// What autograd has to know of the tensors that a call writes: their versions, and that it is they
// themselves.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>

#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <utility>

#include "checks.h"
#include "ops.h"

namespace bnext {

inline void bump_versions(std::initializer_list<OptionalTensor> written) {
  for (const OptionalTensor& t : written) {
    if (present(t) && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
  }
}

// Elements of a view like complex.conj().imag are negated when they are read, by whom but the kernels.
inline void require_own_elements(const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!present(t) || !t->is_neg(), name,
              " may be written in place, but elements of this view are negated when they are read: expected ",
              name, ".resolve_neg()");
}

// In inference mode autograd's kernel of an operator is passed by, and this one called, as for torch's own:
// a tensor that an earlier graph keeps may be written there too.
template <class Signature, const c10::TypedOperatorHandle<Signature>& (*kOperator)()>
struct BelowAutograd;

template <class Result, class... Arguments,
          const c10::TypedOperatorHandle<Result(Arguments...)>& (*kOperator)()>
struct BelowAutograd<Result(Arguments...), kOperator> {
  static Result call(Arguments... arguments) {
    constexpr bool kOverInput = std::is_same_v<Result(Arguments...), InplaceSignature>;
    constexpr int kMean = kOverInput ? 3 : 4;  // the first of running_mean, running_var, counter, training
    const auto all = std::forward_as_tuple(arguments...);
    const OptionalTensor& mean = std::get<kMean>(all);
    const OptionalTensor& var = std::get<kMean + 1>(all);
    const OptionalTensor& counter = std::get<kMean + 2>(all);
    const bool training = std::get<kMean + 3>(all);
    if (kOverInput) require_own_elements("input", std::get<0>(all));
    require_own_elements("running_mean", mean);
    require_own_elements("running_var", var);
    Result result = [&] {
      at::AutoDispatchBelowADInplaceOrView below;
      return kOperator().call(std::forward<Arguments>(arguments)...);
    }();
    if (kOverInput) bump_versions({std::get<0>(all)});
    if (training) bump_versions({mean, var, counter});
    return result;
  }
};

}  // namespace bnext
