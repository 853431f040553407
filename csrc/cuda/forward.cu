// Forward on a GPU, streaming: the kernels of moments and normalize, and their launches.
#include "cuda/launch.h"
#include "cuda/launching.cuh"
#include "cuda/normalize.cuh"
#include "cuda/resident_launch.cuh"
#include "dispatch.h"

namespace bnext::cuda {
namespace {

constexpr char kName[] = "bnext::batch_norm";

template <class T>
BNEXT_KERNEL(384, 1)
moments_rows_kernel(const BNEXT_PARAMETER ForwardParams p) {
  clear_mask(p.mask);
  MomentsReducer<T> reducer{p};
  reduce_rows(p.reduction, reducer);
}

template <class T>
BNEXT_KERNEL(256, 3)
moments_planes_kernel(const BNEXT_PARAMETER ForwardParams p) {
  clear_mask(p.mask);
  MomentsReducer<T> reducer{p};
  reduce_planes(p.reduction, reducer);
}

template <class T, bool kJoined, bool kElementary>
BNEXT_KERNEL(256, sizeof(T) == 8 || kJoined ? 2 : 3)
normalize_rows_kernel(const BNEXT_PARAMETER ForwardParams p) {
  wait_for_previous();
  count_batch(p.args);
  if constexpr (kJoined) p.mask.clear_end();
  NormalizeMap<T, kJoined, kElementary> map{p};
  map_rows(p.mapping, map);
}

template <class T, bool kJoined, bool kElementary>
BNEXT_KERNEL(256, kJoined ? 2 : 3)
normalize_planes_kernel(const BNEXT_PARAMETER ForwardParams p) {
  wait_for_previous();
  count_batch(p.args);
  if constexpr (kJoined) p.mask.clear_end();
  NormalizeMap<T, kJoined, kElementary> map{p};
  map_planes(p.mapping, map);
}

template <class T, bool kJoined, bool kElementary>
void launch_map(const ForwardParams& p, const Plan& plan, void* stream) {
  const bool rows = plan.map.traversal == Traversal::rows;
  launch(kName,
         rows ? normalize_rows_kernel<T, kJoined, kElementary>
              : normalize_planes_kernel<T, kJoined, kElementary>,
         plan.map, map_memory<NormalizeMap<T, kJoined, kElementary>>(plan.map), stream, p, plan.early_map);
}

template <class T>
void launch_all(const ForwardParams& p, const Plan& plan, void* stream) {
  const bool rows = plan.reduce.traversal == Traversal::rows;
  if (plan.reduces) {
    launch(kName, rows ? moments_rows_kernel<T> : moments_planes_kernel<T>, plan.reduce,
           reduce_memory<MomentsReducer<T>>(plan.reduce), stream, p);
  }
  if (!plan.maps) return;
  if constexpr (sizeof(T) == 8) {
    launch_map<T, true, true>(p, plan, stream);  // of float64 one for all will do
  } else {
    const bool elementary = is_elementary(p.args.activation.kind);
    if (p.args.residual != nullptr || p.mask.data != nullptr) {
      elementary ? launch_map<T, true, true>(p, plan, stream) : launch_map<T, true, false>(p, plan, stream);
    } else {
      elementary ? launch_map<T, false, true>(p, plan, stream) : launch_map<T, false, false>(p, plan, stream);
    }
  }
}

}  // namespace

bool aligned(const ForwardArgs& args) {
  return on_boundary(args.x) && on_boundary(args.residual) && on_boundary(args.y);
}

void forward(const ForwardArgs& args, const Plan& plan, const Workspace& workspace) {
  if (plan.engine == Engine::resident) return resident_forward(args, plan, workspace);
  ForwardParams p = forward_params(args, plan);
  if (args.extent.numel() == 0) {
    fill_zero(kName, args.mean, args.extent.channels * int64_t{sizeof(double)}, workspace.stream);
    fill_zero(kName, args.invstd, args.extent.channels * int64_t{sizeof(double)}, workspace.stream);
    if (args.var != nullptr)
      fill_zero(kName, args.var, args.extent.channels * int64_t{sizeof(double)}, workspace.stream);
    p.args.batch_statistics = true;  // there are no others to write
  }
  const bool whole = aligned(args);
  const int lanes = lanes_of(args.dtype);
  p.reduction = reduction_of(plan, lanes, whole, workspace);
  p.mapping = {plan.extent, plan.map, whole && plan.map.whole_vectors(lanes)};
  p.mask = {args.mask, args.extent.numel(),
            lanes == 8 && on_boundary(args.y) &&
                (plan.map.traversal == Traversal::rows || plan.extent.inner % lanes == 0)};
  if (args.mask != nullptr && !plan.reduces && !p.mask.whole_bytes) {
    fill_zero(kName, args.mask, mask_bytes(args.extent.numel()), workspace.stream);
  }
  dispatch(args.dtype, [&]<class T>() { launch_all<T>(p, plan, workspace.stream); });
}

}  // namespace bnext::cuda
