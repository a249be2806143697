// The kernel of conv.h in the compiler's vector types, compiled once per instruction set: the including file sets
// T2CT_WIDTH (floats in a register). No standard library here: see norm_kernels.h.
#include "conv.h"

namespace t2ct {
namespace {

constexpr int W = T2CT_WIDTH;
constexpr int V = 2;                // vectors of a panel
constexpr int STEP = W == 16 ? 8 : 4;  // rows at a time: STEP * V sums in 32 registers, or in 16
typedef float vf __attribute__((vector_size(4 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }

template <int R>
void rows_of(const float* w, int64_t stride, const float* columns, int64_t depth, float* sums) {
  vf s[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) s[r][v] = vf{};  // a block of channels is one chain: sums of sums round less
  for (int64_t k = 0; k < depth; ++k, columns += V * W) {
    vf c[V];
    for (int v = 0; v < V; ++v) c[v] = load(columns + v * W);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) s[r][v] += w[r * stride + k] * c[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * W, load(sums + (r * V + v) * W) + s[r][v]);
}

void multiply(const void* w, int64_t stride, int64_t rows, const void* columns, int64_t depth, float* sums) {
  const float *weights = static_cast<const float*>(w), *c = static_cast<const float*>(columns);
  int64_t r = 0;
  for (; r + STEP <= rows; r += STEP) rows_of<STEP>(weights + r * stride, stride, c, depth, sums + r * V * W);
  for (; r < rows; ++r) rows_of<1>(weights + r * stride, stride, c, depth, sums + r * V * W);
}

}  // namespace
}  // namespace t2ct
