// The CUDA engine's own sources, run on the CPU over the execution model. Of each pass a result says how many
// kernels it took, which is what its plan says, how many of their blocks wait for each other, how many are a
// cluster, and whether copies are in bulk.
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "call.h"
#include "cuda/launch.h"
#include "model.h"
#include "plan_cuda.h"

namespace {

using namespace bnext;
using on_host::Buffer, on_host::Call, on_host::Took;

// Counters are zero before and after; everything else in the workspace is dirty.
template <class Args, class Run>
Took run_planned(const Args& args, Pass pass, const cuda::Device& device, cuda::Choice engine, Run run) {
  const cuda::Plan plan = make_plan(Problem(args, pass), device, cuda::aligned(args), engine);
  const uint64_t before = model::statistics().launches;
  Buffer scratch(static_cast<size_t>(plan.scratch_bytes), 0, on_host::Place::zones);
  std::vector<unsigned> counters(static_cast<size_t>(plan.counters()), 0u);
  run(args, plan,
      cuda::Workspace{nullptr, plan.scratch_bytes > 0 ? scratch.data() : nullptr, counters.data()});
  model::synchronize();
  scratch.require_zones();
  for (const unsigned counter : counters) {
    if (counter != 0) throw std::runtime_error("a counter was left behind");
  }
  const uint64_t launched = model::statistics().launches - before;
  if (launched != static_cast<uint64_t>(plan.launches())) throw std::runtime_error("launches nobody planned");
  return {static_cast<int64_t>(launched), plan.waiting_blocks, plan.cluster, plan.bulk_copies ? 1 : 0};
}

void set_model(const Call& call) {
  model::set_options({static_cast<model::Options::Order>(call.order), static_cast<uint64_t>(call.seed),
                      static_cast<unsigned>(call.resident_blocks),
                      static_cast<unsigned>(call.multiprocessors * 2)});
  model::set_faults({static_cast<int>(call.skip_barrier), call.early_arrival != 0,
                     static_cast<ptrdiff_t>(call.displace_stores), call.tear_atomics != 0,
                     call.skip_group_barrier != 0, call.skip_async_wait != 0, call.skip_previous != 0,
                     static_cast<int>(call.unordered_wait)});
}

cuda::Device device(const Call& call) {
  return {static_cast<int>(call.multiprocessors),
          static_cast<int>(call.block_threads),
          call.shared_memory,
          call.l2,
          1e12,
          call.multiprocessor_memory,
          0,
          static_cast<int>(call.cluster_blocks),
          call.bulk_copies != 0,
          call.early_launches != 0};
}

}  // namespace

int main(int count, char** arguments) {
  return on_host::make_all(count, arguments, []<class Args>(const Call& call, const Args& args, Pass pass) {
    set_model(call);
    return run_planned(args, pass, device(call), static_cast<cuda::Choice>(call.engine),
                       [](const auto&... all) {
                         if constexpr (std::is_same_v<Args, ForwardArgs>) {
                           cuda::forward(all...);
                         } else {
                           cuda::backward(all...);
                         }
                       });
  });
}
