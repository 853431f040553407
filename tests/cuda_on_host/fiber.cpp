// Switching between fibers, stacks, and the annotations for the sanitizers.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <new>
#include <vector>

#if defined(MODEL_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(MODEL_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

// ---- one switch: the processor's registers ----

#if defined(__x86_64__) && defined(__ELF__) && !defined(MODEL_UCONTEXT)

// Keeps what a callee must keep on the stack, the stack pointer in *from, and goes on where `to` was kept.
extern "C" void model_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl model_switch\n"
    ".type model_switch, @function\n"
    "model_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size model_switch, .-model_switch\n");

static void* new_context(std::byte* top, std::byte*, void (*entry)()) {
  auto** word = reinterpret_cast<void**>(top);
  *--word = nullptr;  // entry returns to nowhere
  *--word = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--word = nullptr;
  return word;
}

#else
#include <ucontext.h>

// Contexts lie at the top of the fiber's stack; the scheduler's is static.
MODEL_UNINSTRUMENTED static void model_switch(void** from, void* to) {
  static ucontext_t scheduler;
  if (*from == nullptr) *from = &scheduler;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

static void* new_context(std::byte* top, std::byte* bottom, void (*entry)()) {
  auto* const context = new (top - (sizeof(ucontext_t) + 63) / 64 * 64) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = static_cast<size_t>(reinterpret_cast<std::byte*>(context) - bottom);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#endif

namespace model {
namespace {

constexpr size_t kPage = 4096;  // or a divisor of the machine's

// The fiber that the launch was called from. There is one: launches do not nest.
struct Scheduler {
  void* context = nullptr;
  void (*entry)() = nullptr;  // of the fiber entered last
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* identity = nullptr;
};
Scheduler scheduler;

// Stacks to be used again.
struct Pool {
  std::vector<std::byte*> free;

  ~Pool() {
    for (std::byte* memory : free) munmap(memory, Stacks::kCount * Stacks::kBytes);
  }
};
Pool pool;

// The first frame of a fiber.
MODEL_UNINSTRUMENTED void begin() {
#if defined(MODEL_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  scheduler.entry();
  std::abort();
}

}  // namespace

Stacks::Stacks() {
  constexpr size_t kAll = kCount * kBytes;
  if (!pool.free.empty()) {
    memory_ = pool.free.back();
    pool.free.pop_back();
#if defined(MODEL_ADDRESS_SANITIZER)
    __asan_unpoison_memory_region(memory_, kAll);  // fibers left frames behind
#endif
    return;
  }
  void* const mapped =
      mmap(nullptr, kAll, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(mapped);
  for (unsigned index = 0; index < kCount; ++index) {
    if (mprotect(bottom(index), kPage, PROT_NONE) == 0) continue;
    munmap(mapped, kAll);
    throw std::bad_alloc();
  }
}

Stacks::~Stacks() {
  // ThreadSanitizer would take the next fiber's frames for a race with this one's: it forgets what is
  // unmapped.
  if (kThreadSanitizer) {
    munmap(memory_, kCount * kBytes);
  } else {
    pool.free.push_back(memory_);
  }
}

void Fiber::prepare(const Stacks& stacks, unsigned index, void (*entry)()) {
  stack_ = stacks.bottom(index);
  // Stacks begin at different places of the cache.
  std::byte* const top = stack_ + Stacks::kBytes - index * 192;
  context_ = new_context(top, stack_, begin);
  entry_ = entry;
}

#if defined(MODEL_THREAD_SANITIZER)
namespace {

// What fibers are to ThreadSanitizer. One takes 0.3 ms to make and nearly a megabyte, so they are used again,
// but only in another launch: it would not see a race between two fibers with one identity.
struct Identities {
  static constexpr size_t kKept = 1024;

  std::vector<void*> free;
  std::deque<void*> used;  // in this launch, by fibers that are no more
  size_t existing = 0;

  void* take() {
    if (!free.empty()) {
      void* const identity = free.back();
      free.pop_back();
      return identity;
    }
    if (existing >= kKept && !used.empty()) {
      destroy(used.front());
      used.pop_front();
    }
    ++existing;
    return __tsan_create_fiber(0);
  }

  void destroy(void* identity) {
    __tsan_destroy_fiber(identity);
    --existing;
  }
};
Identities& identities = *new Identities;

}  // namespace

Fiber::~Fiber() {
  if (identity_ == nullptr) return;  // never entered
  if (left_for_good_) {
    identities.used.push_back(identity_);
  } else {
    // It still has frames, and is unwatched: see leave().
    void* const own = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(identity_, __tsan_switch_to_fiber_no_sync);
    __tsan_ignore_thread_end();
    __tsan_switch_to_fiber(own, __tsan_switch_to_fiber_no_sync);
    identities.destroy(identity_);
  }
}

void forget_fibers() {
  identities.free.insert(identities.free.end(), identities.used.rbegin(), identities.used.rend());
  identities.used.clear();
}
#else
Fiber::~Fiber() = default;
void forget_fibers() {}
#endif

void Fiber::enter() {
  scheduler.entry = entry_;
#if defined(MODEL_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_, Stacks::kBytes);
#endif
#if defined(MODEL_THREAD_SANITIZER)
  scheduler.identity = __tsan_get_current_fiber();
  if (identity_ == nullptr) identity_ = identities.take();
  __tsan_switch_to_fiber(identity_, __tsan_switch_to_fiber_no_sync);
#endif
  model_switch(&scheduler.context, context_);
#if defined(MODEL_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

MODEL_UNINSTRUMENTED void Fiber::switch_out([[maybe_unused]] bool for_good) {
#if defined(MODEL_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler.stack, scheduler.stack_bytes);
#endif
#if defined(MODEL_THREAD_SANITIZER)
  __tsan_switch_to_fiber(scheduler.identity, __tsan_switch_to_fiber_no_sync);
#endif
  model_switch(&context_, scheduler.context);
#if defined(MODEL_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

void Fiber::leave() { switch_out(false); }
MODEL_UNINSTRUMENTED void Fiber::leave_for_good() {
  left_for_good_ = true;
  switch_out(true);
}

void Fiber::release_all([[maybe_unused]] void* token) {
#if defined(MODEL_THREAD_SANITIZER)
  if (identity_ == nullptr) return;  // never entered
  void* const own = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(identity_, __tsan_switch_to_fiber_no_sync);
  __tsan_release(token);
  __tsan_switch_to_fiber(own, __tsan_switch_to_fiber_no_sync);
#endif
}

#if defined(MODEL_THREAD_SANITIZER)
void release(void* token) { __tsan_release(token); }
void acquire(void* token) { __tsan_acquire(token); }
Unwatched::Unwatched() { __tsan_ignore_thread_begin(); }
Unwatched::~Unwatched() { __tsan_ignore_thread_end(); }
#else
void release(void*) {}
void acquire(void*) {}
Unwatched::Unwatched() {}
Unwatched::~Unwatched() {}
#endif

}  // namespace model
