// A minimal parallel loop on std::thread. OpenMP is avoided on purpose: two OpenMP runtimes in one process (torch brings
// its own) can oversubscribe or crash.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace stable_rlhf {

// Calls body(begin, end) over [0, n) in blocks of `grain`, on at most num_threads threads (the caller's is one of them).
// Results must not depend on which thread takes which block. `body` must not throw.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, int num_threads, const Body& body) {
    const int64_t blocks = (n + grain - 1) / grain;
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, blocks));
    if (threads <= 1) {
        if (n > 0) body(int64_t{0}, n);
        return;
    }
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t block = next++; block < blocks; block = next++) {
            body(block * grain, std::min(n, (block + 1) * grain));
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    for (int i = 1; i < threads; ++i) {
        try {
            helpers.emplace_back(work);
        } catch (...) {
            break;  // the system gives no more threads: those there are (at least the caller's) do the work
        }
    }
    work();
    for (auto& helper : helpers) helper.join();
}

}  // namespace stable_rlhf
