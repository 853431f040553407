// Backward on a GPU: grad_sums and input_grad, their folds, and the launches.
#include "cuda/launch.h"
#include "cuda/launching.cuh"
#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "dispatch.h"

namespace bnext::cuda {
namespace {

constexpr char kName[] = "bnext::batch_norm_backward";

struct BackwardParams {
  BackwardArgs args;
  Reduction reduction;
  Mapping mapping;
  Sums* totals;  // [channel], from the reduce to the map
  Reuse output_reuse;
};

// The mean as far as arithmetic precision holds it; what it lacks comes in after the sums.
template <class T>
BNEXT_DEVICE opmath_t<T> held_mean(const BackwardArgs& args, int64_t c) {
  return static_cast<opmath_t<T>>(args.mean[c]);
}

template <class T>
struct GradSumsReducer {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr int kInputs = 2, kVectors = 4;

  const BackwardParams& p;

  BNEXT_DEVICE Input<T> input(int i) const {
    return {static_cast<const T*>(i == 0 ? p.args.x : p.args.dy), p.args.extent.numel()};
  }

  BNEXT_DEVICE Math center(int64_t c) const { return held_mean<T>(p.args, c); }

  struct Centers {
    Math values[kLanes<T>];

    BNEXT_DEVICE void set(int lane, Math center) { values[lane] = center; }
    BNEXT_DEVICE Math at(int lane) const { return values[lane]; }
    BNEXT_DEVICE Vector16 fill() const { return {}; }
  };

  template <int kCount>
  BNEXT_DEVICE void add(Sums& sums, const Math (&values)[kInputs][kCount], Math center) const {
    Math terms[kCount];
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) terms[k] = values[1][k] * (values[0][k] - center);
    sums += {double{sum_of<kCount>(values[1])}, double{sum_of<kCount>(terms)}};
  }

  BNEXT_DEVICE void fold(int64_t c, const Sums& sums) const {
    const BackwardArgs& a = p.args;
    const ParameterGrads grads =
        parameter_grads(sums, a.mean[c], static_cast<double>(center(c)), a.invstd[c]);
    if (a.dweight != nullptr) store(static_cast<Math*>(a.dweight) + c, static_cast<Math>(grads.dweight));
    if (a.dbias != nullptr) store(static_cast<Math*>(a.dbias) + c, static_cast<Math>(grads.dbias));
    p.totals[c] = sums;
  }
};

// kFixed: the statistics do not depend on x, which is not read.
template <class T, bool kFixed>
struct InputGradMap {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr int kInputs = kFixed ? 1 : 2, kCoefficients = kFixed ? 1 : 4;

  const BackwardParams& p;

  BNEXT_DEVICE Input<T> input(int i) const {
    return {static_cast<const T*>(i == 0 ? p.args.dy : p.args.x), p.args.extent.numel()};
  }
  BNEXT_DEVICE Output<T> output() const {
    return {static_cast<T*>(p.args.dx), p.args.extent.numel(), p.output_reuse};
  }

  BNEXT_DEVICE void coefficients(int64_t c, bool, Math (&values)[kCoefficients]) const {
    const BackwardArgs& a = p.args;
    const auto found = input_grad_coefficients<Math>(
        kFixed ? Sums{} : p.totals[c], a.mean[c], static_cast<double>(held_mean<T>(a, c)), a.invstd[c],
        read_channel(a.weight, c, 1), 1 / static_cast<double>(a.extent.count()));
    values[0] = found.scale;
    if constexpr (!kFixed) {
      values[1] = found.center;
      values[2] = found.slope;
      values[3] = found.offset;
    }
  }

  template <class Coefficient>
  BNEXT_DEVICE Math value(const Math (&values)[kInputs], Coefficient c) const {
    if constexpr (kFixed) {
      return fixed_input_grad(values[0], c(0));
    } else {
      return input_grad<Math>(values[0], values[1], c(0), c(1), c(2), c(3));
    }
  }
};

template <class T>
BNEXT_KERNEL(512, 1)
grad_sums_rows_kernel(const BNEXT_PARAMETER BackwardParams p) {
  GradSumsReducer<T> reducer{p};
  reduce_rows(p.reduction, reducer);
}

template <class T>
BNEXT_KERNEL(256, 3)
grad_sums_planes_kernel(const BNEXT_PARAMETER BackwardParams p) {
  GradSumsReducer<T> reducer{p};
  reduce_planes(p.reduction, reducer);
}

template <class T, bool kFixed>
BNEXT_KERNEL(256, 2)
input_grad_rows_kernel(const BNEXT_PARAMETER BackwardParams p) {
  InputGradMap<T, kFixed> map{p};
  map_rows(p.mapping, map);
}

template <class T, bool kFixed>
BNEXT_KERNEL(256, 3)
input_grad_planes_kernel(const BNEXT_PARAMETER BackwardParams p) {
  InputGradMap<T, kFixed> map{p};
  map_planes(p.mapping, map);
}

template <class T, bool kFixed>
void launch_map(const BackwardParams& p, const Plan& plan, void* stream) {
  const bool rows = plan.map.traversal == Traversal::rows;
  launch(kName, rows ? input_grad_rows_kernel<T, kFixed> : input_grad_planes_kernel<T, kFixed>, plan.map,
         map_memory(plan.map, kLanes<T>, InputGradMap<T, kFixed>::kCoefficients), stream, p);
}

}  // namespace

bool aligned(const BackwardArgs& args) {
  return on_boundary(args.x) && on_boundary(args.dy) && on_boundary(args.dx);
}

void backward(const BackwardArgs& args, const Plan& plan, const Workspace& workspace) {
  const bool sums_wanted = args.dweight != nullptr || args.dbias != nullptr;
  if (args.extent.numel() == 0) {
    const int64_t bytes = args.extent.channels * (args.dtype == Dtype::float64 ? 8 : 4);
    for (void* grads : {args.dweight, args.dbias}) {
      if (grads != nullptr) fill_zero(kName, grads, bytes, workspace.stream);
    }
    return;
  }
  const bool whole = aligned(args);
  const int lanes = static_cast<int>(16 / size_of(args.dtype));
  BackwardParams p{args,
                   reduction_of(plan, lanes, whole, workspace),
                   {plan.extent, plan.map, whole && whole_vectors(plan.map, lanes)},
                   static_cast<Sums*>(workspace.scratch),
                   plan.streaming_stores ? Reuse::no : Reuse::yes};
  p.args.extent = plan.extent;
  const bool rows = plan.map.traversal == Traversal::rows;
  dispatch(args.dtype, [&]<class T>() {
    if (sums_wanted || (args.batch_statistics && args.dx != nullptr)) {
      launch(kName, rows ? grad_sums_rows_kernel<T> : grad_sums_planes_kernel<T>, plan.reduce,
             reduce_memory(plan.reduce, lanes), workspace.stream, p);
    }
    if (args.dx == nullptr) return;
    if (args.batch_statistics) {
      launch_map<T, false>(p, plan, workspace.stream);
    } else {
      launch_map<T, true>(p, plan, workspace.stream);
    }
  });
}

}  // namespace bnext::cuda
