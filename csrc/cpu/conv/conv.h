// 3x3x3 convolution, stride 1, zero padding 1, of small channels-last volumes with many channels: the deep levels of a
// UNet. There the weights are all of the work (28 MB for 512 -> 512 channels, read for 32 voxels), and a library that
// first reorders them reads and writes them twice more. Here they are read once, as they lie: (O, C, 3, 3, 3).
//
// y (O, voxels) = w (O, 27 C) * columns (27 C, voxels): the columns are cut into panels of a few voxels, packed a block
// of channels at a time; the sums stay float32. Every output is summed in one order, whatever the number of threads.
#pragma once

#include <cstdint>

namespace t2ct {

constexpr int64_t TAPS = 27;
constexpr int64_t ROWS = 8;  // outputs that one call of a kernel computes

struct ConvKernel {
  const char* name;
  int64_t panel;  // voxels of a panel

  // sums[r * panel + v] += sum_k w[r * stride + k] * columns[k * panel + v] for r < rows <= ROWS, k < depth.
  // float32: depth counts numbers. bfloat16: depth counts pairs of numbers, which lie together in w and in columns.
  void (*multiply)(const void* w, int64_t stride, int64_t rows, const void* columns, int64_t depth, float* sums);
};

extern const ConvKernel conv_portable;
#ifdef T2CT_X86
extern const ConvKernel conv_avx2;
extern const ConvKernel conv_avx512;
#endif
#ifdef T2CT_BFLOAT16  // the compiler knows AVX512-BF16
extern const ConvKernel conv_avx512bf16;
#endif

// bfloat16 needs a processor that multiplies it.
bool conv_has_bfloat16();

struct ConvShape {
  int64_t n, x, y, z, in, out;
  bool bfloat16;
};

// x: (n, X, Y, Z, in), w: (out, in, 3, 3, 3), bias: (out) float32 or null, y: (n, X, Y, Z, out). isa: as for norm.h.
// bfloat16 wants an even number of input channels.
void conv3d(const ConvShape& shape, const void* x, const void* w, const float* bias, void* y, int threads, int isa);

}  // namespace t2ct
