// The Python module stable_rlhf._C. Arrays arrive as addresses; the Python side keeps the tensors alive and checks them.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "advantage.h"
#include "isa.h"
#include "parallel.h"
#include "policy.h"
#include "sequence.h"
#include "swav.h"
#include "topk.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void need(bool ran, const std::string& isa) {
    if (!ran) throw std::runtime_error("this processor cannot run the kernels for '" + isa + "'");
}

// Addresses of 0 are absent arrays; see policy.h for what each argument is.
void bind_rows(py::module_& m) {
    using namespace stable_rlhf;
    using Address = std::uintptr_t;
    m.def(
        "rows",
        [](int mode, int type, Address logits, Address gradient, int64_t logits_stride, int64_t gradient_stride,
           Address row, int64_t count, int64_t vocabulary, Address target, Address inverse_temperature, double softcap,
           Address kind, Address old_logprob, Address advantage, Address ref_logprob, Address row_weight,
           double clip_low, double clip_high, double dual_clip, double kl_coef, int kl_estimator, double entropy_coef,
           double log_ratio_clamp, double policy_scale, double rehearsal_scale, Address coefficient,
           Address entropy_coefficient, Address logprob, Address entropy, Address max, Address log_sum,
           Address weighted, Address target_logit, Address kept, int num_threads, const std::string& isa) {
            Rows call{};
            call.mode = static_cast<RowsMode>(mode);
            call.type = static_cast<LogitsType>(type);
            call.logits = at<const void>(logits);
            call.gradient = at<void>(gradient);
            call.logits_stride = logits_stride;
            call.gradient_stride = gradient_stride;
            call.row = at<const int64_t>(row);
            call.count = count;
            call.vocabulary = vocabulary;
            call.target = at<const int64_t>(target);
            call.inverse_temperature = at<const float>(inverse_temperature);
            call.softcap = static_cast<float>(softcap);
            call.policy = PolicyTerms{at<const int8_t>(kind),      at<const float>(old_logprob),
                                      at<const float>(advantage),  at<const float>(ref_logprob),
                                      at<const float>(row_weight), clip_low,
                                      clip_high,                   dual_clip,
                                      kl_coef,                     kl_estimator,
                                      entropy_coef,                log_ratio_clamp,
                                      policy_scale,                rehearsal_scale};
            call.coefficient = at<float>(coefficient);
            call.entropy_coefficient = at<float>(entropy_coefficient);
            call.logprob = at<float>(logprob);
            call.entropy = at<float>(entropy);
            call.max = at<float>(max);
            call.log_sum = at<float>(log_sum);
            call.weighted = at<float>(weighted);
            call.target_logit = at<float>(target_logit);
            call.kept = at<int64_t>(kept);
            call.num_threads = num_threads;
            const int64_t found = stable_rlhf::rows(call, isa.c_str());
            need(found >= 0, isa);
            return found;
        },
        py::kw_only(), py::arg("mode"), py::arg("type"), py::arg("logits"), py::arg("gradient") = 0,
        py::arg("logits_stride"), py::arg("gradient_stride") = 0, py::arg("row") = 0, py::arg("count"),
        py::arg("vocabulary"), py::arg("target"), py::arg("inverse_temperature"), py::arg("softcap") = 0.0,
        py::arg("kind") = 0, py::arg("old_logprob") = 0, py::arg("advantage") = 0, py::arg("ref_logprob") = 0,
        py::arg("row_weight") = 0, py::arg("clip_low") = 0.0, py::arg("clip_high") = 0.0, py::arg("dual_clip") = 0.0,
        py::arg("kl_coef") = 0.0, py::arg("kl_estimator") = 3, py::arg("entropy_coef") = 0.0,
        py::arg("log_ratio_clamp") = 20.0, py::arg("policy_scale") = 0.0, py::arg("rehearsal_scale") = 0.0,
        py::arg("coefficient") = 0, py::arg("entropy_coefficient") = 0, py::arg("logprob") = 0,
        py::arg("entropy") = 0, py::arg("max") = 0, py::arg("log_sum") = 0, py::arg("weighted") = 0,
        py::arg("target_logit") = 0, py::arg("kept") = 0, py::arg("num_threads") = 1, py::arg("isa") = "",
        py::call_guard<py::gil_scoped_release>());
    const auto without_gil = py::call_guard<py::gil_scoped_release>();
    m.def("select_columns",  // thresholds of 0: only the peaks
          [](int type, Address gradient, Address rows, int64_t stride, int64_t count, int64_t vocabulary,
             Address inverse_scale, Address thresholds, int num_thresholds, Address peaks, Address masses,
             int num_threads, const std::string& isa) {
              Columns call{};
              call.type = static_cast<LogitsType>(type);
              call.gradient = at<const void>(gradient);
              call.rows = at<const int64_t>(rows);
              call.stride = stride;
              call.count = count;
              call.vocabulary = vocabulary;
              call.inverse_scale = at<const float>(inverse_scale);
              call.thresholds = at<const float>(thresholds);
              call.num_thresholds = num_thresholds;
              call.peaks = at<float>(peaks);
              call.masses = at<float>(masses);
              call.num_threads = num_threads;
              need(num_thresholds == 0 ? column_peaks(call, isa.c_str()) : dropped_masses(call, isa.c_str()), isa);
          },
          without_gil);
    m.def("gather_columns",
          [](Address gradient, int64_t stride, int bytes, Address rows, int64_t num_rows, Address columns,
             int64_t num_columns, Address out, int num_threads) {
              gather_columns(at<const void>(gradient), stride, bytes, at<const int64_t>(rows), num_rows,
                             at<const int64_t>(columns), num_columns, at<void>(out), num_threads);
          },
          without_gil);
}

// Addresses of 0 are absent arrays; see advantage.h for what each argument is.
template <typename T>
void bind_advantage(py::module_& m, const char* name) {
    using namespace stable_rlhf;
    using Address = std::uintptr_t;
    m.def(
        name,
        [](int64_t responses, int64_t prompts, int64_t pairs, int64_t policies, int64_t alternates, int64_t tokens,
           Address reward, Address expected, int prompt_rule, Address prompt, Address pair, bool bounds, Address margin,
           T all_margin, Address rank_margin, T all_rank_margin, Address smoothing, T all_smoothing, Address weight,
           T all_weight, Address logprob, Address alt_logprob, Address cu_seqlens, bool length_normalized,
           double max_log_weight, Address loss, Address score, Address gradient, Address expected_gradient,
           Address statistics, int num_threads, const std::string& isa) {
            Advantage<T> call{};
            call.responses = responses;
            call.prompts = prompts;
            call.pairs = pairs;
            call.policies = policies;
            call.alternates = alternates;
            call.reward = at<const T>(reward);
            call.expected = at<const T>(expected);
            call.prompt_rule = static_cast<PromptRule>(prompt_rule);
            call.prompt = at<const int64_t>(prompt);
            call.pair = at<const int64_t>(pair);
            call.bounds = bounds;
            call.margin = {at<const T>(margin), all_margin};
            call.rank_margin = {at<const T>(rank_margin), all_rank_margin};
            call.label_smoothing = {at<const T>(smoothing), all_smoothing};
            call.pair_weight = {at<const T>(weight), all_weight};
            call.tokens = tokens;
            call.logprob = at<const T>(logprob);
            call.alt_logprob = at<const T>(alt_logprob);
            call.cu_seqlens = at<const int64_t>(cu_seqlens);
            call.length_normalized = length_normalized;
            call.max_log_weight = max_log_weight;
            call.loss = at<T>(loss);
            call.score = at<T>(score);
            call.gradient = at<T>(gradient);
            call.expected_gradient = at<T>(expected_gradient);
            call.statistics = at<T>(statistics);
            call.num_threads = num_threads;
            const int status = advantage(call, isa.c_str());
            need(status >= 0, isa);
            return status == 0;
        },
        py::call_guard<py::gil_scoped_release>());
}

// The operations on packed sequences and the selection, for one type of numbers; see their headers.
template <typename T>
void bind_sequences(py::module_& m, const std::string& suffix) {
    using namespace stable_rlhf;
    using Address = std::uintptr_t;
    const auto without_gil = py::call_guard<py::gil_scoped_release>();
    m.def(("gae_" + suffix).c_str(),
          [](Address reward, Address value, Address cu_seqlens, Address bootstrap_value, int64_t num_sequences,
             int64_t tokens, T gamma, T decay, int num_threads, Address advantage, Address returns) {
              return static_cast<int>(gae<T>(at<const T>(reward), at<const T>(value), at<const int64_t>(cu_seqlens),
                                             at<const T>(bootstrap_value), num_sequences, tokens, gamma, decay,
                                             num_threads, at<T>(advantage), at<T>(returns)));
          },
          without_gil);
    m.def(("token_rewards_" + suffix).c_str(),
          [](Address logprob, Address ref_logprob, Address score, Address cu_seqlens, int64_t num_sequences,
             int64_t tokens, T kl_coef, int kl_estimator, T clamp, int num_threads, Address reward,
             const std::string& isa) {
              const SequenceStatus status = token_rewards<T>(
                  at<const T>(logprob), at<const T>(ref_logprob), at<const T>(score), at<const int64_t>(cu_seqlens),
                  num_sequences, tokens, kl_coef, kl_estimator, clamp, num_threads, at<T>(reward), isa.c_str());
              need(status != SequenceStatus::no_kernels, isa);
              return static_cast<int>(status);
          },
          without_gil);
    m.def(("masked_moments_" + suffix).c_str(), [](Address x, Address mask, int64_t n, int num_threads) {
        Moments found{};
        {
            py::gil_scoped_release without;
            found = masked_moments<T>(at<const T>(x), at<const uint8_t>(mask), n, num_threads);
        }
        return py::make_tuple(found.count, found.mean, found.square);
    });
    m.def(("masked_scale_" + suffix).c_str(),
          [](Address x, Address mask, int64_t n, double mean, double variance, bool shift_mean, int num_threads,
             Address out) {
              masked_scale<T>(at<const T>(x), at<const uint8_t>(mask), n, mean, variance, shift_mean, num_threads,
                              at<T>(out));
          },
          without_gil);
    m.def(("topk_by_cluster_" + suffix).c_str(),
          [](Address score, Address cluster, bool narrow, int64_t n, int64_t num_clusters, int64_t k, int num_threads,
             Address out) {
              return narrow ? topk_by_cluster(at<const T>(score), at<const int32_t>(cluster), n, num_clusters, k,
                                              num_threads, at<int64_t>(out))
                            : topk_by_cluster(at<const T>(score), at<const int64_t>(cluster), n, num_clusters, k,
                                              num_threads, at<int64_t>(out));
          },
          without_gil);
}

// One Sinkhorn step and the swapped prediction on scores [2, rows, prototypes]; see swav.h for what each argument is.
void bind_swav(py::module_& m) {
    using namespace stable_rlhf;
    using Address = std::uintptr_t;
    const auto without_gil = py::call_guard<py::gil_scoped_release>();
    m.def("swav_log_sums",
          [](Address scores, int64_t rows, int64_t prototypes, Address potential, double inverse_epsilon,
                    Address log_sums, int num_threads, const std::string& isa) {
              Swav call{};
              call.scores = at<float>(scores);
              call.rows = rows;
              call.prototypes = prototypes;
              call.potential = at<const float>(potential);
              call.inverse_epsilon = inverse_epsilon;
              call.log_sums = at<float>(log_sums);
              call.num_threads = num_threads;
              need(swav_log_sums(call, isa.c_str()), isa);
          },
          without_gil);
    m.def("swav_loss",
          [](Address scores, int64_t rows, int64_t prototypes, Address potential, double inverse_epsilon,
                    double inverse_temperature, double scale, bool gradient, int num_threads, const std::string& isa) {
              Swav call{};
              double loss = 0.0;
              call.scores = at<float>(scores);
              call.rows = rows;
              call.prototypes = prototypes;
              call.potential = at<const float>(potential);
              call.inverse_epsilon = inverse_epsilon;
              call.inverse_temperature = inverse_temperature;
              call.scale = scale;
              call.gradient = gradient;
              call.loss = &loss;
              call.num_threads = num_threads;
              need(swav_loss(call, isa.c_str()), isa);
              return loss;
          },
          without_gil);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of stable_rlhf";
    m.def("isa_names", [] {
        py::list names;
        for (const char* const* name = stable_rlhf::isa_names(); *name; ++name) names.append(*name);
        return names;
    });
    m.def("shared_loops", &stable_rlhf::shared_loops);
    bind_advantage<float>(m, "advantage_f32");
    bind_advantage<double>(m, "advantage_f64");
    bind_rows(m);
    bind_sequences<float>(m, "f32");
    bind_sequences<double>(m, "f64");
    bind_swav(m);
}
