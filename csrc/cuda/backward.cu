// Backward on a GPU: grad_sums and input_grad, their folds, and the launches.
#include "cuda/activations.cuh"
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

// Scale and offset of the activation's input, as the forward pass had them, around the held mean.
template <class T>
BNEXT_DEVICE NormalizeCoefficients<opmath_t<T>> activation_input(const BackwardArgs& args, int64_t c) {
  return normalize_coefficients<opmath_t<T>>(args.mean[c], args.invstd[c], read_channel(args.weight, c, 1),
                                             read_channel(args.bias, c, 0));
}

template <class T, bool kActive>
struct GradSumsReducer {
  using Storage = T;
  using Math = opmath_t<T>;
  using Center = std::conditional_t<kActive, NormalizeCoefficients<Math>, Math>;
  static constexpr int kInputs = 2, kVectors = !kActive ? 4 : sizeof(T) == 8 ? 1 : 2;

  const BackwardParams& p;

  BNEXT_DEVICE Input<T> input(int i) const {
    return {static_cast<const T*>(i == 0 ? p.args.x : p.args.dy), p.args.extent.numel()};
  }

  BNEXT_DEVICE Center center(int64_t c) const {
    if constexpr (kActive) {
      return activation_input<T>(p.args, c);
    } else {
      return held_mean<T>(p.args, c);
    }
  }

  struct Centers {
    Center values[kLanes<T>];

    BNEXT_DEVICE void set(int lane, const Center& center) { values[lane] = center; }
    BNEXT_DEVICE const Center& at(int lane) const { return values[lane]; }
    BNEXT_DEVICE Vector16 fill() const { return {}; }
  };

  template <int kCount>
  BNEXT_DEVICE void add(Sums& sums, const Math (&values)[kInputs][kCount], const Center& center) const {
    Math dz[kCount], terms[kCount], subtracted;
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) dz[k] = values[1][k];
    if constexpr (kActive) {
      subtracted = center.center;
      Math z[kCount];
      BNEXT_UNROLL
      for (int k = 0; k < kCount; ++k) {
        z[k] = normalize<Math>(values[0][k], center.center, center.scale, center.offset);
      }
      activation_grad_all(p.args.activation, dz, z);
    } else {
      subtracted = center;
    }
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) terms[k] = dz[k] * (values[0][k] - subtracted);
    sums += {double{sum_of<kCount>(dz)}, double{sum_of<kCount>(terms)}};
  }

  BNEXT_DEVICE void fold(int64_t c, const Sums& sums) const {
    const BackwardArgs& a = p.args;
    const ParameterGrads grads =
        parameter_grads(sums, a.mean[c], static_cast<double>(held_mean<T>(a, c)), a.invstd[c]);
    if (a.dweight != nullptr) store(static_cast<Math*>(a.dweight) + c, static_cast<Math>(grads.dweight));
    if (a.dbias != nullptr) store(static_cast<Math*>(a.dbias) + c, static_cast<Math>(grads.dbias));
    p.totals[c] = sums;
  }
};

// Coefficients: scale; center; with an activation scale and offset of its input; slope and offset. Fixed
// statistics have no slope and no offset, and without an activation they do not read x.
template <class T, bool kActive, bool kFixed>
struct InputGradMap {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr bool kReadsX = kActive || !kFixed;
  static constexpr int kRest = kActive ? 4 : 2;
  static constexpr int kInputs = kReadsX ? 2 : 1;
  static constexpr int kCoefficients = kFixed ? (kActive ? 4 : 1) : kRest + 2;

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
    if constexpr (kReadsX) values[1] = found.center;
    if constexpr (kActive) {
      const auto z = activation_input<T>(a, c);
      values[2] = z.scale;
      values[3] = z.offset;
    }
    if constexpr (!kFixed) {
      values[kRest] = found.slope;
      values[kRest + 1] = found.offset;
    }
  }

  template <class Coefficient>
  BNEXT_DEVICE void values(const Math (&in)[kInputs][kLanes<T>], Coefficient c,
                           Math (&out)[kLanes<T>]) const {
    constexpr int kCount = kLanes<T>;
    Math dz[kCount];
    BNEXT_UNROLL
    for (int l = 0; l < kCount; ++l) dz[l] = in[0][l];
    if constexpr (kActive) {
      Math z[kCount];
      BNEXT_UNROLL
      for (int l = 0; l < kCount; ++l) z[l] = normalize<Math>(in[1][l], c(1, l), c(2, l), c(3, l));
      activation_grad_all(p.args.activation, dz, z);
    }
    BNEXT_UNROLL
    for (int l = 0; l < kCount; ++l) {
      if constexpr (kFixed) {
        out[l] = fixed_input_grad(dz[l], c(0, l));
      } else {
        out[l] = input_grad<Math>(dz[l], in[1][l], c(0, l), c(1, l), c(kRest, l), c(kRest + 1, l));
      }
    }
  }
};

// Blocks of a multiprocessor that the registers of a planes kernel leave room for.
template <class T, bool kActive>
constexpr int kBlocks = 3 - int{kActive} - int{sizeof(T) == 8};

template <class T, bool kActive>
BNEXT_KERNEL(384, 1)
grad_sums_rows_kernel(const BNEXT_PARAMETER BackwardParams p) {
  GradSumsReducer<T, kActive> reducer{p};
  reduce_rows(p.reduction, reducer);
}

template <class T, bool kActive>
BNEXT_KERNEL(256, (kBlocks<T, kActive>))
grad_sums_planes_kernel(const BNEXT_PARAMETER BackwardParams p) {
  GradSumsReducer<T, kActive> reducer{p};
  reduce_planes(p.reduction, reducer);
}

template <class T, bool kActive, bool kFixed>
BNEXT_KERNEL(256, kActive ? 1 : 2)
input_grad_rows_kernel(const BNEXT_PARAMETER BackwardParams p) {
  InputGradMap<T, kActive, kFixed> map{p};
  map_rows(p.mapping, map);
}

template <class T, bool kActive, bool kFixed>
BNEXT_KERNEL(256, (kBlocks<T, kActive>))
input_grad_planes_kernel(const BNEXT_PARAMETER BackwardParams p) {
  InputGradMap<T, kActive, kFixed> map{p};
  map_planes(p.mapping, map);
}

template <class T, bool kActive>
void launch_sums(const BackwardParams& p, const Plan& plan, void* stream) {
  const bool rows = plan.reduce.traversal == Traversal::rows;
  launch(kName, rows ? grad_sums_rows_kernel<T, kActive> : grad_sums_planes_kernel<T, kActive>, plan.reduce,
         reduce_memory<GradSumsReducer<T, kActive>>(plan.reduce), stream, p);
}

template <class T, bool kActive, bool kFixed>
void launch_map(const BackwardParams& p, const Plan& plan, void* stream) {
  const bool rows = plan.map.traversal == Traversal::rows;
  launch(kName,
         rows ? input_grad_rows_kernel<T, kActive, kFixed> : input_grad_planes_kernel<T, kActive, kFixed>,
         plan.map, map_memory<InputGradMap<T, kActive, kFixed>>(plan.map), stream, p);
}

template <class T, bool kActive>
void launch_all(const BackwardParams& p, const Plan& plan, void* stream) {
  const BackwardArgs& a = p.args;
  if (a.dweight != nullptr || a.dbias != nullptr || (a.batch_statistics && a.dx != nullptr)) {
    launch_sums<T, kActive>(p, plan, stream);
  }
  if (a.dx == nullptr) return;
  if (a.batch_statistics) {
    launch_map<T, kActive, false>(p, plan, stream);
  } else {
    launch_map<T, kActive, true>(p, plan, stream);
  }
}

}  // namespace

bool aligned(const BackwardArgs& args) {
  return on_boundary(args.x) && on_boundary(args.dy) && on_boundary(args.dx);
}

void backward(const BackwardArgs& args, const Plan& plan, const Workspace& workspace) {
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
  dispatch(args.dtype, [&]<class T>() {
    if (args.activation) {
      launch_all<T, true>(p, plan, workspace.stream);
    } else {
      launch_all<T, false>(p, plan, workspace.stream);
    }
  });
}

}  // namespace bnext::cuda
