// Sums of g·a and |g·a| per example, in one pass over both tensors.
#include "cpu/simd.h"

namespace pkt {
namespace PKT_ISA {

void grad_x_act(const GradXAct& job);

namespace {

// A task is this many elements, whatever the number of threads: the sums do not depend on it.
constexpr int64_t kTaskElements = int64_t(1) << 16;
// Sums in Scalar run over about this many elements, then continue in double.
constexpr int64_t kPieceElements = 4096;

struct Sums {
  double with_sign, absolute;
};

template <class G, class A>
Sums exact_row(const G* g, const A* a, int64_t dim) {
  Sums sums{0, 0};
  for (int64_t i = 0; i < dim; ++i) {
    const double product = double(widen(g[i])) * double(widen(a[i]));
    sums.with_sign += product;
    sums.absolute += std::fabs(product);
  }
  return sums;
}

template <class G, class A>
Sums row_sums(const G* g, const A* a, int64_t dim) {
  using Vector = typename Math<G>::Vector;
  using Scalar = typename Math<G>::Scalar;
  constexpr int width = Vector::width, step = 4 * width;
  const Vector zero = splat(Scalar(0));
  Vector with_sign[4] = {zero, zero, zero, zero}, absolute[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + step <= dim; i += step) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + part * width;
      const Vector product = load(g + at) * load(a + at);
      with_sign[part] = with_sign[part] + product;
      absolute[part] = absolute[part] + abs(product);
    }
  }
  Sums sums{double(sum((with_sign[0] + with_sign[1]) + (with_sign[2] + with_sign[3]))),
            double(sum((absolute[0] + absolute[1]) + (absolute[2] + absolute[3])))};
  const Sums tail = exact_row(g + i, a + i, dim - i);
  sums.with_sign += tail.with_sign;
  sums.absolute += tail.absolute;
  // Products beyond float32 must not end as inf - inf.
  if (sizeof(Scalar) == 4 && !(sums.absolute < 1e38)) return exact_row(g, a, dim);
  return sums;
}

template <class G, class A>
void reduce(const GradXAct& job) {
  using Scalar = typename Math<G>::Scalar;
  const int64_t dim = job.dim;
  const int64_t rows_per_task = dim > 0 && dim < kTaskElements ? kTaskElements / dim : 1;
  const bool contiguous = job.gradient.row_stride == dim && job.activation.row_stride == dim;
  const int64_t rows_per_piece = contiguous && dim > 0 && dim < kPieceElements
                                     ? (kPieceElements + dim - 1) / dim : 1;
  const int64_t tasks_per_example = (job.tokens + rows_per_task - 1) / rows_per_task;
  const int64_t tasks = job.batch * tasks_per_example;
  Sums* const partial = new Sums[tasks];
#pragma omp parallel for num_threads(job.threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t example = task / tasks_per_example;
    const int64_t first = task % tasks_per_example * rows_per_task;
    const int64_t end = first + rows_per_task < job.tokens ? first + rows_per_task : job.tokens;
    const G* g = static_cast<const G*>(job.gradient.data) + example * job.gradient.batch_stride;
    const A* a = static_cast<const A*>(job.activation.data) + example * job.activation.batch_stride;
    Sums sums{0, 0};
    for (int64_t row = first; row < end; row += rows_per_piece) {
      const int64_t rows = row + rows_per_piece < end ? rows_per_piece : end - row;
      const Sums more = row_sums(g + row * job.gradient.row_stride,
                                 a + row * job.activation.row_stride, rows * dim);
      sums.with_sign += more.with_sign;
      sums.absolute += more.absolute;
    }
    partial[task] = sums;
  }
  for (int64_t example = 0; example < job.batch; ++example) {
    Sums sums{0, 0};
    for (int64_t task = 0; task < tasks_per_example; ++task) {
      sums.with_sign += partial[example * tasks_per_example + task].with_sign;
      sums.absolute += partial[example * tasks_per_example + task].absolute;
    }
    static_cast<Scalar*>(job.with_sign)[example] = Scalar(sums.with_sign);
    static_cast<Scalar*>(job.absolute)[example] = Scalar(sums.absolute);
  }
  delete[] partial;
}

template <class G>
void reduce_with(const GradXAct& job) {
  if (job.activation_dtype == kFloat32) reduce<G, float>(job);
  if (job.activation_dtype == kBFloat16) reduce<G, bf16>(job);
  if (job.activation_dtype == kFloat16) reduce<G, f16>(job);
}

}  // namespace

void grad_x_act(const GradXAct& job) {
  if (job.gradient_dtype == kFloat32) reduce_with<float>(job);
  if (job.gradient_dtype == kBFloat16) reduce_with<bf16>(job);
  if (job.gradient_dtype == kFloat16) reduce_with<f16>(job);
  if (job.gradient_dtype == kFloat64) reduce<double, double>(job);
}

}  // namespace PKT_ISA
}  // namespace pkt
