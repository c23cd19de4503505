// Matrix products in float or double: packed operands, a tile of the result in registers.
//
// Every element is summed over fixed blocks of the depth, in order, by one thread: the result does
// not depend on the number of threads.
#include "cpu/simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pkt {
namespace PKT_ISA {

void gemm(const Gemm& job);

namespace {

// The tile of the result that stays in registers: kTileRows rows of two vectors.  With two vectors
// of the right operand and one broadcast element of the left it fills the register file.
#if defined(PKT_ISA_avx512)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
// A strip of the right operand, kDepth × 2 vectors (32 KB on AVX-512), stays in the first cache.
constexpr int kDepth = 256;
// Rows of a packed left block lie this many elements apart, so that they meet different cache sets.
constexpr int kRowStep = kDepth + 16;
// A left block, 18 tiles high (268 KB in float on AVX-512), stays in the second cache.
constexpr int kBlockTiles = 18;
constexpr int kBlockRows = kBlockTiles * kTileRows;
// The packed panel of the right operand, which all threads share, in the last cache.
constexpr int64_t kPanelBytes = int64_t(8) << 20;
constexpr int64_t kPanelColumns = 2048;

PKT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PKT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PKT_INLINE int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

template <class Scalar>
constexpr int kColumns = 2 * Math<Scalar>::Vector::width;

// ------------------------------------------------------------------------------------ tiles

// Where a tile of the result goes.
template <class Scalar>
struct Target {
  Scalar* at;
  int64_t stride, rows, columns;
  const Scalar* scale;  // of each row, applied last; null for none
  bool accumulate;
};

template <class Scalar>
PKT_INLINE void finish_edge(const Scalar* tile, const Target<Scalar>& to) {
  for (int64_t i = 0; i < to.rows; ++i) {
    Scalar* const row = to.at + i * to.stride;
    for (int64_t j = 0; j < to.columns; ++j) {
      Scalar value = tile[i * kColumns<Scalar> + j];
      if (to.accumulate) value += row[j];
      row[j] = to.scale ? value * to.scale[i] : value;
    }
  }
}

// left·right over `depth`.  Element (i, k) of left is left[i·RowStep + k·DepthStep].
template <class Scalar, int RowStep, int DepthStep>
void multiply(const Scalar* left, const Scalar* right, int64_t depth, const Target<Scalar>& to) {
  using Vector = typename Math<Scalar>::Vector;
  constexpr int width = Vector::width, columns = kColumns<Scalar>;
  const bool whole = to.rows == kTileRows && to.columns == columns;
  Vector sum[kTileRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    sum[i][0] = sum[i][1] = splat(Scalar(0));
    if (whole) {
      PKT_PREFETCH(to.at + i * to.stride);
      PKT_PREFETCH(to.at + i * to.stride + width);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector first = load(right), second = load(right + width);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Vector x = splat(left[i * RowStep]);
      sum[i][0] = fma(x, first, sum[i][0]);
      sum[i][1] = fma(x, second, sum[i][1]);
    }
    left += DepthStep;
    right += columns;
  }
  if (!whole) {
    Scalar tile[kTileRows * columns];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      store(tile + i * columns, sum[i][0]);
      store(tile + i * columns + width, sum[i][1]);
    }
    finish_edge(tile, to);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    Scalar* const row = to.at + i * to.stride;
    if (to.accumulate) {
      sum[i][0] = sum[i][0] + load(row);
      sum[i][1] = sum[i][1] + load(row + width);
    }
    if (to.scale) {
      const Vector scale = splat(to.scale[i]);
      sum[i][0] = sum[i][0] * scale;
      sum[i][1] = sum[i][1] * scale;
    }
    store(row, sum[i][0]);
    store(row + width, sum[i][1]);
  }
}

// ---------------------------------------------------------------------------------- packing

PKT_INLINE void copy_run(const double* from, double* to, int64_t count, double scale) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * scale;
}

template <class T>
PKT_INLINE void copy_run(const T* from, double* to, int64_t count, double scale) {
  for (int64_t i = 0; i < count; ++i) to[i] = double(widen(from[i])) * scale;
}

template <class T>
PKT_INLINE void copy_run(const T* from, float* to, int64_t count, float scale) {
  const F32 factor = splat(scale);
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) store(to + i, load(from + i) * factor);
  for (; i < count; ++i) to[i] = widen(from[i]) * scale;
}

template <class Scalar>
PKT_INLINE void zero_run(Scalar* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Scalar(0);
}

// Rows [row, row + rows) and depth [begin, begin + depth) of the left operand, tile after tile.
template <class Scalar>
struct LeftBlock {
  const Factor* from;
  int64_t row, rows, begin, depth;
  const Scalar* scale;  // of each row
  Scalar* to;
  bool by_depth;  // a tile is (depth, kTileRows), else (kTileRows, kRowStep)
};

template <class Scalar, class T>
void pack_left(const LeftBlock<Scalar>& block) {
  const int64_t row_stride = block.from->row_stride, step = block.from->column_stride;
  for (int64_t top = 0; top < block.rows; top += kTileRows) {
    const T* from = static_cast<const T*>(block.from->data) + (block.row + top) * row_stride +
                    block.begin * step;
    Scalar* const to = block.to + top * kRowStep;
    const int64_t rows = smaller(kTileRows, block.rows - top);
    if (block.by_depth) {
      for (int64_t k = 0; k < block.depth; ++k) {
        Scalar* const column = to + k * kTileRows;
        for (int64_t i = 0; i < rows; ++i) column[i] = Scalar(widen(from[k * step + i]));
        for (int64_t i = rows; i < kTileRows; ++i) column[i] = Scalar(0);
      }
      continue;
    }
    for (int64_t i = 0; i < kTileRows; ++i) {
      Scalar* const row = to + i * kRowStep;
      if (i >= rows) {
        zero_run(row, block.depth);
      } else if (step == 1) {
        copy_run(from + i * row_stride, row, block.depth, block.scale[top + i]);
      } else {
        const Scalar scale = block.scale[top + i];
        for (int64_t k = 0; k < block.depth; ++k) {
          row[k] = Scalar(widen(from[i * row_stride + k * step])) * scale;
        }
      }
    }
  }
}

// Depth [begin, begin + depth) of `columns` columns of the right operand from `column` on.
template <class Scalar>
struct RightStrip {
  const Factor* from;
  int64_t begin, depth, column, columns;
  Scalar* to;  // (depth, kColumns)
};

template <class Scalar, class T>
void pack_right(const RightStrip<Scalar>& strip) {
  constexpr int columns = kColumns<Scalar>;
  const int64_t row_stride = strip.from->row_stride, step = strip.from->column_stride;
  const T* from = static_cast<const T*>(strip.from->data) + strip.begin * row_stride +
                  strip.column * step;
  if (step == 1) {
    for (int64_t k = 0; k < strip.depth; ++k) {
      Scalar* const row = strip.to + k * columns;
      copy_run(from + k * row_stride, row, strip.columns, Scalar(1));
      zero_run(row + strip.columns, columns - strip.columns);
    }
    return;
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = 0; k < strip.depth; ++k) {
      strip.to[k * columns + j] =
          j < strip.columns ? Scalar(widen(from[k * row_stride + j * step])) : Scalar(0);
    }
  }
}

template <class Scalar>
struct Packers {
  void (*left)(const LeftBlock<Scalar>&);
  void (*right)(const RightStrip<Scalar>&);
  void (*scales)(const Factor&, int64_t, int64_t, int64_t, Scalar*, Scalar*);
};

// ---------------------------------------------------------------------------------- row norms

// Σ x² in double, which neither overflows nor vanishes for float rows.
template <class T>
double sum_of_squares(const T* x, int64_t step, int64_t count) {
  constexpr int lanes = 16;
  double part[lanes] = {};
  int64_t k = 0;
  if (step == 1) {
    for (; k + lanes <= count; k += lanes) {
      for (int i = 0; i < lanes; ++i) {
        const double value = double(widen(x[k + i]));
        part[i] += value * value;
      }
    }
  }
  double total = 0;
  for (int i = 0; i < lanes; ++i) total += part[i];
  for (; k < count; ++k) {
    const double value = double(widen(x[k * step]));
    total += value * value;
  }
  return total;
}

// 1/‖row‖ as a product of a power of two, applied while packing, and a factor for the result.
template <class Scalar, class T>
void unit_scales(const Factor& left, int64_t depth, int64_t row, int64_t rows, Scalar* before,
                 Scalar* after) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = static_cast<const T*>(left.data) + (row + i) * left.row_stride;
    const double norm = std::sqrt(sum_of_squares(x, left.column_stride, depth));
    before[i] = after[i] = Scalar(1);
    if (norm > 0 && norm <= 1e300) {
      int exponent;
      std::frexp(norm, &exponent);
      exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
      const double power = std::ldexp(1.0, -exponent);
      before[i] = Scalar(power);
      after[i] = Scalar(1 / (norm * power));
    } else if (norm != 0) {
      after[i] = Scalar(1 / norm);
    }
  }
}

template <class Scalar, class T>
constexpr Packers<Scalar> kPackersOf = {pack_left<Scalar, T>, pack_right<Scalar, T>,
                                        unit_scales<Scalar, T>};

template <class Scalar>
Packers<Scalar> packers(int dtype) {
  if (dtype == kBFloat16) return kPackersOf<Scalar, bf16>;
  if (dtype == kFloat16) return kPackersOf<Scalar, f16>;
  return kPackersOf<Scalar, float>;
}

template <>
Packers<double> packers<double>(int dtype) {
  if (dtype == kBFloat16) return kPackersOf<double, bf16>;
  if (dtype == kFloat16) return kPackersOf<double, f16>;
  if (dtype == kFloat32) return kPackersOf<double, float>;
  return kPackersOf<double, double>;
}

// ------------------------------------------------------------------------------------ blocks

// Memory that starts on a cache line.
template <class Scalar>
struct Buffer {
  explicit Buffer(int64_t count) : raw(new Scalar[count + 64 / sizeof(Scalar)]) {
    at = raw;
    while (reinterpret_cast<uintptr_t>(at) % 64) ++at;
  }
  ~Buffer() { delete[] raw; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Scalar* raw;
  Scalar* at;
};

struct Range {
  int64_t begin, end;
};

// The part of the depth in which `columns` columns from `column` on are not known to be zero.
Range live_depth(const Gemm& job, int64_t column, int64_t columns) {
  if (job.right_part == kUpper) return {0, smaller(job.depth, column + columns)};
  if (job.right_part == kLower) return {column, job.depth};
  return {0, job.depth};
}

template <class Scalar>
struct Product {
  static constexpr int columns = kColumns<Scalar>;
  const Gemm& job;
  Packers<Scalar> left, right;
  bool by_depth;
  int64_t panel_columns, panel_depth;  // multiples of a strip's columns and of kDepth
  int64_t row_blocks, column_groups;
  Scalar* panel;

  explicit Product(const Gemm& job)
      : job(job),
        left(packers<Scalar>(job.left.dtype)),
        right(packers<Scalar>(job.right.dtype)),
        by_depth(job.left.row_stride == 1 && job.left.column_stride != 1 && !job.unit_rows) {
    panel_columns = smaller(kPanelColumns, pieces(job.columns, columns) * columns);
    const int64_t fitting = kPanelBytes / int64_t(panel_columns * sizeof(Scalar)) / kDepth;
    panel_depth = smaller(larger(1, fitting), pieces(job.depth, kDepth)) * kDepth;
    const int64_t tiles = pieces(job.rows, kTileRows);
    // As many blocks as threads, or a multiple, so that all have the same to do.
    const int64_t wanted = job.threads * (job.upper ? 4 : 1);
    row_blocks = smaller(tiles, pieces(pieces(tiles, kBlockTiles), wanted) * wanted);
    column_groups = row_blocks < job.threads
                        ? smaller(pieces(job.threads, row_blocks), panel_columns / columns)
                        : 1;
  }

  int64_t panel_size() const { return panel_columns * panel_depth; }

  Scalar* strip_at(int64_t block, int64_t strip, int64_t strips) const {
    return panel + (block * strips + strip) * kDepth * columns;
  }

  // Packs strip `strip` of depth block `block` of the panel that starts at (depth, column).
  void pack(int64_t depth, int64_t column, int64_t block, int64_t strip, int64_t strips) const {
    const int64_t first = column + strip * columns;
    const int64_t count = smaller(columns, job.columns - first);
    const Range live = live_depth(job, first, count);
    const int64_t start = depth + block * kDepth;
    const int64_t begin = larger(start, live.begin);
    const int64_t end = smaller(start + kDepth, live.end);
    if (begin >= end) return;
    Scalar* const to = strip_at(block, strip, strips) + (begin - start) * columns;
    right.right({&job.right, begin, end - begin, first, count, to});
  }

  // Row block `rows` times strips [first, last) of the panel that starts at (depth, column).
  void multiply_block(int64_t depth, int64_t depth_end, int64_t column, int64_t strips,
                      Range rows, Range group, Scalar* packed, Scalar* before,
                      Scalar* after) const {
    if (job.unit_rows) {
      left.scales(job.left, job.depth, rows.begin, rows.end - rows.begin, before, after);
    }
    for (int64_t start = depth; start < depth_end; start += kDepth) {
      const int64_t stop = smaller(start + kDepth, depth_end);
      left.left({&job.left, rows.begin, rows.end - rows.begin, start, stop - start, before, packed,
                 by_depth});
      for (int64_t strip = group.begin; strip < group.end; ++strip) {
        const int64_t at = column + strip * columns;
        multiply_strip(start, stop, at, strip_at((start - depth) / kDepth, strip, strips), rows,
                       packed, after);
      }
    }
  }

  void multiply_strip(int64_t start, int64_t stop, int64_t column, const Scalar* strip, Range rows,
                      const Scalar* packed, const Scalar* after) const {
    const int64_t count = smaller(columns, job.columns - column);
    const Range live = live_depth(job, column, count);
    const int64_t begin = larger(start, live.begin), end = smaller(stop, live.end);
    if (begin >= end) return;
    const bool accumulate = job.accumulate || begin > live.begin;
    const bool scaled = job.unit_rows && end == live.end;
    strip += (begin - start) * columns;
    for (int64_t row = rows.begin; row < rows.end; row += kTileRows) {
      if (job.upper && column + count <= row) break;
      const Scalar* tile = packed + (row - rows.begin) * kRowStep;
      const Target<Scalar> to{static_cast<Scalar*>(job.out) + row * job.out_stride + column,
                              job.out_stride,
                              smaller(kTileRows, rows.end - row),
                              count,
                              scaled ? after + (row - rows.begin) : nullptr,
                              accumulate};
      if (by_depth) {
        multiply<Scalar, 1, kTileRows>(tile + (begin - start) * kTileRows, strip, end - begin, to);
      } else {
        multiply<Scalar, kRowStep, 1>(tile + (begin - start), strip, end - begin, to);
      }
    }
  }

  Range rows_of(int64_t block) const {
    const int64_t tiles = pieces(job.rows, kTileRows);
    return {block * tiles / row_blocks * kTileRows,
            smaller(job.rows, (block + 1) * tiles / row_blocks * kTileRows)};
  }
};

template <class Scalar>
void run(const Gemm& job) {
  Product<Scalar> product(job);
  const Buffer<Scalar> panel(product.panel_size());
  product.panel = panel.at;
  constexpr int64_t own = kBlockRows * (kRowStep + 2);
  const Buffer<Scalar> blocks(own * job.threads);
  const int64_t tasks = product.row_blocks * product.column_groups;
#pragma omp parallel num_threads(job.threads)
  {
#if defined(_OPENMP)
    Scalar* const packed = blocks.at + own * omp_get_thread_num();
#else
    Scalar* const packed = blocks.at;
#endif
    Scalar* const before = packed + kBlockRows * kRowStep;
    Scalar* const after = before + kBlockRows;
    for (int64_t i = 0; i < kBlockRows; ++i) before[i] = Scalar(1);
    for (int64_t column = 0; column < job.columns; column += product.panel_columns) {
      const int64_t width = smaller(product.panel_columns, job.columns - column);
      const int64_t strips = pieces(width, Product<Scalar>::columns);
      for (int64_t depth = 0; depth < job.depth; depth += product.panel_depth) {
        const int64_t depth_end = smaller(job.depth, depth + product.panel_depth);
        const int64_t packs = pieces(depth_end - depth, kDepth) * strips;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < packs; ++i) {
          product.pack(depth, column, i / strips, i % strips, strips);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
          const int64_t group = task % product.column_groups;
          const Range group_strips{group * strips / product.column_groups,
                                   (group + 1) * strips / product.column_groups};
          product.multiply_block(depth, depth_end, column, strips,
                                 product.rows_of(task / product.column_groups), group_strips,
                                 packed, before, after);
        }
      }
    }
  }
}

}  // namespace

void gemm(const Gemm& job) {
  if (job.wide) {
    run<double>(job);
  } else {
    run<float>(job);
  }
}

}  // namespace PKT_ISA
}  // namespace pkt
