// Host entry points of the CUDA kernels.  Each returns nullptr, or CUDA's message for what failed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace pkt {
namespace cuda {

// Why kernels of this extension cannot run on the current device; nullptr when they can.
const char* problem();

// Bytes of device memory that `inject` wants for a list of `count` matrices.
std::size_t inject_table_bytes(std::int64_t count);

// One launch over all matrices on `stream`; job.unchanged is in device memory, zeroed, and `table`
// is device memory of inject_table_bytes(job.count) bytes.
const char* inject(const Inject& job, void* table, std::uintptr_t stream);

// job.out is pinned host memory, everything else in device memory.  An index outside [0, rows)
// gives a row of NaN.
const char* capture_rows_pinned(const CaptureRows& job, int64_t rows, std::uintptr_t stream);

}  // namespace cuda
}  // namespace pkt
