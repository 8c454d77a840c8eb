// A parallel loop on the threads that torch already has. See parallel.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace stable_rlhf {

// What a loop takes one thread, in nanoseconds, from where on it is shared out. Where another process wants the cores,
// OpenMP's barrier waits for a worker that has none, up to a time slice of the system: a hundred times what a small loop
// takes. Between products of torch that risk is run anyway, and the workers are awake.
constexpr double kWorthThreads = 1e6, kWorthThreadsBetweenProducts = 2e5;

inline int threads_for(double nanoseconds, int num_threads, double worth = kWorthThreads) {
    return nanoseconds < worth ? 1 : num_threads;
}

// How many loops have been shared out to threads since the module was loaded.
int64_t shared_loops();
// From now on a forked child is told from its parent; called when the module is loaded.
void watch_forks();

// Calls work(data) once on each of up to `threads` threads, the caller's among them, and returns when all have ended.
void run_on_threads(int threads, void (*work)(void*), void* data);

// Calls body(begin, end) over [0, n) in blocks of `grain`, on at most num_threads threads; on one where all of it takes
// less than `worth`, by the caller's estimate of what one of the n costs on one thread.
// Results must not depend on which thread takes which block. `body` must not throw.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, double nanoseconds_each, int num_threads, const Body& body,
                  double worth = kWorthThreads) {
    const int64_t blocks = (n + grain - 1) / grain;
    num_threads = threads_for(nanoseconds_each * static_cast<double>(n), num_threads, worth);
    if (num_threads <= 1 || blocks <= 1) {
        if (n > 0) body(int64_t{0}, n);
        return;
    }
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t block = next++; block < blocks; block = next++) {
            body(block * grain, std::min(n, (block + 1) * grain));
        }
    };
    // Threads without a block leave at once. Their number stays the same from loop to loop: OpenMP ends and starts
    // threads when it changes.
    run_on_threads(num_threads, [](void* it) { (*static_cast<decltype(work)*>(it))(); }, &work);
}

}  // namespace stable_rlhf
