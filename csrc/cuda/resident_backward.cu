// Backward on a GPU, resident: grad_sums and input_grad in one kernel, and its launch.
#include "cuda/input_grad.cuh"
#include "cuda/launch.h"
#include "cuda/resident_launch.cuh"
#include "dispatch.h"

namespace bnext::cuda {
namespace {

constexpr char kName[] = "bnext::batch_norm_backward";

using Params = ResidentParams<BackwardParams>;

template <class T, Traversal kTraversal, Slope kSlope>
BNEXT_KERNEL(256, 2)
batch_norm_backward_resident_kernel(const BNEXT_PARAMETER Params params) {
  resident<kTraversal>(params.resident, GradSumsReducer<T, kSlope, Statistics::batch>{{params.p}},
                       InputGradMap<T, kSlope, Statistics::batch>{{params.p}});
}

// f(kernel) for the one of a call.
template <class F>
auto with_kernel(const BackwardArgs& args, const Plan& plan, F f) {
  const bool rows = plan.reduce.traversal == Traversal::rows;
  return dispatch_kept(args.dtype, [&]<class T>() {
    const auto with_slope = [&]<Slope kSlope>() {
      return f(rows ? batch_norm_backward_resident_kernel<T, Traversal::rows, kSlope>
                    : batch_norm_backward_resident_kernel<T, Traversal::planes, kSlope>);
    };
    switch (slope_of(args)) {
      case Slope::mask:
        return with_slope.template operator()<Slope::mask>();
      case Slope::found:
        return with_slope.template operator()<Slope::found>();
      default:
        return with_slope.template operator()<Slope::one>();
    }
  });
}

}  // namespace

bool can_run(const BackwardArgs& args, const Plan& plan) {
  return plan.engine != Engine::resident ||
         with_kernel(args, plan, [&](auto kernel) { return can_launch(kName, kernel, plan); });
}

void resident_backward(const BackwardArgs& args, const Plan& plan, const Workspace& workspace) {
  const int lanes = lanes_of(args.dtype);
  const Resident resident = resident_of(plan, lanes, args.residual != nullptr ? 3 : 2, args.dx,
                                        {args.x, args.dy, args.residual, args.dresidual}, workspace);
  Params params{{args, {}, {}, nullptr, plan.streaming_stores ? Reuse::no : Reuse::yes}, resident};
  params.p.args.extent = plan.extent;
  with_kernel(args, plan,
              [&](auto kernel) { launch_resident(kName, kernel, plan, workspace.stream, params); });
}

}  // namespace bnext::cuda
