// torch's allocator interface over the blocks of cpu/memory.h.
#include "output_memory.h"

#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "cpu/memory.h"

namespace bnext {
namespace {

constexpr size_t kHalfPage = 2048;
static_assert(kHalfPage <= cpu::kSpareBytes);

// What a tensor's storage keeps to give its block back.
struct Block {
  void* data;
  size_t bytes;

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    c10::reportMemoryUsageToProfiler(block->data, -static_cast<int64_t>(block->bytes), 0, 0, c10::kCPU);
    cpu::release_block(block->data, block->bytes);
    delete block;
  }
};

class BlockAllocator final : public c10::Allocator {
 public:
  explicit BlockAllocator(size_t into_page) : into_page_(into_page) {}

  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes < cpu::kLargeBytes ? nullptr : cpu::acquire_block(bytes);
    // torch's own says what is missing where there is no memory.
    if (data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::reportMemoryUsageToProfiler(data, static_cast<int64_t>(bytes), 0, 0, c10::kCPU);
    return {static_cast<char*>(data) + into_page_, new Block{data, bytes}, &Block::release, c10::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  size_t into_page_;
};

}  // namespace

c10::Allocator* output_allocator(size_t bytes, Output which) {
  static BlockAllocator first(0), second(kHalfPage);
  if (bytes < cpu::kLargeBytes) return c10::GetCPUAllocator();
  return which == Output::first ? &first : &second;
}

}  // namespace bnext
