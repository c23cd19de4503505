// W += s·left·right over a list of matrices: W is read once and written once.
//
// left is packed in groups of kRows rows and right in panels of two vectors, so that the innermost
// loop holds a kRows × 2 block of the product in registers.  A block of panels stays in the L2 cache
// while a task's rows of W stream past it.
#include "cpu/simd.h"
#include "philox.h"

namespace pkt {
namespace PKT_ISA {

void inject(const Inject& job);

namespace {

constexpr int kRows = 6;
constexpr int64_t kTaskRows = 16 * kRows;
constexpr int64_t kBlockBytes = int64_t(128) << 10;

PKT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Scalar>
PKT_INLINE Scalar element(const Factor& factor, int64_t row, int64_t column) {
  const int64_t at = row * factor.row_stride + column * factor.column_stride;
  switch (factor.dtype) {
    case kFloat32: return Scalar(static_cast<const float*>(factor.data)[at]);
    case kFloat64: return Scalar(static_cast<const double*>(factor.data)[at]);
    case kBFloat16: return Scalar(widen(static_cast<const bf16*>(factor.data)[at]));
    default: return Scalar(widen(static_cast<const f16*>(factor.data)[at]));
  }
}

PKT_INLINE bf16 stochastic(float x, uint32_t word, const bf16*) {
  bf16 y;
  if (!(std::fabs(x) <= 3.4028235e38f)) narrow(x, &y);
  else y.bits = uint16_t(stochastic_bf16(bits_of(x), word));
  return y;
}
PKT_INLINE f16 stochastic(float x, uint32_t word, const f16*) {
  f16 y;
  if (!(std::fabs(x) <= 3.4028235e38f)) narrow(x, &y);
  else y.bits = uint16_t(stochastic_f16(std::fabs(x), bits_of(x), word));
  return y;
}
// Nothing is lost in these: no rounding to randomise.
PKT_INLINE float stochastic(float x, uint32_t, const float*) { return x; }
PKT_INLINE double stochastic(double x, uint32_t, const double*) { return x; }

// Two vectors of one row: add s·delta, keep the old bits, count what did not change.
template <class T, class Vector, class Scalar>
PKT_INLINE int64_t finish_row(T* w, T* backup, Vector first, Vector second, Vector scale,
                              const uint32_t* words) {
  constexpr int width = Vector::width;
  const Vector old_first = load(w), old_second = load(w + width);
  if (backup) std::memcpy(backup, w, 2 * width * sizeof(T));
  first = fma(first, scale, old_first);
  second = fma(second, scale, old_second);
  if (words) {
    Scalar sums[2 * width];
    T rounded[2 * width];
    store(sums, first);
    store(sums + width, second);
    for (int i = 0; i < 2 * width; ++i) rounded[i] = stochastic(sums[i], words[i], w);
    std::memcpy(w, rounded, sizeof rounded);
  } else {
    store(w, first);
    store(w + width, second);
  }
  return equal_lanes(load(w), old_first) + equal_lanes(load(w + width), old_second);
}

// The same for the last columns of a matrix, through a copy as wide as a panel.
template <class T, class Vector, class Scalar>
int64_t finish_tail(T* w, T* backup, Vector first, Vector second, Vector scale,
                    const uint32_t* words, int64_t columns) {
  constexpr int wide = 2 * Vector::width;
  T copy[wide], old[wide];
  std::memset(copy, 0, sizeof copy);
  std::memcpy(copy, w, size_t(columns) * sizeof(T));
  finish_row<T, Vector, Scalar>(copy, old, first, second, scale, words);
  int64_t same = 0;
  for (int64_t i = 0; i < columns; ++i) same += widen(copy[i]) == widen(old[i]);
  std::memcpy(w, copy, size_t(columns) * sizeof(T));
  if (backup) std::memcpy(backup, old, size_t(columns) * sizeof(T));
  return same;
}

// kRows × two vectors of W, or fewer at its edges.
template <class T, class Vector, class Scalar>
PKT_INLINE int64_t update_tile(T* w, int64_t stride, T* backup, int64_t backup_stride,
                               const Scalar* left, const Scalar* right, int64_t rank, Scalar scale,
                               const uint32_t* words, int64_t words_stride, int64_t rows,
                               int64_t columns, const T* next) {
  constexpr int width = Vector::width, wide = 2 * width;
  const Vector zero = splat(Scalar(0));
  Vector first[kRows], second[kRows];
  for (int m = 0; m < kRows; ++m) first[m] = second[m] = zero;
  for (int64_t k = 0; k < rank; ++k) {
    const Vector a = load(right + k * wide), b = load(right + k * wide + width);
    for (int m = 0; m < kRows; ++m) {
      const Vector factor = splat(left[k * kRows + m]);
      first[m] = fma(factor, a, first[m]);
      second[m] = fma(factor, b, second[m]);
    }
  }
  const Vector s = splat(scale);
  int64_t same = 0;
  for (int m = 0; m < kRows; ++m) {
    if (m >= rows) break;
    PKT_PREFETCH(next + m * stride);
    T* const row = w + m * stride;
    T* const kept = backup ? backup + m * backup_stride : nullptr;
    const uint32_t* const random = words ? words + m * words_stride : nullptr;
    same += columns >= wide
                ? finish_row<T, Vector, Scalar>(row, kept, first[m], second[m], s, random)
                : finish_tail<T, Vector, Scalar>(row, kept, first[m], second[m], s, random, columns);
  }
  return same;
}

template <class T>
void inject_matrix(const Matrix& matrix, const Inject& job, uint32_t number) {
  using Vector = typename Math<T>::Vector;
  using Scalar = typename Math<T>::Scalar;
  constexpr int wide = 2 * Vector::width;
  const int64_t rows = matrix.rows, columns = matrix.columns, rank = matrix.rank;
  const int64_t groups = ceil_div(rows, kRows), panels = ceil_div(columns, wide);
  const int64_t fitting = kBlockBytes / ((rank > 0 ? rank : 1) * wide * int64_t(sizeof(Scalar)));
  const int64_t block = fitting < 4 ? 4 : fitting > 128 ? 128 : fitting;
  const int64_t fair = ceil_div(rows, int64_t(job.threads) * 4 * kRows) * kRows;
  const int64_t task_rows = fair < kTaskRows ? fair : kTaskRows;
  const int64_t tasks = ceil_div(rows, task_rows);
  Scalar* const left = new Scalar[groups * rank * kRows];
  Scalar* const right = new Scalar[panels * rank * wide];
  int64_t unchanged = 0;

#pragma omp parallel num_threads(job.threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t k = 0; k < rank; ++k) {
        for (int m = 0; m < kRows; ++m) {
          const int64_t row = group * kRows + m;
          left[(group * rank + k) * kRows + m] =
              row < rows ? element<Scalar>(matrix.left, row, k) : Scalar(0);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t k = 0; k < rank; ++k) {
        for (int64_t i = 0; i < wide; ++i) {
          const int64_t column = panel * wide + i;
          right[(panel * rank + k) * wide + i] =
              column < columns ? element<Scalar>(matrix.right, k, column) : Scalar(0);
        }
      }
    }
    const int64_t words_stride = block * wide;
    const bool random = job.stochastic && sizeof(T) == 2;
    uint32_t* const words = random ? new uint32_t[kRows * words_stride] : nullptr;
    int64_t same = 0;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t top = task * task_rows;
      const int64_t bottom = top + task_rows < rows ? top + task_rows : rows;
      for (int64_t from = 0; from < panels; from += block) {
        const int64_t to = from + block < panels ? from + block : panels;
        for (int64_t row = top; row < bottom; row += kRows) {
          const int64_t here = bottom - row < kRows ? bottom - row : kRows;
          if (words) {
            for (int64_t m = 0; m < here; ++m) {
              for (int64_t quad = 0; quad < (to - from) * wide / 4; ++quad) {
                philox(job.seed, uint32_t(from * wide / 4 + quad), uint32_t(row + m), number,
                       words + m * words_stride + quad * 4);
              }
            }
          }
          T* const w = static_cast<T*>(matrix.weight) + row * matrix.stride;
          T* const backup = matrix.backup
                                ? static_cast<T*>(matrix.backup) + row * matrix.backup_stride
                                : nullptr;
          for (int64_t panel = from; panel < to; ++panel) {
            const int64_t column = panel * wide;
            same += update_tile<T, Vector, Scalar>(
                w + column, matrix.stride, backup ? backup + column : nullptr,
                matrix.backup_stride, left + row / kRows * rank * kRows,
                right + panel * rank * wide, rank, Scalar(matrix.scale),
                words ? words + (column - from * wide) : nullptr, words_stride, here,
                columns - column, w + column + (row + kRows < bottom ? kRows * matrix.stride : 0));
          }
        }
      }
    }
    delete[] words;
#pragma omp atomic
    unchanged += same;
  }
  job.unchanged[number] = unchanged;
  delete[] left;
  delete[] right;
}

}  // namespace

void inject(const Inject& job) {
  for (int64_t g = 0; g < job.count; ++g) {
    const Matrix& matrix = job.matrices[g];
    if (matrix.rows == 0 || matrix.columns == 0) continue;
    if (matrix.dtype == kFloat32) inject_matrix<float>(matrix, job, uint32_t(g));
    if (matrix.dtype == kFloat64) inject_matrix<double>(matrix, job, uint32_t(g));
    if (matrix.dtype == kBFloat16) inject_matrix<bf16>(matrix, job, uint32_t(g));
    if (matrix.dtype == kFloat16) inject_matrix<f16>(matrix, job, uint32_t(g));
  }
}

}  // namespace PKT_ISA
}  // namespace pkt
