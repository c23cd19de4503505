// W += s·left·right over a list of matrices: W is read once and written once.
//
// left is packed in groups of kRows rows and right in panels of two vectors, so that the innermost
// loop holds a kRows × 2 block of the product in registers.  A block of panels stays in the L2 cache
// while a task's rows of W stream past it.
#include "cpu/stochastic.h"

namespace pkt {
namespace PKT_ISA {

void inject(const Inject& job);

namespace {

constexpr int kRows = 6;
constexpr int64_t kTaskRows = 16 * kRows;
constexpr int64_t kBlockBytes = int64_t(64) << 10;

PKT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A NaN becomes the one with a single bit set, so that a rounded sum with it stays a NaN (pair.h).
template <class Scalar>
PKT_INLINE Scalar plain_nan(Scalar x) {
  return x == x ? x : Scalar(__builtin_nan(""));
}

// `count` rows of the factor (or its columns, when `by_column`), interleaved: to[k·count + m] is of
// row from + order[m].  Beyond the factor's `limit` rows: zeros.
template <class Scalar, class T>
void pack_as(const Factor& factor, bool by_column, int64_t from, const int64_t* order,
             int64_t count, int64_t limit, int64_t rank, Scalar* to) {
  const T* const data = static_cast<const T*>(factor.data);
  const int64_t along = by_column ? factor.column_stride : factor.row_stride;
  const int64_t step = by_column ? factor.row_stride : factor.column_stride;
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t m = 0; m < count; ++m) {
      const int64_t row = from + order[m];
      const Scalar value = row < limit ? Scalar(widen(data[row * along + k * step])) : Scalar(0);
      to[k * count + m] = plain_nan(value);
    }
  }
}

template <class Scalar>
void pack(const Factor& factor, bool by_column, int64_t from, const int64_t* order, int64_t count,
          int64_t limit, int64_t rank, Scalar* to) {
  const auto run = factor.dtype == kFloat32    ? pack_as<Scalar, float>
                   : factor.dtype == kFloat64  ? pack_as<Scalar, double>
                   : factor.dtype == kBFloat16 ? pack_as<Scalar, bf16>
                                               : pack_as<Scalar, f16>;
  run(factor, by_column, from, order, count, limit, rank, to);
}

// Two vectors of one row: add s·delta, keep the old bits, count what did not change.
template <bool kRandom, class T, class Vector>
PKT_INLINE int64_t finish_row(T* w, T* backup, Vector first, Vector second, Vector scale,
                              const Place& at) {
  constexpr int width = Vector::width;
  if (backup) std::memcpy(backup, w, 2 * width * sizeof(T));
  Vector old_first, old_second;
  load_pair(w, &old_first, &old_second);
  first = fma(first, scale, old_first);
  second = fma(second, scale, old_second);
  if constexpr (kRandom) round_stochastically(at, w, &first, &second);
  return exchange(w, first, second);
}

// The same for the last columns of a matrix, through a copy as wide as a panel.
template <bool kRandom, class T, class Vector>
int64_t finish_tail(T* w, T* backup, Vector first, Vector second, Vector scale, const Place& at,
                    int64_t columns) {
  constexpr int wide = 2 * Vector::width;
  T copy[wide], old[wide];
  std::memset(copy, 0, sizeof copy);
  std::memcpy(copy, w, size_t(columns) * sizeof(T));
  finish_row<kRandom, T, Vector>(copy, old, first, second, scale, at);
  int64_t same = 0;
  for (int64_t i = 0; i < columns; ++i) same += widen(copy[i]) == widen(old[i]);
  std::memcpy(w, copy, size_t(columns) * sizeof(T));
  if (backup) std::memcpy(backup, old, size_t(columns) * sizeof(T));
  return same;
}

// kRows × two vectors of W, or fewer at its edges (kWhole false).
template <bool kRandom, bool kWhole, class T, class Vector, class Scalar>
int64_t update_tile(T* w, int64_t stride, T* backup, int64_t backup_stride, const Scalar* left,
                    const Scalar* right, int64_t rank, Scalar scale, Place at, int64_t rows,
                    int64_t columns, const T* next) {
  constexpr int width = Vector::width, wide = 2 * width;
  const Vector zero = splat(Scalar(0));
  Vector first[kRows], second[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) first[m] = second[m] = zero;
  for (int64_t k = 0; k < rank; ++k) {
    const Vector a = load(right + k * wide), b = load(right + k * wide + width);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vector factor = splat(left[k * kRows + m]);
      first[m] = fma(factor, a, first[m]);
      second[m] = fma(factor, b, second[m]);
    }
  }
  const Vector s = splat(scale);
  int64_t same = 0;
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    if (!kWhole && m >= rows) break;
    PKT_PREFETCH(next + m * stride);
    T* const row = w + m * stride;
    T* const kept = backup ? backup + m * backup_stride : nullptr;
    same += kWhole || columns >= wide
                ? finish_row<kRandom, T, Vector>(row, kept, first[m], second[m], s, at)
                : finish_tail<kRandom, T, Vector>(row, kept, first[m], second[m], s, at, columns);
    ++at.row;
  }
  return same;
}

template <bool kRandom, class T>
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
  const Scalar scale = plain_nan(Scalar(matrix.scale));
  int64_t unchanged = 0;
  int64_t in_order[kRows], pair_order[wide];
  for (int m = 0; m < kRows; ++m) in_order[m] = m;
  for (int m = 0; m < wide; ++m) pair_order[m] = pair_column<T>(m);

#pragma omp parallel num_threads(job.threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t group = 0; group < groups; ++group) {
      pack(matrix.left, false, group * kRows, in_order, kRows, rows, rank,
           left + group * rank * kRows);
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
      pack(matrix.right, true, panel * wide, pair_order, wide, columns, rank,
           right + panel * rank * wide);
    }
    int64_t same = 0;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t top = task * task_rows;
      const int64_t bottom = top + task_rows < rows ? top + task_rows : rows;
      for (int64_t from = 0; from < panels; from += block) {
        const int64_t to = from + block < panels ? from + block : panels;
        for (int64_t row = top; row < bottom; row += kRows) {
          const int64_t here = bottom - row < kRows ? bottom - row : kRows;
          T* const w = static_cast<T*>(matrix.weight) + row * matrix.stride;
          T* const backup = matrix.backup
                                ? static_cast<T*>(matrix.backup) + row * matrix.backup_stride
                                : nullptr;
          for (int64_t panel = from; panel < to; ++panel) {
            const int64_t column = panel * wide;
            const bool whole = here == kRows && columns - column >= wide;
            same += (whole ? update_tile<kRandom, true, T, Vector, Scalar>
                           : update_tile<kRandom, false, T, Vector, Scalar>)(
                w + column, matrix.stride, backup ? backup + column : nullptr,
                matrix.backup_stride, left + row / kRows * rank * kRows,
                right + panel * rank * wide, rank, scale,
                Place{job.seed, uint32_t(row), uint32_t(column), number}, here, columns - column,
                w + column + (row + kRows < bottom ? kRows * matrix.stride : 0));
          }
        }
      }
    }
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
    const uint32_t number = uint32_t(g);
    const bool random = job.stochastic;  // float32 and float64 lose nothing worth randomising
    if (matrix.dtype == kFloat32) inject_matrix<false, float>(matrix, job, number);
    if (matrix.dtype == kFloat64) inject_matrix<false, double>(matrix, job, number);
    if (matrix.dtype == kBFloat16) {
      (random ? inject_matrix<true, bf16> : inject_matrix<false, bf16>)(matrix, job, number);
    }
    if (matrix.dtype == kFloat16) {
      (random ? inject_matrix<true, f16> : inject_matrix<false, f16>)(matrix, job, number);
    }
  }
}

}  // namespace PKT_ISA
}  // namespace pkt
