// Where the threads of a loop come from: the OpenMP runtime that libtorch_cpu itself is linked to, when there is one.
//
// torch's workers spin for a while after each of its operations. Threads of our own would share the cores with them (a
// loop of 2 ms took 3 to 7); the same workers are awake and free. We do not link an OpenMP of our own, since two
// runtimes in one process oversubscribe or crash: we look up torch's by the handle of its library.
#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace stable_rlhf {
namespace {

std::atomic<int64_t> shared{0};

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);  // GOMP_parallel, fixed since GCC 4.9

#if defined(__linux__)
std::atomic<bool> forked{false};  // the workers do not exist in a forked child, where OpenMP would wait for them forever

Parallel find_parallel() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);  // null unless torch is loaded
    if (torch == nullptr) return nullptr;
    // A symbol by handle is searched in the library and in what it depends on, nowhere else. Intel's and LLVM's runtimes
    // have this entry point too.
    auto symbol = reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel"));
    dlclose(torch);
    return symbol;
}

Parallel torch_threads() {
    static const Parallel symbol = find_parallel();
    return forked ? nullptr : symbol;
}
#else
Parallel torch_threads() { return nullptr; }
#endif

void run_on_own_threads(int threads, void (*work)(void*), void* data) {
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    for (int i = 1; i < threads; ++i) {
        try {
            helpers.emplace_back(work, data);
        } catch (...) {
            break;  // the system gives no more threads: those there are (at least the caller's) do the work
        }
    }
    work(data);
    for (auto& helper : helpers) helper.join();
}

}  // namespace

void watch_forks() {
#if defined(__linux__)
    if (pthread_atfork(nullptr, nullptr, [] { forked = true; }) != 0) forked = true;
#endif
}

int64_t shared_loops() { return shared; }

void run_on_threads(int threads, void (*work)(void*), void* data) {
    ++shared;
    if (const Parallel parallel = torch_threads()) {
        parallel(work, data, static_cast<unsigned>(threads), 0);
    } else {
        run_on_own_threads(threads, work, data);
    }
}

}  // namespace stable_rlhf
