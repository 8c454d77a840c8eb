// Advice to the system on memory that is about to be written to for the first time.
#include <pybind11/pybind11.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace stable_rlhf {

// Large pages for the whole small pages within [at, at + bytes): nothing beside them changes, and nothing where the system
// has none or does not give them.
void prefer_large_pages(std::uintptr_t at, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    static const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t begin = (at + page - 1) / page * page;
    const std::uintptr_t end = (at + static_cast<std::uintptr_t>(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)at, (void)bytes;
#endif
}

void bind_memory(pybind11::module_& m) { m.def("prefer_large_pages", &prefer_large_pages); }

}  // namespace stable_rlhf
