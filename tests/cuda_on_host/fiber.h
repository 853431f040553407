// Fibers for the execution model: threads of control that take turns in one OS thread. Whatever the
// sanitizers must be told about that is in here; without them it is all empty.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define MODEL_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MODEL_THREAD_SANITIZER 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#define MODEL_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MODEL_ADDRESS_SANITIZER 1
#endif
#endif

namespace model {

#if defined(MODEL_THREAD_SANITIZER)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Alive at a time: ThreadSanitizer ends the process at some 8,000.
constexpr unsigned kMostFibers = 6000;

// For functions that never return, whose frames ThreadSanitizer would take for ones that are still there, and
// for the switch, which begins as one fiber and ends as another.
#if defined(MODEL_THREAD_SANITIZER)
#define MODEL_UNINSTRUMENTED __attribute__((noinline, no_sanitize("thread")))
#else
#define MODEL_UNINSTRUMENTED
#endif

// Stacks for the fibers of a warp, below each a page that must not be touched. Mapped anew or used before.
class Stacks {
 public:
  static constexpr unsigned kCount = 32;
  static constexpr size_t kBytes = 1024 *
#if defined(MODEL_THREAD_SANITIZER) || defined(MODEL_ADDRESS_SANITIZER)
                                   256;  // frames are larger
#else
                                   64;
#endif

  Stacks();  // throws std::bad_alloc
  ~Stacks();
  Stacks(const Stacks&) = delete;

  std::byte* bottom(unsigned index) const { return memory_ + index * kBytes; }

 private:
  std::byte* memory_;
};

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // What runs when the fiber is first entered: on one of `stacks`, MODEL_UNINSTRUMENTED, and its last act is
  // leave_for_good().
  void prepare(const Stacks& stacks, unsigned index, void (*entry)());

  void enter();           // from the scheduler, which goes on when the fiber leaves
  void leave();           // from the fiber, under an Unwatched; it goes on when it is entered again
  void leave_for_good();  // from the fiber

  // From the scheduler: release(token) in the fiber's name.
  void release_all(void* token);

 private:
  void switch_out(bool for_good);

  void* context_ = nullptr;  // where it goes on: a stack pointer, or a ucontext_t
  void (*entry_)() = nullptr;
  std::byte* stack_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* identity_ = nullptr;    // ThreadSanitizer's
  bool left_for_good_ = false;
};

// For ThreadSanitizer: what came before a release is ordered before what comes after an acquire of the same
// token.
void release(void* token);
void acquire(void* token);

// For ThreadSanitizer: between launches, when the scheduler has acquired all that fibers released. Within a
// launch no fiber is taken for one that was there before, as far as there is memory for that.
void forget_fibers();

// While there is one, ThreadSanitizer does not look at the accesses of this fiber: the model's own data,
// which the one OS thread orders.
class Unwatched {
 public:
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
};

}  // namespace model
