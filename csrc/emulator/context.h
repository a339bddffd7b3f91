// Fibers: one stack per CUDA thread, and what the sanitizers must know when a stack is left for another.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(char const*, int);
void AnnotateIgnoreReadsEnd(char const*, int);
void AnnotateIgnoreWritesBegin(char const*, int);
void AnnotateIgnoreWritesEnd(char const*, int);
}
#define KDA_NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define KDA_NO_TSAN
#endif

namespace kda::emulator {

/// Within its scope, memory accesses are the engine's own bookkeeping and hidden from ThreadSanitizer.
struct EngineOnly {
#if defined(__SANITIZE_THREAD__)
  EngineOnly() {
    AnnotateIgnoreReadsBegin(__FILE__, 1);
    AnnotateIgnoreWritesBegin(__FILE__, 1);
  }
  ~EngineOnly() {
    AnnotateIgnoreWritesEnd(__FILE__, 1);
    AnnotateIgnoreReadsEnd(__FILE__, 1);
  }
#else
  ~EngineOnly() {}
#endif
};

/// Happens-before edges; the only ones between fibers, since a switch itself gives none.
inline KDA_NO_TSAN void release([[maybe_unused]] void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(object);
#endif
}
inline KDA_NO_TSAN void acquire([[maybe_unused]] void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(object);
#endif
}

// Saves the callee-saved registers, swaps stacks and jumps; 8 ns, forty times less than swapcontext.
extern "C" void kda_switch_stack(void** save_stack_pointer, void* to_stack_pointer);
#if defined(__x86_64__)
asm(R"(
.section .text.kda_switch_stack,"axG",@progbits,kda_switch_stack,comdat
.weak kda_switch_stack
.type kda_switch_stack,@function
kda_switch_stack:
  .cfi_startproc
  popq %rdx
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  pushq %rdx
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %rdx
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  jmp *%rdx
  .cfi_endproc
.size kda_switch_stack,.-kda_switch_stack
.text
)");
#else
#error "the emulator switches stacks with x86-64 assembly"
#endif

/// An execution context: a fiber, or the OS thread that runs the block.
struct Context {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest usable address; null: the OS thread's own
  size_t stack_bytes = 0;
  void const* os_stack = nullptr;  // as AddressSanitizer reports it
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;

  /// Maps a stack with a guard page below it.
  void allocate(size_t bytes) {
    constexpr size_t kGuard = 4096;
    void* p = mmap(nullptr, bytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("kda emulator: out of memory for fiber stacks");
    mprotect(p, kGuard, PROT_NONE);
    stack = static_cast<char*>(p) + kGuard;
    stack_bytes = bytes;
#if defined(__SANITIZE_THREAD__)
    tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  void free() {
    if (!stack) return;
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_fiber);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, stack_bytes);
#endif
    munmap(stack - 4096, stack_bytes + 4096);
    stack = nullptr;
  }
  /// The next switch to this context calls `entry` on an empty stack.
  void restart(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, stack_bytes);  // an abandoned block may leave poison behind
#endif
    fake_stack = nullptr;
    void** top = reinterpret_cast<void**>(stack + stack_bytes);
    *--top = nullptr;                              // return address of entry(): never used
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // callee-saved registers
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = top;
  }
  /// The OS thread that calls: another one each time, maybe.
  void adopt_os_thread() {
#if defined(__SANITIZE_THREAD__)
    tsan_fiber = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
    static thread_local struct Bounds {
      void* bottom;
      size_t bytes;
      Bounds() {
        pthread_attr_t attributes;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &bottom, &bytes);
        pthread_attr_destroy(&attributes);
      }
    } const own;
    os_stack = own.bottom, stack_bytes = own.bytes;
#endif
  }
};

/// Called first on a fresh fiber: tells AddressSanitizer that the switch is complete.
inline KDA_NO_TSAN void finish_first_switch() {
#if defined(__SANITIZE_ADDRESS__)
  void const* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
#endif
}

/// `leaving_for_good`: `from` will not run again before restart().
inline KDA_NO_TSAN void switch_context(Context& from, Context& to, [[maybe_unused]] bool leaving_for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &from.fake_stack, to.stack ? to.stack : to.os_stack,
                                 to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, 1 /* no happens-before from the switch itself */);
#endif
  kda_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  void const* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
#endif
}

}  // namespace kda::emulator
