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

struct Kernels {
  const char* isa;
  void (*capture_rows)(const CaptureRows&);
};

// The kernels for the best instruction set of this machine, or for the one named in PKT_FAST_ISA.
const Kernels& kernels();

// Whether this machine runs the named instruction set and the extension was compiled for it.
bool isa_available(const char* isa);

}  // namespace pkt
