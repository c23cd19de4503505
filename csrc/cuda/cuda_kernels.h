// Host entry points of the CUDA kernels.  Each returns nullptr, or CUDA's message for what failed.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace pkt {
namespace cuda {

// One launch over all matrices on `stream`; job.unchanged is in device memory, zeroed.
const char* inject(const Inject& job, std::uintptr_t stream);

// job.out is pinned host memory, everything else in device memory.  An index outside [0, rows)
// gives a row of NaN.
const char* capture_rows_pinned(const CaptureRows& job, int64_t rows, std::uintptr_t stream);

}  // namespace cuda
}  // namespace pkt
