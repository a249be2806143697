// Packs the columns of conv.h, spreads the outputs over threads and writes what they sum to.
#include "conv.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../bfloat16.h"
#include "../norm/norm.h"  // the list of instruction sets

namespace t2ct {
namespace {

const ConvKernel& find_kernel(const ConvShape& s, int isa) {
#ifdef T2CT_BFLOAT16
  if (s.bfloat16) return conv_avx512bf16;
#endif
#ifdef T2CT_X86
  const std::string name = isa_name(isa);
  if (name == "avx512") return conv_avx512;
  if (name == "avx2") return conv_avx2;
#endif
  return conv_portable;
}

// For every voxel and tap, the voxel that the tap reads, or -1 where it reads the zero padding.
std::vector<int32_t> neighbours(const ConvShape& s, int64_t padded) {
  std::vector<int32_t> from(padded * TAPS, -1);
  int64_t voxel = 0;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t x = 0; x < s.x; ++x)
      for (int64_t y = 0; y < s.y; ++y)
        for (int64_t z = 0; z < s.z; ++z, ++voxel)
          for (int64_t t = 0; t < TAPS; ++t) {
            const int64_t i = x + t / 9 - 1, j = y + t / 3 % 3 - 1, k = z + t % 3 - 1;
            if (i >= 0 && i < s.x && j >= 0 && j < s.y && k >= 0 && k < s.z)
              from[voxel * TAPS + t] = static_cast<int32_t>(((n * s.x + i) * s.y + j) * s.z + k);
          }
  return from;
}

// T: float, or uint16_t for bfloat16, whose numbers k and k + 1 lie together: `pair` of them.
template <typename T, int pair>
void run(const ConvShape& s, const ConvKernel& kernel, const T* x, const T* w, const float* bias, T* y, int threads) {
  constexpr int64_t block = 8 * pair;  // channels whose columns are packed at a time: 27 KB a panel of 32 voxels
  const int64_t voxels = s.n * s.x * s.y * s.z, P = kernel.panel, panels = (voxels + P - 1) / P;
  const int64_t depth = s.in * TAPS, row_blocks = (s.out + ROWS - 1) / ROWS;
  const std::vector<int32_t> from = neighbours(s, panels * P);
  std::vector<T> columns(panels * block * TAPS * P);
  std::vector<float> sums(panels * s.out * P);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t p = 0; p < panels; ++p) {
        float* row = sums.data() + (p * s.out + o) * P;
        std::fill(row, row + P, bias ? bias[o] : 0.0f);
      }
    for (int64_t first = 0; first < s.in; first += block) {
      const int64_t channels = std::min(block, s.in - first);
#pragma omp for collapse(2) schedule(static)
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t t = 0; t < TAPS; ++t) {
          T* panel = columns.data() + p * block * TAPS * P;
          for (int64_t v = 0; v < P; ++v) {
            const int32_t source = from[(p * P + v) * TAPS + t];
            const T* values = x + (source < 0 ? 0 : source) * s.in + first;
            for (int64_t c = 0; c < channels; ++c) {
              const int64_t k = c * TAPS + t;
              panel[(k / pair * P + v) * pair + k % pair] = source < 0 ? T{0} : values[c];
            }
          }
        }
#pragma omp for schedule(static)
      for (int64_t b = 0; b < row_blocks; ++b) {
        const int64_t o = b * ROWS, rows = std::min(ROWS, s.out - o);
        for (int64_t p = 0; p < panels; ++p)
          kernel.multiply(w + o * depth + first * TAPS, depth, rows, columns.data() + p * block * TAPS * P,
                          channels * TAPS / pair, sums.data() + (p * s.out + o) * P);
      }
    }
#pragma omp for schedule(static)
    for (int64_t voxel = 0; voxel < voxels; ++voxel) {
      const float* column = sums.data() + voxel / P * s.out * P + voxel % P;
      for (int64_t o = 0; o < s.out; ++o) {
        if constexpr (pair == 1)
          y[voxel * s.out + o] = column[o * P];
        else
          y[voxel * s.out + o] = round_bfloat16(column[o * P]);
      }
    }
  }
}

}  // namespace

bool conv_has_bfloat16() {
#ifdef T2CT_BFLOAT16
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

void conv3d(const ConvShape& s, const void* x, const void* w, const float* bias, void* y, int threads, int isa) {
  if (s.bfloat16 && (!conv_has_bfloat16() || s.in % 2))
    throw std::invalid_argument("conv3d: bfloat16 wants AVX512-BF16 and an even number of channels");
  const ConvKernel& kernel = find_kernel(s, isa);
  threads = std::max(threads, 1);
  if (s.bfloat16)
    run<uint16_t, 2>(s, kernel, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(w), bias,
                     static_cast<uint16_t*>(y), threads);
  else
    run<float, 1>(s, kernel, static_cast<const float*>(x), static_cast<const float*>(w), bias,
                  static_cast<float*>(y), threads);
}

}  // namespace t2ct
