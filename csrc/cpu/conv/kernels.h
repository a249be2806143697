// The kernel of conv.h, compiled once per instruction set. The including file sets T2CT_WIDTH (floats in a register), and
// T2CT_PAIRS for bfloat16, whose numbers are multiplied two at a time (VDPBF16PS). No standard library here: see
// norm/kernels.h.
#include "conv.h"
#include "../vectors.h"

namespace t2ct {
namespace {

constexpr int V = 2;                   // vectors of a panel
constexpr int STEP = W == 16 ? 8 : 4;  // rows at a time: STEP * V sums in 32 registers, or in 16

#ifdef T2CT_PAIRS
typedef uint16_t number;
typedef __m512bh column;
constexpr int PAIR = 2;
inline column load_column(const number* p) { return (column)_mm512_loadu_si512(p); }
inline column spread(const number* w) {
  int pair;
  __builtin_memcpy(&pair, w, 4);
  return (column)_mm512_set1_epi32(pair);
}
inline vf multiply_add(vf sum, column w, column c) { return (vf)_mm512_dpbf16_ps((__m512)sum, w, c); }
#else
typedef float number;
typedef vf column;
constexpr int PAIR = 1;
inline column load_column(const number* p) { return load(p); }
inline float spread(const number* w) { return *w; }
inline vf multiply_add(vf sum, float w, column c) { return sum + w * c; }
#endif

template <int R>
void rows_of(const number* w, int64_t stride, const number* columns, int64_t depth, float* sums) {
  vf s[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) s[r][v] = vf{};  // a block of channels is one chain: sums of sums round less
  for (int64_t k = 0; k < depth; ++k, columns += V * W * PAIR) {
    column c[V];
    for (int v = 0; v < V; ++v) c[v] = load_column(columns + v * W * PAIR);
    for (int r = 0; r < R; ++r) {
      const auto weight = spread(w + r * stride + k * PAIR);
      for (int v = 0; v < V; ++v) s[r][v] = multiply_add(s[r][v], weight, c[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * W, load(sums + (r * V + v) * W) + s[r][v]);
}

void multiply(const void* w, int64_t stride, int64_t rows, const void* columns, int64_t depth, float* sums) {
  const number *weights = static_cast<const number*>(w), *c = static_cast<const number*>(columns);
  int64_t r = 0;
  for (; r + STEP <= rows; r += STEP) rows_of<STEP>(weights + r * stride, stride, c, depth, sums + r * V * W);
  for (; r < rows; ++r) rows_of<1>(weights + r * stride, stride, c, depth, sums + r * V * W);
}

}  // namespace
}  // namespace t2ct
