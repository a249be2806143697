// The kernel of conv.h for bfloat16: VDPBF16PS multiplies pairs and adds them to float32 sums.
#include <immintrin.h>

#include "conv.h"

namespace t2ct {
namespace {

constexpr int W = 16, V = 2;

template <int R>
void rows_of(const uint16_t* w, int64_t stride, const uint16_t* columns, int64_t depth, float* sums) {
  __m512 s[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) s[r][v] = _mm512_setzero_ps();  // a block of channels is one chain: sums of sums round less
  for (int64_t k = 0; k < depth; ++k, columns += 2 * V * W) {
    __m512bh c[V];
    for (int v = 0; v < V; ++v) c[v] = (__m512bh)_mm512_loadu_si512(columns + 2 * v * W);
    for (int r = 0; r < R; ++r) {
      int pair;
      __builtin_memcpy(&pair, w + r * stride + 2 * k, 4);
      const __m512bh weights = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < V; ++v) s[r][v] = _mm512_dpbf16_ps(s[r][v], weights, c[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* sum = sums + (r * V + v) * W;
      _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), s[r][v]));
    };
}

void multiply(const void* w, int64_t stride, int64_t rows, const void* columns, int64_t depth, float* sums) {
  const uint16_t *weights = static_cast<const uint16_t*>(w), *c = static_cast<const uint16_t*>(columns);
  if (rows == ROWS) return rows_of<ROWS>(weights, stride, c, depth, sums);
  for (int64_t r = 0; r < rows; ++r) rows_of<1>(weights + r * stride, stride, c, depth, sums + r * V * W);
}

}  // namespace

const ConvKernel conv_avx512bf16 = {"avx512bf16", V * W, multiply};
}  // namespace t2ct
