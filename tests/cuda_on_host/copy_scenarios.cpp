// Scenarios of the execution model's test: copies that run beside threads.
#include <cstring>
#include <string>
#include <vector>

#include "model.h"
#include "scenarios.h"

namespace scenarios {
namespace {

using namespace model;
using Order = Options::Order;

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

// In every turn, thread 0 has copies made for all, of as many pieces as there are threads in two warps.
void copy_in_bulk(unsigned turns) {
  constexpr unsigned kPieces = kThreads, kBytes = kPieces * 16;
  std::vector<unsigned> source(turns * kBytes / sizeof(unsigned));
  for (unsigned k = 0; k < source.size(); ++k) source[k] = k;
  launch(2, kThreads, kBytes + sizeof(uint64_t), [&] {
    auto* const barrier = reinterpret_cast<uint64_t*>(block_memory() + kBytes);
    const unsigned t = thread_index();
    if (t == 0) prepare_barrier(barrier);
    sync_block();
    for (unsigned turn = 0; turn < turns; ++turn) {
      if (t == 0) expect_bytes(barrier, kBytes);
      if (t < 2) {  // half of it each
        begin_bulk_copy(block_memory() + t * (kBytes / 2),
                        source.data() + (turn * kPieces + t * kPieces / 2) * 4, kBytes / 2, barrier);
      }
      wait_for_bytes(barrier, turn);
      require(shared<unsigned>()[t] == turn * kPieces * 4 + t, "a copied value");
      sync_block();
    }
  });
}

void bulk_copies() {
  for (const Order order : {Order::ascending, Order::descending, Order::random}) {
    set_options({order, 7, 4});
    copy_in_bulk(3);
  }
  const auto with = [](auto body) {
    return message_of([&] {
      launch(1, kThreads, 64, [&] {
        auto* const barrier = reinterpret_cast<uint64_t*>(block_memory() + 32);
        if (thread_index() == 0) prepare_barrier(barrier);
        sync_block();
        alignas(16) static const std::byte source[32] = {};
        if (thread_index() == 0) body(barrier, source);
      });
    });
  };
  const auto says = [](const std::string& text, const char* words) {
    require(text.find(words) != std::string::npos, words);
  };
  says(with([](uint64_t* barrier, const std::byte* source) {
         expect_bytes(barrier, 16);
         begin_bulk_copy(block_memory(), source, 32, barrier);
       }),
       "more bytes");
  says(with([](uint64_t* barrier, const std::byte* source) {
         expect_bytes(barrier, 32);
         begin_bulk_copy(block_memory(), source, 16, barrier);
         wait_for_bytes(barrier, 0);
       }),
       "deadlock");
  says(with([](uint64_t* barrier, const std::byte* source) {
         expect_bytes(barrier, 16);
         begin_bulk_copy(block_memory(), source, 16, barrier);
       }),
       "copies under way");
}

// ---- faults ----

void poison_early_read() {
  copy_batches(2, [](const std::vector<unsigned*>& places, const unsigned*) {
    wait_for_copies(1);
    places[1][0] += places[1][1];
    wait_for_copies(0);
  });
}

void race_barrier_seen_too_early() {
  launch(1, kThreads, 16, [] {
    auto* const barrier = reinterpret_cast<uint64_t*>(block_memory());
    if (thread_index() == 0) prepare_barrier(barrier);
    if (thread_index() == 40) expect_bytes(barrier, 0);
  });
}

// Of the next turn, while another warp still reads.
void race_bulk_copy_too_early() {
  std::vector<unsigned> source(kThreads), sums(kThreads);
  launch(1, kThreads, kThreads * sizeof(unsigned) + sizeof(uint64_t), [&] {
    auto* const barrier = reinterpret_cast<uint64_t*>(block_memory() + kThreads * sizeof(unsigned));
    const unsigned t = thread_index();
    if (t == 0) prepare_barrier(barrier);
    sync_block();
    for (unsigned turn = 0; turn < 2; ++turn) {
      if (t == 0) {
        expect_bytes(barrier, kThreads * sizeof(unsigned));
        begin_bulk_copy(block_memory(), source.data(), kThreads * sizeof(unsigned), barrier);
      }
      wait_for_bytes(barrier, turn);
      sums[t] += shared<unsigned>()[t];
      sync_warp();
    }
  });
}

void poison_early_bulk_read() {
  Faults faults;
  faults.skip_async_wait = true;
  set_faults(faults);
  copy_in_bulk(1);
}

}  // namespace

const Scenarios kCopies = {
    {"async_copies", async_copies},
    {"bulk_copies", bulk_copies},
    {"poison_early_read", poison_early_read},
    {"race_barrier_seen_too_early", race_barrier_seen_too_early},
    {"race_bulk_copy_too_early", race_bulk_copy_too_early},
    {"poison_early_bulk_read", poison_early_bulk_read},
};

}  // namespace scenarios
