// Chooses the kernels compiled for the best instruction set this machine runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define PKT_DECLARE(isa)                  \
  namespace isa {                         \
  void capture_rows(const CaptureRows&);  \
  void grad_x_act(const GradXAct&);       \
  void row_cosine(const RowCosine&);      \
  void inject(const Inject&);             \
  void gemm(const Gemm&);                 \
  void relation(const Relation&);         \
  }

namespace pkt {

PKT_DECLARE(avx512)
PKT_DECLARE(avx2)
PKT_DECLARE(baseline)

namespace {

#define PKT_KERNELS(isa)                                                             \
  Kernels {                                                                          \
    #isa, isa::capture_rows, isa::grad_x_act, isa::row_cosine, isa::inject, isa::gemm, \
        isa::relation                                                                \
  }

// Best first.
const Kernels kCompiled[] = {
#if defined(PKT_HAVE_avx512)
    PKT_KERNELS(avx512),
#endif
#if defined(PKT_HAVE_avx2)
    PKT_KERNELS(avx2),
#endif
    PKT_KERNELS(baseline),
};

bool runs_here(const char* isa) {
#if defined(PKT_HAVE_avx512)
  if (std::strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
#if defined(PKT_HAVE_avx2)
  // Every processor with both of these also converts half precision (F16C).
  if (std::strcmp(isa, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return std::strcmp(isa, "baseline") == 0;
}

const Kernels& choose() {
  const char* wanted = std::getenv("PKT_FAST_ISA");
  for (const Kernels& candidate : kCompiled) {
    if (wanted && *wanted && std::strcmp(candidate.isa, wanted) != 0) continue;
    if (runs_here(candidate.isa)) return candidate;
  }
  return kCompiled[sizeof(kCompiled) / sizeof(kCompiled[0]) - 1];
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* vendor() {
#if defined(PKT_HAVE_avx512) || defined(PKT_HAVE_avx2)
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

bool isa_available(const char* isa) {
  for (const Kernels& candidate : kCompiled) {
    if (std::strcmp(candidate.isa, isa) == 0) return runs_here(isa);
  }
  return false;
}

}  // namespace pkt
