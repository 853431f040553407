// Scenarios of the execution model's test: blocks that wait for each other, copies that run beside threads.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "scenarios.h"

namespace scenarios {
namespace {

using namespace model;
using Order = Options::Order;

constexpr unsigned kGroup = 3, kTurns = 4;

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

template <class Launch>
std::string message_of(Launch launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// In every turn each block reads what the blocks of the group wrote in it. The counter ends as it began.
void pass_values_around(unsigned& counter) {
  std::vector<unsigned> values(kGroup * kTurns * kThreads);
  launch_cooperative(kGroup, kThreads, 0, [&] {
    for (unsigned turn = 0; turn < kTurns; ++turn) {
      unsigned* const row = values.data() + turn * kGroup * kThreads;
      row[block_index() * kThreads + thread_index()] = turn + block_index();
      arrive_and_wait(&counter, (turn + 1) * kGroup);
      for (unsigned block = 0; block < kGroup; ++block) {
        require(row[block * kThreads + (thread_index() ^ 1)] == turn + block, "a value of another block");
      }
    }
    leave_group(&counter, (kTurns + 1) * kGroup);
  });
}

void group_barrier() {
  for (const Order order : {Order::ascending, Order::descending, Order::random}) {
    set_options({order, 7, 1});
    unsigned counter = 0;
    for (int again = 0; again < 2; ++again) {
      pass_values_around(counter);
      require(counter == 0, "counter");
    }
  }
}

void cooperative_limit() {
  Options options;
  options.device_blocks = kGroup - 1;
  set_options(options);
  unsigned counter = 0;
  const std::string said = message_of([&] { pass_values_around(counter); });
  require(said.find("of which the device holds 2") != std::string::npos, "a launch of too many blocks");
}

// An ordinary launch promises no company.
void group_deadlock() {
  set_options({Order::ascending, 0, kGroup - 1});
  unsigned counter = 0;
  const std::string said =
      message_of([&] { launch(kGroup, kThreads, 0, [&] { arrive_and_wait(&counter, kGroup); }); });
  require(said.find("deadlock between blocks") != std::string::npos &&
              said.find("wait for other blocks") != std::string::npos,
          "message");
  set_options({});
  counter = 0;
  const std::string missing = message_of([&] {
    launch_cooperative(kGroup, kThreads, 0, [&] {
      if (block_index() != 1) arrive_and_wait(&counter, kGroup);
    });
  });
  require(missing.find("deadlock between blocks") != std::string::npos, "a block that does not come");
}

// Each thread copies `batches` times 16 bytes to its own place, and calls f(places, batches).
template <class F>
void copy_batches(unsigned batches, F f) {
  std::vector<unsigned> source(batches * kThreads * 4);
  for (unsigned k = 0; k < source.size(); ++k) source[k] = k;
  launch(2, kThreads, batches * kThreads * 16, [&] {
    std::vector<unsigned*> places;
    for (unsigned batch = 0; batch < batches; ++batch) {
      const unsigned at = (batch * kThreads + thread_index()) * 4;
      places.push_back(shared<unsigned>() + at);
      begin_copy(places.back(), source.data() + at);
      commit_copies();
    }
    f(places, source.data() + thread_index() * 4);
  });
}

void async_copies() {
  copy_batches(5, [](const std::vector<unsigned*>& places, const unsigned* source) {
    for (unsigned batch = 0; batch < 5; ++batch) {
      wait_for_copies(4 - batch);
      for (unsigned k = 0; k < 4; ++k) {
        require(places[batch][k] == source[batch * kThreads * 4 + k], "a copied value");
      }
    }
  });
  const std::string said = message_of(
      [] { copy_batches(2, [](const std::vector<unsigned*>&, const unsigned*) { wait_for_copies(1); }); });
  require(said.find("copies under way") != std::string::npos, "a copy that nobody waits for");
}

// ---- faults ----

void race_skipped_group_barrier() {
  Faults faults;
  faults.skip_group_barrier = true;
  set_faults(faults);
  unsigned counter = 0;
  std::vector<unsigned> values(kGroup * kThreads);
  unsigned sum = 0;
  launch_cooperative(kGroup, kThreads, 0, [&] {
    values[block_index() * kThreads + thread_index()] = 1;
    arrive_and_wait(&counter, kGroup);
    if (block_index() == 0 && thread_index() == 0) {
      for (const unsigned value : values) sum += value;
    }
  });
}

// The second of two barriers would order what block 1 reads before what block 0 writes next.
void race_group_one_generation_late() {
  unsigned counter = 0, value = 0, read = 0;
  launch_cooperative(2, kThreads, 0, [&] {
    if (block_index() == 0 && thread_index() == 0) value = 1;
    arrive_and_wait(&counter, 2);
    if (block_index() == 1 && thread_index() == 5) read = value;
    if (block_index() == 0 && thread_index() == 0) value = 2;
    arrive_and_wait(&counter, 4);
  });
}

void poison_early_read() {
  copy_batches(2, [](const std::vector<unsigned*>& places, const unsigned*) {
    wait_for_copies(1);
    places[1][0] += places[1][1];
    wait_for_copies(0);
  });
}

}  // namespace

const Scenarios kTogether = {
    {"group_barrier", group_barrier},
    {"cooperative_limit", cooperative_limit},
    {"group_deadlock", group_deadlock},
    {"async_copies", async_copies},
    {"race_skipped_group_barrier", race_skipped_group_barrier},
    {"race_group_one_generation_late", race_group_one_generation_late},
    {"poison_early_read", poison_early_read},
};

}  // namespace scenarios
