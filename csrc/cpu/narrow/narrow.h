// 3x3x3 convolution, stride 1, from channels-last memory to a few channels: the last layer of a VAE's decoder or of a
// UNet. A library that computes sixteen outputs at a time wastes most of its work there. Here the channels are the
// lanes of a vector: each voxel is read once for the three outputs along Z that it belongs to, and a number of the
// result is the sum of one vector's lanes.
//
// Every number is made by one sequence of operations, however the work is cut: a part has the bits of the whole.
#pragma once

#include <cstdint>

namespace t2ct {

constexpr int64_t NARROW_CHANNELS = 16;  // the input channels are a multiple of this: the widest vector
constexpr int64_t NARROW_TILE = 8;       // outputs along Z that are summed at once

struct NarrowKernels {
  // A row of `outputs` numbers along Z from nine rows of Z voxels with C channels, in the order 3 * (along X) + (along Y),
  // 0 for one of zeros. first: the voxel at which output 0 begins to read, 0 or -1. w: (9, 3, C), float32.
  void (*row)(const void* const* rows, int64_t Z, int64_t C, int64_t first, const float* w, float bias, int64_t outputs,
              float* out);
};

// [0] float32, [1] bfloat16
extern const NarrowKernels narrow_portable[2];
#ifdef T2CT_X86
extern const NarrowKernels narrow_avx2[2];
extern const NarrowKernels narrow_avx512[2];
#endif

// x: (n, X, Y, Z, C); padding of each axis 0 or 1.
struct NarrowShape {
  int64_t n, X, Y, Z, C, out, pad_x, pad_y, pad_z;
  bool bfloat16;
};

// w: (out, 9, 3, C) float32, bias: (out) float32 or null, y: (n, X', Y', Z', out) in x's dtype.
void conv3d_narrow(const NarrowShape& shape, const void* x, const float* w, const float* bias, void* y, int threads,
                   int isa);

}  // namespace t2ct
