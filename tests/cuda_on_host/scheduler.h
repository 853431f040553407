// The inside of the execution model: blocks under way, who waits where, and whose turn it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "model.h"

namespace model {

constexpr unsigned kWarp = Stacks::kCount;

// Where a thread is: it can run, it has ended, or it waits in one of these functions.
enum class Place : uint8_t {
  running,
  ended,
  sync_block,
  arrival_begin,
  arrival_end,
  sync_warp,
  exchange,
  group_begin,
  group,  // in arrive_and_wait, for other blocks
  group_end,
  cluster,  // in wait_for_cluster, for threads of any block
  bytes     // in wait_for_bytes
};

// Of threads first to first + count of a block. A token orders memory for one generation: were there a single
// one, a thread that is late to leave would also be ordered after what others do next. Two take turns, since
// nobody comes to a generation before everybody has left the one before the last.
struct Barrier {
  unsigned first = 0, count = 0;
  unsigned arrived = 0, generation = 0;
  Place place = Place::running;  // of those that have arrived
  char tokens[2] = {};
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp] = {};  // of exchange(), by generation
  Stacks stacks;
};

struct Block;

struct Copy {
  std::byte* to;
  const std::byte* from;
  size_t bytes;
};

// What a barrier for copies counts, see prepare_barrier().
struct Arrivals {
  unsigned generation = 0;
  bool expects = false;
  size_t expected = 0, begun = 0;  // bytes
  std::vector<Copy> copies;
  char tokens[2] = {};  // by generation

  bool all_begun() const { return expects && begun == expected; }
  bool has_passed(unsigned wanted) const { return generation % 2 != wanted % 2; }
};

// Blocks that see each other's memory. Tokens as in Barrier.
struct Cluster {
  std::vector<Block*> blocks;  // null: has ended
  size_t threads = 0, arrived = 0;
  unsigned generation = 0;
  char tokens[2] = {};
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;
  int barriers = 0;  // calls of sync_block()
  // Copies under way, batch by batch: the last is not committed.
  std::deque<std::vector<Copy>> copies = std::deque<std::vector<Copy>>(1);
  const unsigned* waits_for = nullptr;  // in Place::group, to become
  unsigned target = 0;
  const Arrivals* arrivals = nullptr;  // in Place::bytes, to pass `target`
  unsigned met = 0;                    // arrivals at the cluster
  int cluster_waits = 0;

  bool can_run() const;
};

// All threads of the barrier wait for each other, in this one function; all but exchange() order memory.
void wait_at(Barrier& barrier, Place place);

constexpr size_t kMemoryAlignment = 128;

struct FreeAligned {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kMemoryAlignment}); }
};
using Memory = std::unique_ptr<std::byte, FreeAligned>;

struct Block {
  Block(unsigned index, unsigned count, size_t shared_bytes, std::shared_ptr<Cluster> cluster);

  unsigned index, ended = 0;
  unsigned idle_turns = 0;  // since a thread ended
  bool last = false;        // what last_to_arrive() says
  unsigned met = 0;         // calls of arrive_and_wait()
  Barrier barrier;
  std::vector<Place> places;  // of threads
  std::unique_ptr<Thread[]> threads;
  std::unique_ptr<Warp[]> warps;
  Memory memory;
  size_t memory_bytes;
  std::map<const void*, Arrivals> arrivals;
  std::shared_ptr<Cluster> cluster;  // null: of an ordinary launch
  char end_token = 0;                // orders what its threads did before its memory goes
};

// With the number of threads in each place.
std::string describe(const Block& block);

// What outlives a launch.
struct Process {
  Options options;
  Faults faults;
  Statistics counts{};
  std::mt19937_64 generator;  // of the random order
  // Order what threads of a launch did before what follows it; two take turns, for a launch and the one
  // before.
  char end_tokens[2] = {};
  std::vector<std::unique_ptr<std::function<void()>>> bodies;  // that the host has not seen end
  bool ends_later = false;              // the host is not ordered after the last launch yet
  bool awaits_early = false;            // that has let the next begin
  std::vector<Memory> memory_of_ended;  // ThreadSanitizer: no address twice until it is
};
extern Process process;

class Launch {
 public:
  // alive: blocks at once, if a cluster has no more.
  Launch(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned alive, unsigned cluster,
         const std::function<void()>& body);
  ~Launch();

  void run();

  const unsigned blocks, threads;
  const uint64_t number;  // of launches
  bool lets_next_begin = false;
  const std::function<void()>& body;
  std::exception_ptr failure;  // of a thread
  char begin_token = 0;        // orders what was done before the launch before what threads do

 private:
  void order_blocks();
  void start_blocks();
  bool give_turn(Block& block);  // whether a thread could run
  void retire(std::unique_ptr<Block> block);

  const size_t shared_bytes_;
  const unsigned alive_, cluster_;
  std::vector<unsigned> block_order_, thread_order_;
  size_t started_ = 0;
  std::vector<std::unique_ptr<Block>> resident_;
};

extern Launch* launched;
extern Thread* current;  // whose turn it is

}  // namespace model
