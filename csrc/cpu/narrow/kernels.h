// The serial kernel of narrow.h, written once in the compiler's vector types and compiled once per instruction set: the
// including file sets T2CT_WIDTH (floats in a register). No standard library here: see norm/kernels.h. setup.py compiles
// these units with -ffp-contract=off: multiply_add says what is fused.
#include "../fused.h"
#include "../vectors.h"
#include "narrow.h"

namespace t2ct {
namespace {

constexpr int TILE = NARROW_TILE;

// The sum of a vector's lanes, halves first.
inline float total(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// TILE outputs that read voxels `at` to at + TILE + 1 of every row. edge: some of these lie outside, where zeros are.
template <bool edge, typename T>
__attribute__((always_inline)) inline void tile(const T* const* rows, int64_t Z, int64_t C, int64_t at, const float* w,
                                                float* sums) {
  vf s[TILE] = {};
  for (int r = 0; r < 9; ++r) {
    if (!rows[r]) continue;
    for (int64_t c = 0; c < C; c += W) {
      vf tap[3];
      for (int k = 0; k < 3; ++k) tap[k] = load(w + (3 * r + k) * C + c);
      for (int j = 0; j < TILE + 2; ++j) {
        if (edge && (at + j < 0 || at + j >= Z)) continue;
        const vf v = load(rows[r] + (at + j) * C + c);
        for (int k = 0; k < 3; ++k)
          if (j - k >= 0 && j - k < TILE) s[j - k] = multiply_add(v, tap[k], s[j - k]);
      }
    }
  }
  for (int i = 0; i < TILE; ++i) sums[i] = total(s[i]);
}

template <typename T>
void row(const void* const* rows, int64_t Z, int64_t C, int64_t first, const float* w, float bias, int64_t outputs,
         float* out) {
  const T* x[9];
  for (int i = 0; i < 9; ++i) x[i] = static_cast<const T*>(rows[i]);
  for (int64_t z = 0; z < outputs; z += TILE) {
    float sums[TILE];
    const int64_t at = z + first;
    if (at >= 0 && at + TILE + 2 <= Z)
      tile<false>(x, Z, C, at, w, sums);
    else
      tile<true>(x, Z, C, at, w, sums);
    for (int64_t i = 0; i < TILE && z + i < outputs; ++i) out[z + i] = sums[i] + bias;
  }
}

template <typename T>
constexpr NarrowKernels table() {
  return {row<T>};
}

}  // namespace
}  // namespace t2ct
