// Scenarios of the execution model's test: blocks that wait for each other.
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

void early_launch() {
  launch(kGroup, kThreads, 0, let_next_begin);
  launch_early(kGroup, kThreads, 0, wait_for_previous);
  synchronize();
  const auto let_anybody_begin = [] {
    launch(kGroup, kThreads, 0, let_next_begin);
    launch(kGroup, kThreads, 0, [] {});
  };
  const std::string said = message_of(let_anybody_begin);
  require(said.find("none that begins early and waits") != std::string::npos, "an end that nobody awaits");
  launch(kGroup, kThreads, 0, [] {});
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

// Blocks of a cluster read each other's memory, and wait for each other before they end.
void read_around(unsigned cluster) {
  constexpr unsigned kClusters = 3;
  std::vector<unsigned> sums(cluster * kClusters);
  launch_clusters(cluster * kClusters, cluster, kThreads, kThreads * sizeof(unsigned), [&] {
    const unsigned t = thread_index();
    shared<unsigned>()[t] = block_index();
    arrive_at_cluster();
    wait_for_cluster();
    unsigned sum = 0;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      sum += *static_cast<const unsigned*>(place_in_cluster(shared<unsigned>() + (t ^ 1), rank));
    }
    arrive_at_cluster();
    if (t == 0) sums[block_index()] = sum;
    wait_for_cluster();
  });
  for (unsigned block = 0; block < sums.size(); ++block) {
    const unsigned first = block / cluster * cluster;
    require(sums[block] == cluster * first + cluster * (cluster - 1) / 2, "a sum over a cluster");
  }
}

void clusters() {
  for (const Order order : {Order::ascending, Order::descending, Order::random}) {
    for (const unsigned cluster : {2u, 3u, 8u}) {
      set_options({order, 7, 4});
      read_around(cluster);
    }
  }
  set_options({});
}

void cluster_deadlock() {
  const std::string missing = message_of([] {
    launch_clusters(4, 2, kThreads, 0, [] {
      if (block_index() == 3) return;
      arrive_at_cluster();
      wait_for_cluster();
    });
  });
  require(missing.find("deadlock between blocks") != std::string::npos &&
              missing.find("wait for the cluster") != std::string::npos,
          "message");
  const std::string gone = message_of([] {
    launch_clusters(2, 2, kThreads, 16, [] {
      if (block_index() == 1) return;
      for (int turn = 0; turn < 3; ++turn) sync_block();
      place_in_cluster(block_memory(), 1);
    });
  });
  require(gone.find("memory of a block that has ended") != std::string::npos, "message");
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

void wait_unordered(int which) {
  Faults faults;
  faults.unordered_wait = which;
  set_faults(faults);
  read_around(2);
}

void race_skipped_cluster_wait() { wait_unordered(0); }

// A block's memory goes while another reads it.
void race_left_cluster() { wait_unordered(1); }

}  // namespace

const Scenarios kTogether = {
    {"group_barrier", group_barrier},
    {"early_launch", early_launch},
    {"cooperative_limit", cooperative_limit},
    {"group_deadlock", group_deadlock},
    {"clusters", clusters},
    {"cluster_deadlock", cluster_deadlock},
    {"race_skipped_group_barrier", race_skipped_group_barrier},
    {"race_group_one_generation_late", race_group_one_generation_late},
    {"race_skipped_cluster_wait", race_skipped_cluster_wait},
    {"race_left_cluster", race_left_cluster},
};

}  // namespace scenarios
