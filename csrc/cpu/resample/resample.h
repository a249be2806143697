// Trilinear doubling (align_corners=False) of channels-last memory on the CPU, and its gradient: what the dispatcher
// (resample.cpp) and the serial kernels of one instruction set (kernels.h) say to each other.
//
// Voxel i of an axis becomes 2i and 2i + 1 of the doubled one. Cell i of an axis, 0 <= i <= its size, lies between
// voxels i - 1 and i and holds the doubled 2i - 1 and 2i, each three quarters its nearer neighbour and one quarter the
// other; beyond the border the edge voxel goes on. A row is all voxels along Z at one (sample, X, Y).
//
// Every number is made by one sequence of operations whatever planes are asked for and however the work is cut, so a
// part has the bits of the whole, on 1 thread and on 64.
#pragma once

#include <cstdint>

namespace t2ct {

struct ResampleKernels {
  // The four rows of 2 Z voxels in one cell of X and Y, from four rows of Z voxels; both in the order 2 * which along X
  // + which along Y; an out of 0 is not wanted. stream: past the cache; out and every voxel are whole cache lines.
  // scratch: resample_scratch floats.
  void (*between)(const void* const* rows, void* const* out, int64_t Z, int64_t C, bool stream, float* scratch);

  // sums (Z, C) = four rows of 2 Z voxels, in the order of X, weighted 1/4, 3/4, 3/4, 1/4 along X and Z.
  // scratch: resample_scratch floats.
  void (*gather)(const void* const* rows, float* sums, int64_t Z, int64_t C, float* scratch);

  // dx = four sums in the order of Y, weighted so along Y; count numbers.
  void (*weigh)(const float* const* sums, void* dx, int64_t count);

  // sums (2 cells, C) = three rows weighted 1, 2, 1; of a row's cells, `stride` numbers apart, the two voxels at hand.
  void (*add_rows)(const void* const* rows, float* sums, int64_t cells, int64_t C, int64_t stride);

  // out (voxels, C) = three rows of sums weighted 1, 2, 1, weighted so along themselves, over 64. They have two voxels
  // more than out.
  void (*blur)(const float* const* sums, void* out, int64_t voxels, int64_t C);
};

// [0] float32, [1] bfloat16
extern const ResampleKernels resample_portable[2];
#ifdef T2CT_X86
extern const ResampleKernels resample_avx2[2];
extern const ResampleKernels resample_avx512[2];
#endif

// `gather` goes along a row in pieces of this many numbers, or of one voxel, so that what it keeps stays in the
// first-level cache. Static: every unit has its own copies, in its own instructions.
constexpr int64_t RESAMPLE_PIECE = 1024;
static inline int64_t resample_voxels(int64_t Z, int64_t C) {
  const int64_t voxels = RESAMPLE_PIECE / C;
  return voxels < 1 ? 1 : voxels < Z ? voxels : Z;
}
static inline int64_t resample_scratch(int64_t Z, int64_t C) { return 4 * ((resample_voxels(Z, C) + 1) * C + 16); }

// x is (n, X, Y, Z, C).
struct ResampleShape {
  int64_t n, X, Y, Z, C;
  bool bfloat16;
};

// y (n, stop - start, 2 Y, 2 Z, C): planes start to stop of the doubled x, computed in float32 and rounded once.
// fresh: nothing has touched y since the system gave it, so its pages come zeroed, by way of the cache.
void upsample(const ResampleShape& shape, int64_t start, int64_t stop, const void* x, void* y, bool fresh, int threads,
              int isa);

// dx in x's shape from dy (n, 2 X, 2 Y, 2 Z, C), gathered: no two threads write to one place.
void upsample_backward(const ResampleShape& shape, const void* dy, void* dx, int threads, int isa);

// Trilinear doubling is nearest doubling followed by the weights 1/4, 1/2, 1/4 along every axis, and these commute with
// a convolution: `smooth` is that last step. x: X * Y * Z cells of 2 x 2 x 2 voxels, (X, Y, Z, 2, 2, 2, C), C a multiple
// of 16; its first plane of cells at `before`, unless that is null. y: (2 X - 2, 2 Y - 2, 2 Z - 2, C), the voxels that have
// both neighbours along every axis. shape.n is 1.
void smooth(const ResampleShape& shape, const void* before, const void* x, void* y, int threads, int isa);

}  // namespace t2ct
