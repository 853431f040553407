// Backward on a GPU, streaming: the kernels of grad_sums and input_grad, and their launches.
#include "cuda/input_grad.cuh"
#include "cuda/launch.h"
#include "cuda/launching.cuh"
#include "cuda/resident_launch.cuh"
#include "dispatch.h"

namespace bnext::cuda {
namespace {

constexpr char kName[] = "bnext::batch_norm_backward";

// Blocks of a multiprocessor that the registers of a planes kernel leave room for.
template <class T, Slope kSlope>
constexpr int kBlocks = 3 - int{is_found(kSlope)} - int{sizeof(T) == 8};
template <class T, Slope kSlope, Statistics kStatistics>
constexpr int kSumsBlocks = kStatistics == Statistics::fixed ? 2 : kBlocks<T, kSlope>;

template <class T, Slope kSlope, Statistics kStatistics>
BNEXT_KERNEL(384, 1)
grad_sums_rows_kernel(const BNEXT_PARAMETER BackwardParams p) {
  GradSumsReducer<T, kSlope, kStatistics> reducer{{p}};
  reduce_rows(p.reduction, reducer);
}

template <class T, Slope kSlope, Statistics kStatistics>
BNEXT_KERNEL(256, (kSumsBlocks<T, kSlope, kStatistics>))
grad_sums_planes_kernel(const BNEXT_PARAMETER BackwardParams p) {
  GradSumsReducer<T, kSlope, kStatistics> reducer{{p}};
  reduce_planes(p.reduction, reducer);
}

template <class T, Slope kSlope, Statistics kStatistics>
BNEXT_KERNEL(256, is_found(kSlope) ? 1 : 2)
input_grad_rows_kernel(const BNEXT_PARAMETER BackwardParams p) {
  wait_for_previous();
  InputGradMap<T, kSlope, kStatistics> map{{p}};
  map_rows(p.mapping, map);
}

template <class T, Slope kSlope, Statistics kStatistics>
BNEXT_KERNEL(256, (kBlocks<T, kSlope>))
input_grad_planes_kernel(const BNEXT_PARAMETER BackwardParams p) {
  wait_for_previous();
  InputGradMap<T, kSlope, kStatistics> map{{p}};
  map_planes(p.mapping, map);
}

template <class T, Slope kSlope, Statistics kStatistics>
void launch_all(const BackwardParams& p, const Plan& plan, void* stream) {
  if (plan.reduces) {
    const bool rows = plan.reduce.traversal == Traversal::rows;
    launch(kName,
           rows ? grad_sums_rows_kernel<T, kSlope, kStatistics>
                : grad_sums_planes_kernel<T, kSlope, kStatistics>,
           plan.reduce, reduce_memory<GradSumsReducer<T, kSlope, kStatistics>>(plan.reduce), stream, p);
  }
  if (plan.maps) {
    const bool rows = plan.map.traversal == Traversal::rows;
    launch(kName,
           rows ? input_grad_rows_kernel<T, kSlope, kStatistics>
                : input_grad_planes_kernel<T, kSlope, kStatistics>,
           plan.map, map_memory<InputGradMap<T, kSlope, kStatistics>>(plan.map), stream, p, plan.early_map);
  }
}

template <class T, Slope kSlope>
void launch_with(const BackwardParams& p, const Plan& plan, void* stream) {
  if (p.args.batch_statistics) {
    launch_all<T, kSlope, kBatch<kSlope>>(p, plan, stream);
  } else {
    launch_all<T, kSlope, kFixed<kSlope>>(p, plan, stream);
  }
}

// The channels' sums, from the reduce to the map. Given ones are not written to: then nothing is reduced.
Sums* totals_of(const BackwardArgs& args, const Workspace& workspace) {
  if (args.sums_in != nullptr) return const_cast<Sums*>(args.sums_in);
  return args.sums_out != nullptr ? args.sums_out : static_cast<Sums*>(workspace.scratch);
}

}  // namespace

bool aligned(const BackwardArgs& args) {
  return on_boundary(args.x) && on_boundary(args.dy) && on_boundary(args.residual) && on_boundary(args.dx) &&
         on_boundary(args.dresidual);
}

void backward(const BackwardArgs& args, const Plan& plan, const Workspace& workspace) {
  if (args.extent.numel() == 0) {
    const int64_t bytes = args.extent.channels * opmath_bytes(args.dtype);
    for (void* grads : {args.dweight, args.dbias}) {
      if (grads != nullptr) fill_zero(kName, grads, bytes, workspace.stream);
    }
    if (args.sums_out != nullptr)
      fill_zero(kName, args.sums_out, args.extent.channels * int64_t{sizeof(Sums)}, workspace.stream);
    return;
  }
  if (plan.engine == Engine::resident) return resident_backward(args, plan, workspace);
  const bool whole = aligned(args);
  const int lanes = lanes_of(args.dtype);
  BackwardParams p{args,
                   reduction_of(plan, lanes, whole, workspace),
                   {plan.extent, plan.map, whole && plan.map.whole_vectors(lanes)},
                   totals_of(args, workspace),
                   plan.streaming_stores ? Reuse::no : Reuse::yes};
  p.args.extent = plan.extent;
  dispatch(args.dtype, [&]<class T>() {
    const Slope slope = slope_of(args);
    if (slope == Slope::one) {
      launch_with<T, Slope::one>(p, plan, workspace.stream);
    } else if constexpr (sizeof(T) == 8) {
      launch_with<T, Slope::any>(p, plan, workspace.stream);  // of float64 one for both
    } else if (slope == Slope::mask) {
      launch_with<T, Slope::mask>(p, plan, workspace.stream);
    } else {
      launch_with<T, Slope::found>(p, plan, workspace.stream);
    }
  });
}

}  // namespace bnext::cuda
