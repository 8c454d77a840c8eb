// Memory that a thread keeps from call to call: fresh pages would cost as much as they save.
#pragma once

#include <cstdint>
#include <vector>

namespace stable_rlhf {

// Room for so many numbers, at the beginning of a line of the cache. `kept` is the thread's own.
template <typename Number>
Number* room(std::vector<Number>& kept, int64_t numbers) {
    const size_t line = 64, needed = static_cast<size_t>(numbers) + line / sizeof(Number);
    if (kept.size() < needed) kept.resize(needed);
    return reinterpret_cast<Number*>((reinterpret_cast<std::uintptr_t>(kept.data()) + line - 1) / line * line);
}

}  // namespace stable_rlhf
