// What this machine is: its caches and the best compiled instruction set it supports.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/launch.h"
#include "cpu/tiles.h"

namespace bnext::cpu {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace v4 {
TileFunction find(const Kernel&);
Folds folds(Dtype);
}  // namespace v4
namespace v3 {
TileFunction find(const Kernel&);
Folds folds(Dtype);
}  // namespace v3
#endif
namespace baseline {
TileFunction find(const Kernel&);
Folds folds(Dtype);
}  // namespace baseline

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    {"x86-64-v4", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, v4::find, v4::folds},
    {"x86-64-v3", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, v3::find, v3::folds},
#endif
#if defined(__x86_64__)
    {"x86-64", [] { return true; }, baseline::find, baseline::folds},
#else
    {"generic", [] { return true; }, baseline::find, baseline::folds},
#endif
};
const int kInstructionSetCount = sizeof kInstructionSets / sizeof kInstructionSets[0];

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = []() -> const InstructionSet& {
    const char* wanted = std::getenv("BNEXT_INSTRUCTION_SET");
    std::string supported;
    for (const InstructionSet& set : kInstructionSets) {
      if (!set.supported()) continue;
      if (wanted == nullptr || std::strcmp(wanted, set.name) == 0) return set;
      supported += (supported.empty() ? "" : ", ") + std::string(set.name);
    }
    throw std::runtime_error("BNEXT_INSTRUCTION_SET: expected one of " + supported + ", but got " + wanted);
  }();
  return chosen;
}

namespace {

// The first word of a file, empty where there is none.
std::string word_in(const std::string& path) {
  char word[32] = "";
  if (std::FILE* const file = std::fopen(path.c_str(), "r")) {
    if (std::fscanf(file, "%31s", word) != 1) word[0] = 0;
    std::fclose(file);
  }
  return word;
}

// Bytes of processor 0's data or unified cache, 0 where the system does not say. The C library's
// sysconf is no help: on some virtual machines it reports the last-level cache of every socket together.
int64_t cache_bytes(int level) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const std::string found = word_in(folder + "level");
    if (found.empty()) break;
    if (found == std::to_string(level) && word_in(folder + "type") != "Instruction")
      return std::atoll(word_in(folder + "size").c_str()) << 10;  // "2048K"
  }
  return 0;
}

// Most of the last-level cache that a processor the system knows of can count on. No core has more than 16 MB
// to itself; a virtual machine shows the host's whole cache with a few of its cores, and other machines use
// the rest: of 300 MB two cores kept 50 to 100, from one hour to the next.
constexpr int64_t kSharedPerProcessor = 32 << 20;

}  // namespace

Machine machine(int threads) {
  static const Machine caches = [] {
    Machine m;
    m.first_cache = cache_bytes(1);
    if (const int64_t bytes = cache_bytes(2)) m.private_cache = bytes;
    const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
    const int64_t reported = cache_bytes(3), ours = processors * kSharedPerProcessor;
    m.shared_cache = std::min(reported, ours);
    m.cache_of_host = reported > ours;
    return m;
  }();
  Machine m = caches;
  m.threads = threads;
  return m;
}

}  // namespace bnext::cpu
