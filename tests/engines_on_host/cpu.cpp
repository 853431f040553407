// The CPU engine's own sources without torch, with plans for any machine. Of each pass a result says what was
// planned: the schedule, as in plan.h, how many tiles, on how many threads, and whether stores are to go past
// the cache.
#include <ATen/Parallel.h>

#include <type_traits>

#include "call.h"
#include "cpu/launch.h"
#include "plan.h"

int main(int count, char** arguments) {
  using namespace bnext;
  const auto engine = []<class Args>(const on_host::Call& call, const Args& args, Pass pass) {
    const Machine machine{static_cast<int>(call.threads), call.first_cache, call.private_cache,
                          call.shared_cache, call.cache_of_host != 0};
    const Plan plan = make_plan(Problem(args, pass), machine);
    at::loops = {plan.threads, call.overlap};
    if constexpr (std::is_same_v<Args, ForwardArgs>) {
      cpu::forward(args, plan);
    } else {
      cpu::backward(args, plan);
    }
    return on_host::Took{static_cast<int64_t>(plan.schedule), plan.slabs * plan.chunks, plan.threads,
                         plan.streaming_stores ? 1 : 0};
  };
  return on_host::make_all(count, arguments, engine);
}
