// Runs CUDA kernels on one core of a CPU, to test their logic: each CUDA thread is a fibre that runs until a barrier.
//
// In an order drawn by chance, so that a barrier that is missing shows; threads that wait for one that
// never comes end the program with a message.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct float4 {
    float x, y, z, w;
};

struct Index {
    unsigned x;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t stack_size = 64 * 1024;
constexpr int warp_size = 32;

struct Barrier {
    int members = 0, arrived = 0, sum = 0, result = 0;
    unsigned generation = 0;
};

struct Fibre {
    std::vector<char> stack;
    ucontext_t start;
    jmp_buf here;
    bool begun = false, done = false;
};

static std::vector<Fibre> fibres;
static std::vector<Barrier> warps;
static std::vector<unsigned long long> lanes;
static Barrier block;
static jmp_buf scheduler;
static bool progress;
static void (*body)(void**);
static void** arguments;

// _setjmp and _longjmp save no signal mask: swapcontext would ask the kernel at each switch.
inline void yield()
{
    if (!_setjmp(fibres[threadIdx.x].here))
        _longjmp(scheduler, 1);
}

inline int wait(Barrier& barrier, int value)
{
    const unsigned generation = barrier.generation;
    barrier.sum += value;
    if (++barrier.arrived == barrier.members) {
        barrier.result = barrier.sum;
        barrier.sum = barrier.arrived = 0;
        ++barrier.generation;
        progress = true;
    }
    while (barrier.generation == generation)
        yield();
    return barrier.result;
}

template <class T> T exchange(T value, unsigned lane)
{
    const unsigned own = threadIdx.x, warp = own / warp_size;
    std::memcpy(&lanes[own], &value, sizeof value);
    wait(warps[warp], 0);
    std::memcpy(&value, &lanes[warp * warp_size + lane], sizeof value);
    wait(warps[warp], 0);
    return value;
}

inline void main_of_a_fibre()
{
    body(arguments);
    fibres[threadIdx.x].done = true;
    progress = true;
    _longjmp(scheduler, 1);
}

// Runs a fibre until it waits or ends. Not inlined: a jump back would spoil the variables of whoever calls it.
__attribute__((noinline)) static void resume(unsigned thread)
{
    Fibre& fibre = fibres[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler))
        return;
    if (fibre.begun)
        _longjmp(fibre.here, 1);
    fibre.begun = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.data();
    fibre.start.uc_stack.ss_size = stack_size;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, main_of_a_fibre, 0);
    setcontext(&fibre.start);
}

inline void run_block(std::mt19937& chance)
{
    const int threads = blockDim.x;
    if ((int)fibres.size() < threads)
        fibres.resize(threads);
    block = Barrier();
    block.members = threads;
    warps.assign(threads / warp_size, Barrier());
    for (Barrier& warp : warps)
        warp.members = warp_size;
    lanes.resize(threads);
    std::vector<unsigned> order(threads);
    for (int thread = 0; thread < threads; ++thread) {
        order[thread] = thread;
        fibres[thread].begun = fibres[thread].done = false;
        fibres[thread].stack.resize(stack_size);
    }
    for (int left = threads; left > 0;) {
        progress = false;
        std::shuffle(order.begin(), order.end(), chance);
        for (unsigned thread : order) {
            if (fibres[thread].done)
                continue;
            resume(thread);
            left -= fibres[thread].done;
        }
        if (!progress) {
            std::fprintf(stderr, "block %u: threads wait at a barrier that others do not reach\n", blockIdx.x);
            std::abort();
        }
    }
}

inline void run(unsigned grid, unsigned threads, unsigned seed, void (*kernel)(void**), void** given)
{
    std::mt19937 chance(seed);
    body = kernel;
    arguments = given;
    gridDim.x = grid;
    blockDim.x = threads;
    for (unsigned number = 0; number < grid; ++number) {
        blockIdx.x = number;
        run_block(chance);
    }
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** given, std::index_sequence<I...>)
{
    kernel(*static_cast<A*>(given[I])...);
}

template <class... A> void call(void (*kernel)(A...), void** given)
{
    call(kernel, given, std::index_sequence_for<A...>());
}

} // namespace emulator

// A function launch_NAME(grid, threads, seed, arguments): arguments are pointers to each, as of cuLaunchKernel.
#define EMULATED(name)                                                                                   \
    extern "C" void launch_##name(unsigned grid, unsigned threads, unsigned seed, void** given)          \
    {                                                                                                    \
        emulator::run(grid, threads, seed, [](void** each) { emulator::call(name, each); }, given);      \
    }

inline void __syncthreads() { emulator::wait(emulator::block, 0); }
inline int __syncthreads_count(int predicate) { return emulator::wait(emulator::block, predicate != 0); }
template <class T> T __shfl_xor_sync(unsigned, T value, int lanes)
{
    return emulator::exchange(value, (threadIdx.x % emulator::warp_size) ^ lanes);
}

template <class T> T atomicAdd(T* address, T value)
{
    const T before = *address;
    *address = before + value;
    return before;
}

inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits)
{
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline unsigned short half_of(float x)
{
    const _Float16 half = (_Float16)x;
    unsigned short bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

inline float float_of_half(unsigned short bits)
{
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    return (float)half;
}
