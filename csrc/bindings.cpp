// pkt_fast._native: addresses, strides, dtype codes and a thread count in; nothing of torch.
//
// The callers in pkt_fast/ops have checked devices, dtypes, shapes and bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#if defined(PKT_HAVE_CUDA)
#include "cuda/cuda_kernels.h"
#endif

namespace py = pybind11;
using pkt::Activation;

namespace {

const void* address(std::uintptr_t at) { return reinterpret_cast<const void*>(at); }
void* writable(std::uintptr_t at) { return reinterpret_cast<void*>(at); }

// (address, batch stride, row stride); an address of 0 stands for an absent tensor.
using ActivationArgs = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

Activation activation(const ActivationArgs& x) {
  return {address(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}

// (address, dtype, row stride)
using RowsArgs = std::tuple<std::uintptr_t, int, std::int64_t>;

pkt::Rows rows_of(const RowsArgs& x) {
  return {address(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}

// (address, count)
using IndexArgs = std::tuple<std::uintptr_t, std::int64_t>;
// (dtype, rows per batch, dim, value, minus, other, other_minus)
using OperandArgs = std::tuple<int, std::int64_t, std::int64_t, ActivationArgs, ActivationArgs,
                               ActivationArgs, ActivationArgs>;
// (lam, scale, normalize)
using BlendArgs = std::tuple<double, double, bool>;

pkt::CaptureRows capture_of(const RowsArgs& out, const IndexArgs& index,
                            const OperandArgs& operands, const BlendArgs& blend, int threads) {
  const auto& [out_at, out_dtype, out_stride] = out;
  const auto& [index_at, count] = index;
  const auto& [dtype, rows_per_batch, dim, value, minus, other, other_minus] = operands;
  const auto& [lam, scale, normalize] = blend;
  return {writable(out_at),
          out_dtype,
          out_stride,
          static_cast<const std::int64_t*>(address(index_at)),
          count,
          dim,
          dtype,
          rows_per_batch,
          activation(value),
          activation(minus),
          activation(other),
          activation(other_minus),
          lam,
          scale,
          normalize,
          threads};
}

// Returns the position of the first index outside [0, rows), or -1 when all rows were captured.
std::int64_t capture_rows(const RowsArgs& out, const IndexArgs& index, const OperandArgs& operands,
                          const BlendArgs& blend, std::int64_t rows, int threads) {
  const pkt::CaptureRows job = capture_of(out, index, operands, blend, threads);
  for (std::int64_t n = 0; n < job.count; ++n) {
    if (job.index[n] < 0 || job.index[n] >= rows) return n;
  }
  py::gil_scoped_release unlocked;
  pkt::kernels().capture_rows(job);
  return -1;
}

void grad_x_act(std::uintptr_t with_sign, std::uintptr_t absolute, std::int64_t batch,
                std::int64_t tokens, std::int64_t dim, int gradient_dtype,
                const ActivationArgs& gradient, int activation_dtype,
                const ActivationArgs& activations, int threads) {
  pkt::GradXAct job{writable(with_sign), writable(absolute),   batch,
                    tokens,              dim,                  gradient_dtype,
                    activation_dtype,    activation(gradient), activation(activations),
                    threads};
  py::gil_scoped_release unlocked;
  pkt::kernels().grad_x_act(job);
}

// Addresses of 0 for the gradients that are not wanted, and for the weight when none is.
void row_cosine(std::int64_t rows, std::int64_t dim, const RowsArgs& x, const RowsArgs& y,
                std::uintptr_t cosines, std::uintptr_t weight, std::int64_t weight_stride,
                std::uintptr_t dx, std::uintptr_t dy, int threads) {
  pkt::RowCosine job{writable(cosines), address(weight), weight_stride, rows,
                     dim,               rows_of(x),      rows_of(y),    writable(dx),
                     writable(dy),      threads};
  py::gil_scoped_release unlocked;
  pkt::kernels().row_cosine(job);
}

// (address, dtype, row stride, column stride)
using FactorArgs = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t>;
// ((address, dtype, rows, columns, row stride), left, right, rank, (backup, its row stride), scale)
using WeightArgs = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t>;
using BackupArgs = std::tuple<std::uintptr_t, std::int64_t>;
using MatrixArgs =
    std::tuple<WeightArgs, FactorArgs, FactorArgs, std::int64_t, BackupArgs, double>;

pkt::Factor factor(const FactorArgs& x) {
  return {address(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

std::vector<pkt::Matrix> matrices_of(const std::vector<MatrixArgs>& args) {
  std::vector<pkt::Matrix> matrices;
  for (const auto& [weight, left, right, rank, backup, scale] : args) {
    const auto [at, dtype, rows, columns, stride] = weight;
    matrices.push_back({writable(at), dtype, rows, columns, stride, factor(left), factor(right),
                        rank, writable(std::get<0>(backup)), std::get<1>(backup), scale});
  }
  return matrices;
}

pkt::Inject inject_of(const std::vector<pkt::Matrix>& matrices, std::uintptr_t unchanged,
                      std::optional<std::uint64_t> seed, int threads) {
  return {matrices.data(),
          std::int64_t(matrices.size()),
          static_cast<std::int64_t*>(writable(unchanged)),
          seed.has_value(),
          seed.value_or(0),
          threads};
}

void inject(const std::vector<MatrixArgs>& args, std::uintptr_t unchanged,
            std::optional<std::uint64_t> seed, int threads) {
  const std::vector<pkt::Matrix> matrices = matrices_of(args);
  const pkt::Inject job = inject_of(matrices, unchanged, seed, threads);
  py::gil_scoped_release unlocked;
  pkt::kernels().inject(job);
}

void gemm(std::uintptr_t out, std::int64_t out_stride, bool wide, std::int64_t rows,
          std::int64_t columns, std::int64_t depth, const FactorArgs& left, const FactorArgs& right,
          int right_part, bool upper, bool accumulate, bool unit_rows, int threads) {
  pkt::Gemm job{writable(out), out_stride, rows,  columns,    depth,     factor(left),
                factor(right), wide,       right_part, upper, accumulate, unit_rows, threads};
  py::gil_scoped_release unlocked;
  pkt::kernels().gemm(job);
}

// Addresses of 0 for the slopes where none are wanted.
void relation(const RowsArgs& x, std::int64_t x_dim, const RowsArgs& y, std::int64_t y_dim,
              const IndexArgs& starts, bool wide, std::uintptr_t inner, std::uintptr_t norm_x,
              std::uintptr_t norm_y, std::uintptr_t of_inner, std::uintptr_t of_norm,
              int threads) {
  const auto& [starts_at, count] = starts;
  pkt::Relation job{rows_of(x),
                    rows_of(y),
                    x_dim,
                    y_dim,
                    static_cast<const std::int64_t*>(address(starts_at)),
                    count - 1,
                    wide,
                    writable(inner),
                    writable(norm_x),
                    writable(norm_y),
                    writable(of_inner),
                    writable(of_norm),
                    threads};
  py::gil_scoped_release unlocked;
  pkt::kernels().relation(job);
}

#if defined(PKT_HAVE_CUDA)

void raise_on(const char* failure) {
  if (failure) throw std::runtime_error(std::string("CUDA: ") + failure);
}

// None when the extension's kernels run on the current device.
std::optional<std::string> cuda_problem() {
  const char* problem = pkt::cuda::problem();
  return problem ? std::optional<std::string>(problem) : std::nullopt;
}

// `table` is device memory of inject_table_bytes(len(args)) bytes.
void inject_cuda(const std::vector<MatrixArgs>& args, std::uintptr_t unchanged,
                 std::optional<std::uint64_t> seed, std::uintptr_t table, std::uintptr_t stream) {
  const std::vector<pkt::Matrix> matrices = matrices_of(args);
  raise_on(pkt::cuda::inject(inject_of(matrices, unchanged, seed, 1), writable(table), stream));
}

void capture_rows_pinned(const RowsArgs& out, const IndexArgs& index, const OperandArgs& operands,
                         const BlendArgs& blend, std::int64_t rows, std::uintptr_t stream) {
  const pkt::CaptureRows job = capture_of(out, index, operands, blend, 1);
  raise_on(pkt::cuda::capture_rows_pinned(job, rows, stream));
}

#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = PKT_COMPILER;
  info["isas"] = PKT_ISAS;
  info["isa"] = pkt::kernels().isa;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda_archs"] = PKT_CUDA_ARCHS;
  info["cuda_version"] = PKT_CUDA_VERSION;
  info["sources"] = PKT_SOURCES;
  return info;
}

void check_wanted_isa() {
  const char* wanted = std::getenv("PKT_FAST_ISA");
  if (wanted && *wanted && !pkt::isa_available(wanted)) {
    throw py::import_error(std::string("PKT_FAST_ISA=") + wanted +
                           ": not compiled in, or not supported by this processor (have " PKT_ISAS
                           ")");
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU and CUDA kernels of pkt_fast";
  check_wanted_isa();
  m.def("build_info", &build_info, "compiler, isas (compiled), isa (in use), openmp, cuda_archs, cuda_version, sources (digest)");
  m.def("isa_available", &pkt::isa_available);
  m.def("vendor", &pkt::vendor, "who made the processor: intel, amd or other");
  m.def("capture_rows", &capture_rows);
  m.def("grad_x_act", &grad_x_act);
  m.def("row_cosine", &row_cosine);
  m.def("inject", &inject);
  m.def("gemm", &gemm);
  m.def("relation", &relation);
#if defined(PKT_HAVE_CUDA)
  m.def("cuda_problem", &cuda_problem, "why the CUDA kernels cannot run on the current GPU, or None");
  m.def("inject_table_bytes", &pkt::cuda::inject_table_bytes);
  m.def("inject_cuda", &inject_cuda);
  m.def("capture_rows_pinned", &capture_rows_pinned);
#endif
}
