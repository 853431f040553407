// Forward on a GPU, resident: moments and normalize in one kernel, and its launch.
#include "cuda/launch.h"
#include "cuda/normalize.cuh"
#include "cuda/resident_launch.cuh"
#include "dispatch.h"

namespace bnext::cuda {
namespace {

constexpr char kName[] = "bnext::batch_norm";

using Params = ResidentParams<ForwardParams>;

// Folds read the count where momentum follows from it: then it changes when all blocks have folded.
BNEXT_DEVICE void count_batch_at_last(const ForwardArgs& args, const Resident& r) {
  if (args.num_batches_tracked == nullptr) return;
  const bool counts =
      args.cumulative ? last_to_arrive(r.counter_of_all(), block_count()) : block_index() == 0;
  if (counts && thread_index() == 0) store(args.num_batches_tracked, *args.num_batches_tracked + 1);
}

template <class T, Traversal kTraversal, bool kJoined>
BNEXT_KERNEL(256, 2)
batch_norm_resident_kernel(const BNEXT_PARAMETER Params params) {
  const ForwardParams& p = params.p;
  if constexpr (kJoined) p.mask.clear_end();
  resident<kTraversal>(params.resident, MomentsReducer<T>{p}, NormalizeMap<T, kJoined>{p});
  count_batch_at_last(p.args, params.resident);
}

// f(kernel) for the one of a call.
template <class F>
auto with_kernel(const ForwardArgs& args, const Plan& plan, F f) {
  const bool rows = plan.reduce.traversal == Traversal::rows;
  const bool joined = args.residual != nullptr || args.mask != nullptr;
  return dispatch_kept(args.dtype, [&]<class T>() {
    if (joined) {
      return f(rows ? batch_norm_resident_kernel<T, Traversal::rows, true>
                    : batch_norm_resident_kernel<T, Traversal::planes, true>);
    }
    return f(rows ? batch_norm_resident_kernel<T, Traversal::rows, false>
                  : batch_norm_resident_kernel<T, Traversal::planes, false>);
  });
}

}  // namespace

#if defined(__CUDACC__)
int compiled_for() {
  cudaFuncAttributes attributes;
  require(kName,
          cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(
                                                 batch_norm_resident_kernel<float, Traversal::rows, false>)));
  return 10 * attributes.ptxVersion;
}
#endif

bool can_run(const ForwardArgs& args, const Plan& plan) {
  return plan.engine != Engine::resident ||
         with_kernel(args, plan, [&](auto kernel) { return can_launch(kName, kernel, plan); });
}

void resident_forward(const ForwardArgs& args, const Plan& plan, const Workspace& workspace) {
  const int lanes = lanes_of(args.dtype);
  Params params{forward_params(args, plan),
                resident_of(plan, lanes, 1, args.y, {args.x, args.residual}, workspace)};
  params.p.mask = {args.mask, args.extent.numel(),
                   lanes == 8 && on_boundary(args.y) && plan.reduce.whole_vectors(lanes)};
  if (args.mask != nullptr && !params.p.mask.whole_bytes) {
    fill_zero(kName, args.mask, mask_bytes(args.extent.numel()), workspace.stream);
  }
  with_kernel(args, plan,
              [&](auto kernel) { launch_resident(kName, kernel, plan, workspace.stream, params); });
}

}  // namespace bnext::cuda
