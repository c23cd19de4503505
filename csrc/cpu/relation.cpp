// Terms of centred token relations, sequence by sequence: with K = Xc·Xcᵀ, ⟨K_x, K_y⟩, ‖K_x‖, ‖K_y‖
// and the slopes 2·K_y·Xc and 2·K_x·Xc/‖K_x‖.
//
// A sequence of T tokens goes through whichever of the T×T and D×D forms is smaller.  Its centred
// rows, divided by a power of two so that fourth powers stay in range, and its products live in the
// caches of one thread; with fewer sequences than threads, the threads share every product instead.
// The result does not depend on the number of threads.
#include "cpu/simd.h"

namespace pkt {
namespace PKT_ISA {

void relation(const Relation& job);
void gemm(const Gemm& job);

namespace {

template <class Scalar>
struct Limits;
template <>
struct Limits<float> {
  static constexpr int dtype = kFloat32;
  static constexpr double largest = 3.4028234663852886e38;
  static constexpr int least_exponent = -126;
};
template <>
struct Limits<double> {
  static constexpr int dtype = kFloat64;
  static constexpr double largest = 1.7976931348623157e308;
  static constexpr int least_exponent = -1022;
};

template <class Scalar>
Scalar clamped(double value) {
  const double limit = Limits<Scalar>::largest;
  return Scalar(value > limit ? limit : value < -limit ? -limit : value);
}

// ------------------------------------------------------------------------------------ rows

// Xc of one sequence is matrix·size, with entries of matrix below 4.
template <class Scalar>
struct Centred {
  Scalar* matrix;  // (tokens, dim)
  Scalar* mean;    // (dim,), scratch
  int64_t dim;
  double size;
};

PKT_INLINE uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }
PKT_INLINE uint64_t magnitude(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  return u & 0x7fffffffffffffffull;
}
PKT_INLINE double value_of(uint32_t u) { return float_of(u); }
PKT_INLINE double value_of(uint64_t u) {
  double x;
  std::memcpy(&x, &u, 8);
  return x;
}

// Half the distance to the first row is taken first: equal rows then give zeros to the bit, and no
// finite rows overflow.  Its largest entry is that of Xc to within a factor of two.
template <class Scalar, class T>
void centre(const Rows& rows, int64_t begin, int64_t tokens, Centred<Scalar>* to) {
  const T* const first = static_cast<const T*>(rows.data) + begin * rows.stride;
  const int64_t dim = to->dim;
  Scalar* const mean = to->mean;
  const Scalar half = Scalar(0.5), share = Scalar(1) / Scalar(tokens);
  decltype(magnitude(half)) largest = 0;
  for (int64_t j = 0; j < dim; ++j) mean[j] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* const x = first + t * rows.stride;
    Scalar* const row = to->matrix + t * dim;
    for (int64_t j = 0; j < dim; ++j) {
      const Scalar apart = Scalar(widen(x[j])) * half - Scalar(widen(first[j])) * half;
      row[j] = apart;
      mean[j] += apart * share;
      const auto size = magnitude(apart);
      largest = size > largest ? size : largest;
    }
  }
  int exponent = 0;
  if (largest) std::frexp(value_of(largest), &exponent);
  if (exponent < Limits<Scalar>::least_exponent) exponent = Limits<Scalar>::least_exponent;
  const Scalar power = Scalar(std::ldexp(1.0, -exponent));
  to->size = largest ? 2 * std::ldexp(1.0, exponent) : 1;
  for (int64_t t = 0; t < tokens; ++t) {
    Scalar* const row = to->matrix + t * dim;
    for (int64_t j = 0; j < dim; ++j) row[j] = (row[j] - mean[j]) * power;
  }
}

template <class Scalar>
void centre(const Rows& rows, int64_t begin, int64_t tokens, Centred<Scalar>* to) {
  const auto run = rows.dtype == kFloat32    ? centre<Scalar, float>
                   : rows.dtype == kFloat64  ? centre<Scalar, double>
                   : rows.dtype == kBFloat16 ? centre<Scalar, bf16>
                                             : centre<Scalar, f16>;
  run(rows, begin, tokens, to);
}

// -------------------------------------------------------------------------------- products

template <class Scalar>
Factor plain(const Scalar* data, int64_t columns) {
  return {data, Limits<Scalar>::dtype, columns, 1};
}
template <class Scalar>
Factor transposed(const Scalar* data, int64_t columns) {
  return {data, Limits<Scalar>::dtype, 1, columns};
}

// out (rows, columns) = left (rows, depth)·right (depth, columns)
template <class Scalar>
void multiply(Scalar* out, int64_t rows, int64_t columns, int64_t depth, const Factor& left,
              const Factor& right, int threads, bool upper = false) {
  gemm({out, columns, rows, columns, depth, left, right, sizeof(Scalar) == 8, kWhole, upper, false,
        false, threads});
}

// A symmetric product, of which the half above the diagonal is computed.
template <class Scalar>
void multiply_gram(Scalar* out, int64_t size, int64_t depth, const Factor& left,
                   const Factor& right, int threads) {
  multiply(out, size, size, depth, left, right, threads, true);
  for (int64_t i = 1; i < size; ++i) {
    for (int64_t j = 0; j < i; ++j) out[i * size + j] = out[j * size + i];
  }
}

template <class Scalar>
double dot(const Scalar* a, const Scalar* b, int64_t count) {
  constexpr int lanes = 16;
  double part[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes) {
    for (int i = 0; i < lanes; ++i) part[i] += double(a[k + i]) * double(b[k + i]);
  }
  double total = 0;
  for (; k < count; ++k) total += double(a[k]) * double(b[k]);
  for (int i = 0; i < lanes; ++i) total += part[i];
  return total;
}

template <class Scalar>
void scale_rows(Scalar* x, int64_t count, double factor) {
  const Scalar by = clamped<Scalar>(factor), limit = Scalar(Limits<Scalar>::largest);
  for (int64_t i = 0; i < count; ++i) {
    const Scalar value = x[i] * by;
    x[i] = value > limit ? limit : value < -limit ? -limit : value;
  }
}

// -------------------------------------------------------------------------------- sequences

// What a thread needs for any sequence of the job.
template <class Scalar>
struct Workspace {
  Workspace(const Relation& job, int64_t longest)
      : longest(longest), dx(job.x_dim), dy(job.y_dim), wide(dx > dy ? dx : dy) {
    const int64_t side = longest < wide ? longest : wide;
    rows = new Scalar[(longest + 1) * (dx + dy)];
    products = new Scalar[3 * side * side];
    x = {rows, rows + longest * dx, dx, 1};
    y = {x.mean + dx, x.mean + dx + longest * dy, dy, 1};
  }
  ~Workspace() {
    delete[] rows;
    delete[] products;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  int64_t longest, dx, dy, wide;
  Scalar *rows, *products;
  Centred<Scalar> x, y;
};

template <class Scalar>
void relate(const Relation& job, int64_t s, int threads, Workspace<Scalar>* work) {
  const int64_t begin = job.starts[s], tokens = job.starts[s + 1] - begin, dx = work->dx;
  Scalar* const of_inner = job.of_inner ? static_cast<Scalar*>(job.of_inner) + begin * dx : nullptr;
  Scalar* const of_norm = job.of_inner ? static_cast<Scalar*>(job.of_norm) + begin * dx : nullptr;
  Centred<Scalar>&x = work->x, &y = work->y;
  centre(job.x, begin, tokens, &x);
  centre(job.y, begin, tokens, &y);
  const bool by_token = tokens <= work->wide;
  const int64_t side_x = by_token ? tokens : dx, side_y = by_token ? tokens : work->dy;
  Scalar* const gram_x = work->products;
  Scalar* const gram_y = gram_x + side_x * side_x;
  Scalar* const cross = gram_y + side_y * side_y;  // (dy, dx), of the form by dimension
  double inner;
  if (by_token) {
    multiply_gram(gram_x, tokens, dx, plain(x.matrix, dx), transposed(x.matrix, dx), threads);
    multiply_gram(gram_y, tokens, y.dim, plain(y.matrix, y.dim), transposed(y.matrix, y.dim),
                  threads);
    inner = dot(gram_x, gram_y, tokens * tokens);
  } else {
    multiply_gram(gram_x, dx, tokens, transposed(x.matrix, dx), plain(x.matrix, dx), threads);
    multiply_gram(gram_y, y.dim, tokens, transposed(y.matrix, y.dim), plain(y.matrix, y.dim),
                  threads);
    multiply(cross, y.dim, dx, tokens, transposed(y.matrix, y.dim), plain(x.matrix, dx), threads);
    inner = dot(cross, cross, y.dim * dx);
  }
  const double norm_x = std::sqrt(dot(gram_x, gram_x, side_x * side_x));
  const double norm_y = std::sqrt(dot(gram_y, gram_y, side_y * side_y));
  static_cast<Scalar*>(job.inner)[s] = clamped<Scalar>(inner * x.size * y.size * x.size * y.size);
  static_cast<Scalar*>(job.norm_x)[s] = clamped<Scalar>(norm_x * x.size * x.size);
  static_cast<Scalar*>(job.norm_y)[s] = clamped<Scalar>(norm_y * y.size * y.size);
  if (!of_inner) return;
  if (by_token) {
    multiply(of_inner, tokens, dx, tokens, plain(gram_y, tokens), plain(x.matrix, dx), threads);
    multiply(of_norm, tokens, dx, tokens, plain(gram_x, tokens), plain(x.matrix, dx), threads);
  } else {
    multiply(of_inner, tokens, dx, y.dim, plain(y.matrix, y.dim), plain(cross, dx), threads);
    multiply(of_norm, tokens, dx, dx, plain(x.matrix, dx), plain(gram_x, dx), threads);
  }
  scale_rows(of_inner, tokens * dx, 2 * x.size * y.size * y.size);
  scale_rows(of_norm, tokens * dx, norm_x > 0 ? 2 * x.size / norm_x : 0);
}

// Fewer than two tokens relate to nothing.
template <class Scalar>
void relate_nothing(const Relation& job, int64_t s) {
  void* const terms[] = {job.inner, job.norm_x, job.norm_y};
  for (void* const term : terms) static_cast<Scalar*>(term)[s] = 0;
  if (!job.of_inner) return;
  const int64_t begin = job.starts[s] * job.x_dim, end = job.starts[s + 1] * job.x_dim;
  void* const slopes[] = {job.of_inner, job.of_norm};
  for (void* const slope : slopes) {
    for (int64_t i = begin; i < end; ++i) static_cast<Scalar*>(slope)[i] = 0;
  }
}

template <class Scalar>
void run(const Relation& job) {
  int64_t longest = 0;
  for (int64_t s = 0; s < job.sequences; ++s) {
    const int64_t tokens = job.starts[s + 1] - job.starts[s];
    longest = tokens > longest ? tokens : longest;
  }
  const bool many = job.sequences >= 2 * job.threads;
#pragma omp parallel num_threads(many ? job.threads : 1)
  {
    Workspace<Scalar> work(job, longest);
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < job.sequences; ++s) {
      if (job.starts[s + 1] - job.starts[s] < 2) {
        relate_nothing<Scalar>(job, s);
      } else {
        relate(job, s, many ? 1 : job.threads, &work);
      }
    }
  }
}

}  // namespace

void relation(const Relation& job) {
  if (job.wide) {
    run<double>(job);
  } else {
    run<float>(job);
  }
}

}  // namespace PKT_ISA
}  // namespace pkt
