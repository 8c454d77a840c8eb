// The Python module stable_rlhf._C. Arrays arrive as addresses; the Python side keeps the tensors alive and checks them.
// Each bind_NAME is at the end of NAME.cpp.
#include <pybind11/pybind11.h>

#include "isa.h"
#include "parallel.h"

namespace stable_rlhf {
void bind_advantage(pybind11::module_& m);
void bind_kmeans(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_policy(pybind11::module_& m);
void bind_policy_call(pybind11::module_& m);
void bind_sequence(pybind11::module_& m);
void bind_swav(pybind11::module_& m);
void bind_topk(pybind11::module_& m);
void bind_unit_rows(pybind11::module_& m);
void bind_whiten(pybind11::module_& m);
void bind_wide_product(pybind11::module_& m);
}  // namespace stable_rlhf

PYBIND11_MODULE(_C, m) {
    using namespace stable_rlhf;
    m.doc() = "CPU kernels of stable_rlhf";
    watch_forks();
    m.def("isa_names", [] {
        pybind11::list names;
        for (const char* const* name = isa_names(); *name; ++name) names.append(*name);
        return names;
    });
    m.def("shared_loops", &shared_loops);
    for (const auto bind : {bind_advantage, bind_kmeans, bind_memory, bind_policy, bind_policy_call, bind_sequence,
                            bind_swav, bind_topk, bind_unit_rows, bind_whiten, bind_wide_product}) {
        bind(m);
    }
}
