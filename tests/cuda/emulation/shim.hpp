// Runs CUDA kernels on a CPU from their unchanged source: include this before the .cu, and launch with emulation::launch.
//
// Each thread of a block is a fiber that runs until it waits: at a barrier for the block, in a collective for its warp. What
// a device leaves undefined is an error here: a barrier or a collective that not every thread of the block or warp reaches,
// an access that is not aligned to its type or, where a launch names its allocations, outside of them, and different values
// where the warp's threads are said to hold the same one. Shared memory is filled with NaN before each block.
//
// A correct kernel's result does not depend on the order in which threads run. Seed 0 runs blocks and warps in turn; any
// other seed shuffles blocks, warps and threads, and holds one warp back until the others can do nothing without it, then
// another one.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Shared variables lie in a section of their own, whose ends the linker knows.
#define __shared__ __attribute__((section("vhead_shared"))) static

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

extern "C" {
extern char __start_vhead_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_vhead_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulation {

constexpr unsigned WARP_THREADS = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t STACK_BYTES = 512 << 10;
#else
constexpr std::size_t STACK_BYTES = 64 << 10;
#endif

// A kernel did what a device leaves undefined.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An allocation, and the bytes of it that a launch's threads read and wrote.
struct Range {
    std::uintptr_t begin, end;
    std::uint64_t writable;
    std::uint64_t read, written;
};

enum class State { ready, in_collective, at_barrier, finished };
enum class Collective { shuffle, same, wait };

struct Thread {
    dim3 index;
    State state = State::ready;
    Collective collective = Collective::wait;
    unsigned partner = 0;     // whose value a shuffle takes
    std::uint64_t value = 0;  // what it brings to a collective, then what it takes from it
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    std::jmp_buf resume;
    bool started = false;
    void* fake_stack = nullptr;
};

struct Machine {
    dim3 grid, block, block_index;
    std::vector<Thread> threads;
    Thread* current = nullptr;
    const std::function<void()>* kernel = nullptr;
    std::string error;
    std::vector<Range>* ranges = nullptr;  // the allocations, or any memory where null
    std::uint64_t random = 0;
    unsigned held_back = 0;  // a warp
    ucontext_t context;
    std::jmp_buf resume;
    void* fake_stack = nullptr;
    const void* stack = nullptr;
    std::size_t stack_bytes = 0;
};

inline Machine& machine() {
    static Machine machine;
    return machine;
}

// --- Fibers: makecontext starts one; setjmp is faster than swapcontext at switching, but ASan has to be told. ---

#if defined(__SANITIZE_ADDRESS__)

inline void to_scheduler() {
    Machine& m = machine();
    Thread& thread = *m.current;
    const bool last = thread.state == State::finished;
    __sanitizer_start_switch_fiber(last ? nullptr : &thread.fake_stack, m.stack, m.stack_bytes);
    swapcontext(&thread.context, &m.context);
    __sanitizer_finish_switch_fiber(thread.fake_stack, &m.stack, &m.stack_bytes);
}

inline void to_thread(Thread& thread) {
    Machine& m = machine();
    m.current = &thread;
    __sanitizer_start_switch_fiber(&m.fake_stack, thread.stack.get(), STACK_BYTES);
    swapcontext(&m.context, &thread.context);
    __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
}

inline void begin() { __sanitizer_finish_switch_fiber(nullptr, &machine().stack, &machine().stack_bytes); }

#else

inline void to_scheduler() {
    if (_setjmp(machine().current->resume) == 0) _longjmp(machine().resume, 1);
}

inline void to_thread(Thread& thread) {
    machine().current = &thread;
    if (_setjmp(machine().resume) != 0) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.context);
}

inline void begin() {}

#endif

inline void enter() {
    begin();
    (*machine().kernel)();
    machine().current->state = State::finished;
    to_scheduler();
}

// --- What the kernels call. ---

// Ends the launch, once the scheduler runs again.
inline void report(const std::string& what, const Thread& thread) {
    const dim3 block = machine().block_index;
    machine().error = what + ": block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ", thread " +
                      std::to_string(thread.index.x) + ", " + std::to_string(thread.index.y);
}

[[noreturn]] inline void fail(const std::string& what) {
    report(what, *machine().current);
    for (;;) to_scheduler();
}

inline void wait(State state) {
    machine().current->state = state;
    to_scheduler();
}

template <class T>
T collective(Collective which, unsigned mask, T value, unsigned partner) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    Thread& thread = *machine().current;
    if (mask != 0xffffffff) fail("a collective of part of a warp");
    thread.collective = which;
    thread.partner = partner;
    thread.value = 0;
    std::memcpy(&thread.value, &value, sizeof(T));
    wait(State::in_collective);
    std::memcpy(&value, &thread.value, sizeof(T));
    return value;
}

inline unsigned lane() { return static_cast<unsigned>(machine().current - machine().threads.data()) % WARP_THREADS; }

// The allocation of an access, or null where any memory will do.
inline Range* find(std::uintptr_t address, std::size_t size, std::size_t alignment) {
    if (address % alignment != 0) fail("an access that is not aligned");
    if (!machine().ranges) return nullptr;
    for (Range& range : *machine().ranges) {
        if (address >= range.begin && address + size <= range.end) return &range;
    }
    fail("an access outside of every allocation");
}

template <class T>
T read(const T* from) {
    if (Range* range = find(reinterpret_cast<std::uintptr_t>(from), sizeof(T), alignof(T))) range->read += sizeof(T);
    return *from;
}

template <class T>
void write(T* to, T value) {
    if (Range* range = find(reinterpret_cast<std::uintptr_t>(to), sizeof(T), alignof(T))) {
        if (!range->writable) fail("a write to what is to be read only");
        range->written += sizeof(T);
    }
    *to = value;
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float as_float(std::uint32_t bits) { return bits_as<float>(bits); }
inline std::uint32_t as_bits(float value) { return bits_as<std::uint32_t>(value); }
inline float float_of_float16(std::uint32_t bits) { return bits_as<_Float16>(static_cast<std::uint16_t>(bits)); }

inline std::uint32_t bfloat16(float value) {
    const std::uint32_t bits = as_bits(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline std::uint32_t pack_bfloat16(float low, float high) { return bfloat16(low) | bfloat16(high) << 16; }

inline std::uint32_t pack_float16(float low, float high) {
    const std::uint32_t upper = bits_as<std::uint16_t>(static_cast<_Float16>(high));
    return bits_as<std::uint16_t>(static_cast<_Float16>(low)) | upper << 16;
}

// --- The scheduler. ---

inline std::uint64_t draw(std::uint64_t below) {
    std::uint64_t& x = machine().random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x % below;
}

template <class T>
void shuffle(std::vector<T>& items) {
    if (machine().random == 0) return;
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw(i)]);
}

inline std::vector<unsigned> shuffled(std::size_t count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    shuffle(order);
    return order;
}

// The threads of a warp, or of what there is of it.
struct Warp {
    Thread* first;
    unsigned size;

    unsigned count(State state) const {
        return static_cast<unsigned>(std::count_if(first, first + size, [&](const Thread& t) { return t.state == state; }));
    }
};

inline unsigned warps() { return static_cast<unsigned>((machine().threads.size() + WARP_THREADS - 1) / WARP_THREADS); }

inline Warp warp(unsigned number) {
    auto& threads = machine().threads;
    const unsigned rest = static_cast<unsigned>(threads.size()) - number * WARP_THREADS;
    return {threads.data() + number * WARP_THREADS, std::min(WARP_THREADS, rest)};
}

// Lets a warp's threads leave the collective that all of them have reached.
inline void complete_collective(const Warp& warp) {
    if (warp.size != WARP_THREADS) return report("a collective in a warp of fewer than 32 threads", *warp.first);
    std::uint64_t values[WARP_THREADS];
    for (unsigned i = 0; i < WARP_THREADS; ++i) values[i] = warp.first[i].value;
    for (unsigned i = 0; i < WARP_THREADS; ++i) {
        Thread& thread = warp.first[i];
        if (thread.collective != warp.first->collective) return report("threads of a warp in different collectives", thread);
        if (thread.collective == Collective::same && values[i] != values[0]) {
            return report("threads of a warp hold different values where they should hold the same", thread);
        }
        if (thread.collective == Collective::shuffle) thread.value = values[thread.partner % WARP_THREADS];
        thread.state = State::ready;
    }
}

// Runs a warp's ready threads until each waits, again and again.
inline void run_warp(unsigned number) {
    const Warp own = warp(number);
    while (own.count(State::ready) > 0) {
        for (const unsigned i : shuffled(own.size)) {
            if (own.first[i].state != State::ready) continue;
            to_thread(own.first[i]);
            if (!machine().error.empty()) return;
        }
        const unsigned waiting = own.count(State::in_collective);
        if (waiting == own.size) {
            complete_collective(own);
        } else if (waiting > 0) {
            report("a collective that not every thread of the warp reaches", *own.first);
        }
        if (!machine().error.empty()) return;
        // A random warp may be interrupted where it could go on.
        if (machine().random != 0 && draw(2) == 0) return;
    }
}

// Lets the block's threads leave a barrier; false where there is none to leave.
inline bool complete_barrier() {
    auto& threads = machine().threads;
    const auto at_barrier = [](const Thread& thread) { return thread.state == State::at_barrier; };
    const auto waiting = std::count_if(threads.begin(), threads.end(), at_barrier);
    if (waiting == 0) return false;
    if (static_cast<std::size_t>(waiting) != threads.size()) {
        report("a barrier that not every thread of the block reaches", *std::find_if(threads.begin(), threads.end(), at_barrier));
    }
    for (Thread& thread : threads) thread.state = State::ready;
    return true;
}

// The next warp to run, or none: the one that is held back comes last, and then another one is held back.
inline unsigned next_warp() {
    Machine& m = machine();
    std::vector<unsigned> ready;
    for (unsigned i = 0; i < warps(); ++i) {
        if (warp(i).count(State::ready) > 0) ready.push_back(i);
    }
    if (ready.empty()) return warps();
    if (m.random == 0) return ready[0];
    if (ready.size() > 1) ready.erase(std::remove(ready.begin(), ready.end(), m.held_back), ready.end());
    const unsigned chosen = ready[draw(ready.size())];
    if (chosen == m.held_back) m.held_back = static_cast<unsigned>(draw(warps()));
    return chosen;
}

inline void prepare(Thread& thread, unsigned number) {
    const dim3 block = machine().block;
    thread.index = {number % block.x, number / block.x % block.y, number / (block.x * block.y)};
    thread.state = State::ready;
    thread.started = false;
    if (!thread.stack) thread.stack.reset(new char[STACK_BYTES]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK_BYTES;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
}

inline void run_block() {
    Machine& m = machine();
    if (__start_vhead_shared) {
        std::memset(__start_vhead_shared, 0xff, static_cast<std::size_t>(__stop_vhead_shared - __start_vhead_shared));
    }
    for (unsigned i = 0; i < m.threads.size(); ++i) prepare(m.threads[i], i);
    if (m.random != 0) m.held_back = static_cast<unsigned>(draw(warps()));
    while (m.error.empty()) {
        const unsigned next = next_warp();
        if (next < warps()) {
            run_warp(next);
        } else if (!complete_barrier()) {
            return;
        }
    }
}

// Runs `kernel`, which calls one with its arguments, in every thread; throws Error.
inline void launch(dim3 grid, dim3 block, std::uint64_t seed, const std::function<void()>& kernel,
                   std::vector<Range>* ranges = nullptr) {
    Machine& m = machine();
    m.grid = grid, m.block = block, m.kernel = &kernel, m.random = seed, m.ranges = ranges;
    m.error.clear();
    m.threads.resize(std::size_t{block.x} * block.y * block.z);
    for (const unsigned i : shuffled(std::size_t{grid.x} * grid.y * grid.z)) {
        m.block_index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
        run_block();
        if (!m.error.empty()) throw Error(m.error);
    }
}

}  // namespace emulation

#define threadIdx (emulation::machine().current->index)
#define blockIdx (emulation::machine().block_index)
#define blockDim (emulation::machine().block)
#define gridDim (emulation::machine().grid)

inline void __syncthreads() { emulation::wait(emulation::State::at_barrier); }

inline void __syncwarp(unsigned mask = 0xffffffff) { emulation::collective(emulation::Collective::wait, mask, 0u, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
    return emulation::collective(emulation::Collective::shuffle, mask, value, emulation::lane() ^ distance);
}

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned from) {
    return emulation::collective(emulation::Collective::shuffle, mask, value, from);
}

// The kernels use it for values that the warp's threads share, to say so to the compiler.
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return emulation::collective(emulation::Collective::same, mask, value, 0);
}
