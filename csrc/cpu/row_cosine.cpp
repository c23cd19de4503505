// Cosine of every pair of rows and gradients of their weighted sum: each row is read from memory
// once, and a gradient is formed while its rows are in the L1 cache.
#include "cpu/simd.h"

namespace pkt {
namespace PKT_ISA {

void row_cosine(const RowCosine& job);

namespace {

struct Moments {
  double xx, yy, xy;
};

template <class X, class Y>
Moments moments(const X* x, const Y* y, const X* next_x, const Y* next_y, int64_t dim) {
  using Vector = typename Math<X>::Vector;
  using Scalar = typename Math<X>::Scalar;
  constexpr int width = Vector::width, step = 4 * width;
  const Vector zero = splat(Scalar(0));
  Vector xx[4] = {zero, zero, zero, zero}, yy[4] = {zero, zero, zero, zero};
  Vector xy[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + step <= dim; i += step) {
    for (int64_t at = i; at < i + step; at += int64_t(64 / sizeof(X))) PKT_PREFETCH(next_x + at);
    for (int64_t at = i; at < i + step; at += int64_t(64 / sizeof(Y))) PKT_PREFETCH(next_y + at);
    for (int part = 0; part < 4; ++part) {
      const Vector a = load(x + i + part * width), b = load(y + i + part * width);
      xx[part] = fma(a, a, xx[part]);
      yy[part] = fma(b, b, yy[part]);
      xy[part] = fma(a, b, xy[part]);
    }
  }
  Moments m{double(sum((xx[0] + xx[1]) + (xx[2] + xx[3]))),
            double(sum((yy[0] + yy[1]) + (yy[2] + yy[3]))),
            double(sum((xy[0] + xy[1]) + (xy[2] + xy[3])))};
  for (; i < dim; ++i) {
    const double a = widen(x[i]), b = widen(y[i]);
    m.xx += a * a;
    m.yy += b * b;
    m.xy += a * b;
  }
  return m;
}

// A length too extreme to square: largest·relative, largest = the greatest magnitude in the row.
struct Length {
  double largest, relative;
};

template <class T>
double largest_of(const T* x, int64_t dim) {
  double largest = 0;
  for (int64_t i = 0; i < dim; ++i) {
    const double size = std::fabs(double(widen(x[i])));
    if (!(size <= largest)) largest = size;
  }
  return largest;
}

template <class T>
struct Top {
  static constexpr float value = 3.4028234663852886e38f;
};
template <>
struct Top<double> {
  static constexpr double value = 1.7976931348623157e308;
};
template <>
struct Top<bf16> {
  static constexpr float value = 3.3895313892515355e38f;
};
template <>
struct Top<f16> {
  static constexpr float value = 65504;
};

PKT_INLINE double clamp(double x, double top) { return x > top ? top : x < -top ? -top : x; }

// The weighted gradient in x, ±top at most: beyond its dtype it must not become inf.
template <class X, class Y, class Scalar, class Vector>
void gradient(const X* x, const Y* y, int64_t dim, Scalar from_x, Scalar from_y, Scalar top, X* out) {
  const Vector fx = splat(from_x), fy = splat(from_y), limit = splat(top);
  int64_t i = 0;
  for (; i + Vector::width <= dim; i += Vector::width) {
    store(out + i, clamp(fma(load(x + i), fx, load(y + i) * fy), limit));
  }
  for (; i < dim; ++i) {
    const Scalar g = Scalar(widen(x[i])) * from_x + Scalar(widen(y[i])) * from_y;
    narrow(Scalar(clamp(double(g), double(top))), out + i);
  }
}

template <class X, class Y>
void exact_gradient(const X* x, const Y* y, int64_t dim, Length length_x, Length length_y,
                    double cosine, double weight, double top, X* out) {
  using Scalar = typename Math<X>::Scalar;
  for (int64_t i = 0; i < dim; ++i) {
    const double unit_x = double(widen(x[i])) / length_x.largest / length_x.relative;
    const double unit_y = double(widen(y[i])) / length_y.largest / length_y.relative;
    const double g = (unit_y - cosine * unit_x) / length_x.relative / length_x.largest;
    // Within double before it meets a weight of zero.
    narrow(Scalar(clamp(clamp(g, Top<double>::value) * weight, top)), out + i);
  }
}

template <class T>
void zero(T* out, int64_t dim) {
  if (out) std::memset(out, 0, size_t(dim) * sizeof(T));
}

// A row that Scalar cannot square, or a huge weight, in double; returns the cosine.
template <class X, class Y>
double extreme_row(const X* x, const Y* y, int64_t dim, double weight, X* dx, Y* dy) {
  const double top_x = largest_of(x, dim), top_y = largest_of(y, dim);
  if (top_x == 0 || top_y == 0) {
    zero(dx, dim);
    zero(dy, dim);
    return 0;
  }
  Moments m{0, 0, 0};
  for (int64_t i = 0; i < dim; ++i) {
    const double a = double(widen(x[i])) / top_x, b = double(widen(y[i])) / top_y;
    m.xx += a * a;
    m.yy += b * b;
    m.xy += a * b;
  }
  const Length length_x{top_x, std::sqrt(m.xx)}, length_y{top_y, std::sqrt(m.yy)};
  const double cosine = m.xy / length_x.relative / length_y.relative;
  if (dx) exact_gradient(x, y, dim, length_x, length_y, cosine, weight, Top<X>::value, dx);
  if (dy) exact_gradient(y, x, dim, length_y, length_x, cosine, weight, Top<Y>::value, dy);
  return cosine;
}

template <class X, class Y>
void compare(const RowCosine& job) {
  using Vector = typename Math<X>::Vector;
  using Scalar = typename Math<X>::Scalar;
  // Squared lengths outside these bounds lose digits in Scalar.
  const double low = sizeof(Scalar) == 4 ? 1e-20 : 1e-250;
  const double high = sizeof(Scalar) == 4 ? 1e37 : 1e300;
  // A larger weight times 1/‖x‖² might not be finite.
  const double heaviest = sizeof(Scalar) == 4 ? 1e15 : 1e50;
  const int64_t dim = job.dim;
  const Scalar* const weights = static_cast<const Scalar*>(job.weight);
  Scalar* const cosines = static_cast<Scalar*>(job.cosines);
#pragma omp parallel for num_threads(job.threads) schedule(static)
  for (int64_t n = 0; n < job.rows; ++n) {
    const X* const x = static_cast<const X*>(job.x.data) + n * job.x.stride;
    const Y* const y = static_cast<const Y*>(job.y.data) + n * job.y.stride;
    const bool last = n + 1 == job.rows;
    X* const dx = job.dx ? static_cast<X*>(job.dx) + n * dim : nullptr;
    Y* const dy = job.dy ? static_cast<Y*>(job.dy) + n * dim : nullptr;
    const double weight = weights ? double(weights[n * job.weight_stride]) : 0;
    const Moments m =
        moments(x, y, last ? x : x + job.x.stride, last ? y : y + job.y.stride, dim);
    const bool ordinary = m.xx >= low && m.xx <= high && m.yy >= low && m.yy <= high;
    double c;
    if (ordinary && std::fabs(weight) <= heaviest) {
      const double scale_x = 1 / std::sqrt(m.xx), scale_y = 1 / std::sqrt(m.yy);
      c = m.xy * scale_x * scale_y;
      const Scalar cross = Scalar(weight * scale_x * scale_y);
      const Scalar along_x = Scalar(-weight * c * scale_x * scale_x);
      const Scalar along_y = Scalar(-weight * c * scale_y * scale_y);
      if (dx) gradient<X, Y, Scalar, Vector>(x, y, dim, along_x, cross, Top<X>::value, dx);
      if (dy) gradient<Y, X, Scalar, Vector>(y, x, dim, along_y, cross, Top<Y>::value, dy);
    } else {
      c = extreme_row(x, y, dim, weight, dx, dy);
    }
    cosines[n] = Scalar(c);
  }
}

template <class X>
void compare_with(const RowCosine& job) {
  if (job.y.dtype == kFloat32) compare<X, float>(job);
  if (job.y.dtype == kBFloat16) compare<X, bf16>(job);
  if (job.y.dtype == kFloat16) compare<X, f16>(job);
}

}  // namespace

void row_cosine(const RowCosine& job) {
  if (job.x.dtype == kFloat32) compare_with<float>(job);
  if (job.x.dtype == kBFloat16) compare_with<bf16>(job);
  if (job.x.dtype == kFloat16) compare_with<f16>(job);
  if (job.x.dtype == kFloat64) compare<double, double>(job);
}

}  // namespace PKT_ISA
}  // namespace pkt
