// What the CPU kernels take.  Raw addresses and element strides; the Python side has checked them.
#pragma once

#include <cstdint>

namespace pkt {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

inline int item_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// A (batch, rows, dim) tensor whose last dimension is contiguous; data is null when it is absent.
struct Activation {
  const void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

struct CaptureRows {
  void* out;
  int out_dtype;
  int64_t out_stride;
  const int64_t* index;
  int64_t count;
  int64_t dim;
  int dtype;
  int64_t rows_per_batch;
  Activation value, minus, other, other_minus;
  double lam, scale;
  bool normalize;
  int threads;
};

struct GradXAct {
  void* with_sign;  // (batch,) each: double for double inputs, else float
  void* absolute;
  int64_t batch, tokens, dim;
  int gradient_dtype, activation_dtype;
  Activation gradient, activation;
  int threads;
};

// A (rows, dim) tensor whose last dimension is contiguous.
struct Rows {
  const void* data;
  int dtype;
  int64_t stride;
};

// Cosines c of the rows and, where wanted, the gradients of Σ weight·c.
struct RowCosine {
  void* cosines;  // this and weight: double for double operands, else float
  const void* weight;
  int64_t weight_stride;
  int64_t rows, dim;
  Rows x, y;
  void* dx;  // null when not wanted, else contiguous
  void* dy;
  int threads;
};

struct Factor {
  const void* data;
  int dtype;
  int64_t row_stride, column_stride;
};

// W (rows, columns) += scale·left (rows, rank)·right (rank, columns).
struct Matrix {
  void* weight;
  int dtype;
  int64_t rows, columns, stride;
  Factor left, right;
  int64_t rank;
  void* backup;  // null, or where the old bits go
  int64_t backup_stride;
  double scale;
};

struct Inject {
  const Matrix* matrices;
  int64_t count;
  int64_t* unchanged;  // (count,)
  bool stochastic;
  uint64_t seed;
  int threads;
};

// Which part of a square matrix may be other than zero.
enum Part : int { kWhole = 0, kUpper = 1, kLower = 2 };

// out (rows, columns) = left (rows, depth)·right (depth, columns), in double when wide, else in
// float; operands of another dtype are converted as they are packed.  No size is zero.
struct Gemm {
  void* out;  // contiguous rows of float or double
  int64_t out_stride;
  int64_t rows, columns, depth;
  Factor left, right;
  bool wide;
  int right_part;   // a Part; right is square when it is not kWhole
  bool upper;       // only elements on and above the diagonal of out are wanted
  bool accumulate;  // out += left·right
  bool unit_rows;   // each row of left is divided by its norm; not together with accumulate
  int threads;
};

// Token relations of packed sequences: sequence s has the rows starts[s] to starts[s + 1], in order.
struct Relation {
  Rows x, y;
  int64_t x_dim, y_dim;  // neither is zero
  const int64_t* starts;  // (sequences + 1,)
  int64_t sequences;
  bool wide;  // all that follows is double, else float
  void* inner;  // (sequences,) each
  void* norm_x;
  void* norm_y;
  void* of_inner;  // the slopes (rows, x_dim), contiguous; both null when not wanted
  void* of_norm;
  int threads;
};

struct Kernels {
  const char* isa;
  void (*capture_rows)(const CaptureRows&);
  void (*grad_x_act)(const GradXAct&);
  void (*row_cosine)(const RowCosine&);
  void (*inject)(const Inject&);
  void (*gemm)(const Gemm&);
  void (*relation)(const Relation&);
};

// The kernels for the best instruction set of this machine, or for the one named in PKT_FAST_ISA.
const Kernels& kernels();

// Who made the processor: "intel", "amd" or "other".
const char* vendor();

// Whether this machine runs the named instruction set and the extension was compiled for it.
bool isa_available(const char* isa);

}  // namespace pkt
