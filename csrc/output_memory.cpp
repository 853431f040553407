// torch's allocator interface over the blocks of cpu/memory.h.
#include "output_memory.h"

#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "cpu/memory.h"

namespace bnext {
namespace {

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

struct BlockAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes < cpu::kLargeBytes ? nullptr : cpu::acquire_block(bytes);
    // torch's own says what is missing where there is no memory.
    if (data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::reportMemoryUsageToProfiler(data, static_cast<int64_t>(bytes), 0, 0, c10::kCPU);
    return {data, new Block{data, bytes}, &Block::release, c10::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

c10::Allocator* output_allocator(size_t bytes) {
  static BlockAllocator blocks;
  return bytes < cpu::kLargeBytes ? c10::GetCPUAllocator() : &blocks;
}

}  // namespace bnext
