// The Python module stable_rlhf._C. Arrays arrive as addresses; the Python side keeps the tensors alive and checks them.
#include <pybind11/pybind11.h>

#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
void bind_all(py::module_& m, const char* suffix) {
    using namespace stable_rlhf;
    using Address = std::uintptr_t;
    const auto without_gil = py::call_guard<py::gil_scoped_release>();
    m.def((std::string("gae_") + suffix).c_str(),
          [](Address reward, Address value, Address cu_seqlens, Address bootstrap_value, int64_t num_sequences, T gamma,
             T decay, int num_threads, Address advantage, Address returns) {
              gae<T>(at<const T>(reward), at<const T>(value), at<const int64_t>(cu_seqlens),
                     at<const T>(bootstrap_value), num_sequences, gamma, decay, num_threads, at<T>(advantage),
                     at<T>(returns));
          },
          without_gil);
    m.def((std::string("topk_by_cluster_") + suffix).c_str(),
          [](Address score, Address cluster, int64_t n, int64_t num_clusters, int64_t k, int num_threads, Address out) {
              return topk_by_cluster<T>(at<const T>(score), at<const int64_t>(cluster), n, num_clusters, k, num_threads,
                                        at<int64_t>(out));
          },
          without_gil);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of stable_rlhf";
    bind_all<float>(m, "f32");
    bind_all<double>(m, "f64");
}
