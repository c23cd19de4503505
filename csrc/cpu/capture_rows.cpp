// Gather rows, combine, scale to unit length, convert, write at their place: one read, one write.
#include "cpu/simd.h"

namespace pkt {
namespace PKT_ISA {

void capture_rows(const CaptureRows& job);

namespace {

// Outputs larger than this do not stay in the caches: write past them.
constexpr int64_t kStreamBytes = int64_t(8) << 20;
constexpr int64_t kRowsPerTask = 16;

template <class In>
struct Sources {
  const In* value;
  const In* minus;
  const In* other;
  const In* other_minus;
};

template <class In>
PKT_INLINE const In* row_of(const Activation& x, int64_t batch, int64_t row) {
  if (x.data == nullptr) return nullptr;
  return static_cast<const In*>(x.data) + batch * x.batch_stride + row * x.row_stride;
}

template <class In>
PKT_INLINE Sources<In> sources(const CaptureRows& job, int64_t position) {
  const int64_t flat = job.index[position];
  const int64_t batch = flat / job.rows_per_batch, row = flat % job.rows_per_batch;
  return {row_of<In>(job.value, batch, row), row_of<In>(job.minus, batch, row),
          row_of<In>(job.other, batch, row), row_of<In>(job.other_minus, batch, row)};
}

template <class In>
PKT_INLINE void prefetch(const Sources<In>& next, int64_t i) {
  PKT_PREFETCH(next.value + i);
  if (next.minus) PKT_PREFETCH(next.minus + i);
  if (next.other) PKT_PREFETCH(next.other + i);
  if (next.other_minus) PKT_PREFETCH(next.other_minus + i);
}

// a·(value − minus) + b·(other − other_minus) at i, in Real, which may be wider than In's own.
template <class Real, class In>
PKT_INLINE Real combined(const Sources<In>& from, int64_t i, Real a, Real b) {
  Real x = widen(from.value[i]);
  if (from.minus) x -= widen(from.minus[i]);
  x *= a;
  if (from.other) {
    Real y = widen(from.other[i]);
    if (from.other_minus) y -= widen(from.other_minus[i]);
    x += b * y;
  }
  return x;
}

// The combined row into `row`; returns its squared length.  Prefetches `next` alongside.
template <class In, class Vector, class Scalar>
Scalar combine(const Sources<In>& from, const Sources<In>& next, int64_t dim, Scalar a, Scalar b,
               Scalar* row) {
  constexpr int width = Vector::width, step = 4 * width;
  const Vector va = splat(a), vb = splat(b);
  Vector squares[4] = {splat(Scalar(0)), splat(Scalar(0)), splat(Scalar(0)), splat(Scalar(0))};
  int64_t i = 0;
  for (; i + step <= dim; i += step) {
    for (int64_t line = i; line < i + step; line += int64_t(64 / sizeof(In))) prefetch(next, line);
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + part * width;
      Vector x = load(from.value + at);
      if (from.minus) x = x - load(from.minus + at);
      x = x * va;
      if (from.other) {
        Vector y = load(from.other + at);
        if (from.other_minus) y = y - load(from.other_minus + at);
        x = fma(vb, y, x);
      }
      store(row + at, x);
      squares[part] = fma(x, x, squares[part]);
    }
  }
  Scalar total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < dim; ++i) {
    row[i] = combined<Scalar>(from, i, a, b);
    total += row[i] * row[i];
  }
  return total;
}

// The same where float32 would overflow or underflow: doubles scaled by their largest magnitude.
// The unit row (or the row itself) goes into `row`; a zero row stays zero.
template <class In, class Scalar>
void combine_extreme(const Sources<In>& from, int64_t dim, double a, double b, bool normalize,
                     Scalar* row) {
  double largest = 0, total = 0;
  for (int64_t i = 0; i < dim; ++i) {
    const double x = std::fabs(combined<double>(from, i, a, b));
    if (!(x <= largest)) largest = x;
  }
  const double down = largest > 0 ? 1 / largest : 0;
  const double exact = largest > 1e-300 && largest < 1e300 ? down : 0;
  for (int64_t i = 0; normalize && i < dim; ++i) {
    const double x = combined<double>(from, i, a, b);
    const double y = exact != 0 ? x * exact : largest > 0 ? x / largest : 0;
    total += y * y;
  }
  const double length = std::sqrt(total);
  for (int64_t i = 0; i < dim; ++i) {
    double x = combined<double>(from, i, a, b);
    if (normalize) x = largest > 0 ? x / largest / length : 0;
    row[i] = Scalar(x);
  }
}

template <class Out, class Vector, class Scalar>
void write(const Scalar* row, int64_t dim, Scalar factor, Out* out, bool past_caches) {
  constexpr int width = Vector::width;
  const Vector f = splat(factor);
  int64_t i = 0;
  if (past_caches) {
    for (; i + width <= dim; i += width) stream(out + i, load(row + i) * f);
  } else {
    for (; i + width <= dim; i += width) store(out + i, load(row + i) * f);
  }
  for (; i < dim; ++i) narrow(row[i] * factor, out + i);
}

template <class In, class Out>
void capture(const CaptureRows& job) {
  using Vector = typename Math<In>::Vector;
  using Scalar = typename Math<In>::Scalar;
  const Scalar a = Scalar(job.scale * (job.other.data ? 1 - job.lam : 1));
  const Scalar b = Scalar(job.scale * job.lam);
  // Squared lengths outside these bounds lose digits in Scalar.
  const Scalar low = sizeof(Scalar) == 4 ? Scalar(1e-20) : Scalar(1e-250);
  const Scalar high = sizeof(Scalar) == 4 ? Scalar(1e37) : Scalar(1e300);
  Out* const out = static_cast<Out*>(job.out);
  const int64_t row_bytes = job.dim * int64_t(sizeof(Out));
  const int64_t align = Vector::width * int64_t(sizeof(Out));
  const bool past_caches = job.count * row_bytes > kStreamBytes &&
                           reinterpret_cast<uintptr_t>(out) % align == 0 &&
                           job.out_stride * int64_t(sizeof(Out)) % align == 0;
  const int64_t tasks = (job.count + kRowsPerTask - 1) / kRowsPerTask;

#pragma omp parallel num_threads(job.threads)
  {
    Scalar* const row = new Scalar[job.dim];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t end = task + 1 < tasks ? (task + 1) * kRowsPerTask : job.count;
      Sources<In> next = sources<In>(job, task * kRowsPerTask);
      for (int64_t n = task * kRowsPerTask; n < end; ++n) {
        const Sources<In> from = next;
        next = sources<In>(job, n + 1 < job.count ? n + 1 : n);
        const Scalar squares = combine<In, Vector, Scalar>(from, next, job.dim, a, b, row);
        Scalar factor = 1;
        if (!(squares >= low && squares <= high)) {
          combine_extreme(from, job.dim, double(a), double(b), job.normalize, row);
        } else if (job.normalize) {
          factor = Scalar(1 / std::sqrt(double(squares)));
        }
        write<Out, Vector>(row, job.dim, factor, out + n * job.out_stride, past_caches);
      }
    }
    if (past_caches) stream_fence();
    delete[] row;
  }
}

void copy(const CaptureRows& job) {
  const int64_t item = item_size(job.dtype), bytes = job.dim * item;
  const char* const value = static_cast<const char*>(job.value.data);
  char* const out = static_cast<char*>(job.out);
#pragma omp parallel for num_threads(job.threads) schedule(static)
  for (int64_t n = 0; n < job.count; ++n) {
    const int64_t batch = job.index[n] / job.rows_per_batch;
    const int64_t row = job.index[n] % job.rows_per_batch;
    const int64_t at = batch * job.value.batch_stride + row * job.value.row_stride;
    std::memcpy(out + n * job.out_stride * item, value + at * item, size_t(bytes));
  }
}

template <class In>
void capture_to(const CaptureRows& job) {
  if (job.out_dtype == kFloat32) capture<In, float>(job);
  if (job.out_dtype == kBFloat16) capture<In, bf16>(job);
  if (job.out_dtype == kFloat16) capture<In, f16>(job);
}

}  // namespace

void capture_rows(const CaptureRows& job) {
  const bool plain = job.minus.data == nullptr && job.other.data == nullptr && job.scale == 1;
  if (plain && !job.normalize && job.dtype == job.out_dtype) return copy(job);
  if (job.dtype == kFloat32) capture_to<float>(job);
  if (job.dtype == kBFloat16) capture_to<bf16>(job);
  if (job.dtype == kFloat16) capture_to<f16>(job);
  if (job.dtype == kFloat64) capture<double, double>(job);
}

}  // namespace PKT_ISA
}  // namespace pkt
