// Memory that no access leaves unseen, and tensors in it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <istream>
#include <list>
#include <new>
#include <ostream>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace on_host {

// Where a buffer lies between two pages that cannot be touched: amid zones of kZone bytes, which must not
// change; from the first byte behind the one page; or up to the last before the other, on no boundary but its
// elements'.
enum class Place : uint8_t { zones, first, last };

constexpr size_t kZone = 272;  // bytes: what lies behind it is on a boundary of 16 and of no more
constexpr unsigned char kUntouched = 0xA5, kPoison = 0xFF;

// Of exactly this size, poisoned. shift: bytes from where the place has it, unless that is `last`.
class Buffer {
 public:
  Buffer(size_t bytes, size_t shift, Place place) : bytes_(bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t zone = place == Place::zones ? kZone : 0;
    inside_ = (zone + shift + bytes + zone + page - 1) / page * page;
    mapped_ = inside_ + 2 * page;
    void* const mapped = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(mapped) + page;
    if (inside_ > 0 && mprotect(memory_, inside_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    begin_ = place == Place::last ? inside_ - bytes : zone + shift;
    std::memset(memory_, kUntouched, inside_);
    std::memset(data(), kPoison, bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory_, begin_);
    __asan_poison_memory_region(data() + bytes_, inside_ - begin_ - bytes_);
#endif
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, inside_);
#endif
    munmap(memory_ - (mapped_ - inside_) / 2, mapped_);
  }

  unsigned char* data() { return memory_ + begin_; }
  size_t bytes() const { return bytes_; }

  void require_zones() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t k = 0; k < inside_; ++k) {
      if ((k < begin_ || k >= begin_ + bytes_) && memory_[k] != kUntouched)
        throw std::runtime_error("a guard zone was written to");
    }
#endif
  }

 private:
  size_t bytes_, inside_ = 0, mapped_ = 0, begin_ = 0;
  unsigned char* memory_ = nullptr;
};

// Null where a tensor is not there.
class Buffers {
 public:
  Buffers(std::istream& in, Place place) : in_(in), place_(place) {}

  Buffer* empty(bool wanted, size_t bytes, size_t shift = 0) {
    return wanted ? &all_.emplace_back(bytes, shift, place_) : nullptr;
  }
  Buffer* read(bool wanted, size_t bytes, size_t shift = 0) {
    Buffer* const buffer = empty(wanted, bytes, shift);
    if (buffer != nullptr)
      in_.read(reinterpret_cast<char*>(buffer->data()), static_cast<std::streamsize>(bytes));
    return buffer;
  }
  void require_zones() const {
    for (const Buffer& buffer : all_) buffer.require_zones();
  }

 private:
  std::istream& in_;
  Place place_;
  std::list<Buffer> all_;
};

inline void* data(Buffer* buffer) { return buffer == nullptr ? nullptr : buffer->data(); }

inline void write(std::ostream& out, Buffer* buffer) {
  if (buffer == nullptr) return;
  out.write(reinterpret_cast<const char*>(buffer->data()), static_cast<std::streamsize>(buffer->bytes()));
}

}  // namespace on_host
