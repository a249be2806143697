// 3x3x3 convolution, stride 1, of channels-last volumes with many voxels, in 12 multiplications a number instead of 27:
// along Y and Z Winograd's minimal filtering F(2, 3), along X the three taps as they are. With
//
//   B' = 1  0 -1  0     G =  1    0   0     A' = 1  1  1  0
//        0  1  1  0         1/2  1/2 1/2         0  1 -1 -1
//        0 -1  1  0         1/2 -1/2 1/2
//        0  1  0 -1          0    0   1
//
// two neighbours of the result are A' (G g * B' d) of a filter g and the four numbers d that they see. Squares of 2 x 2
// numbers see 4 x 4, which become 16 that are multiplied each with its own weights: 16 matrix products of
// (squares, 3 planes x channels) by (3 planes x channels, outputs), accumulated in registers. A plane of x is
// transformed once, and used by the three planes of y that see it. Sums are float32, bfloat16 is rounded once, at the
// end. S. Winograd 1980; A. Lavin, S. Gray, arXiv 1509.09308.
//
// Every number is made by one sequence of operations, however the volume is cut along X: a part has the bits of the
// whole. The planes are cut into blocks of squares, whose transformed numbers stay in the cache.
#pragma once

#include <cstdint>

namespace t2ct {

constexpr int64_t WINOGRAD_CHANNELS = 16;  // channels, in and out, are a multiple of this: the widest vector
constexpr int64_t SQUARES = 32;            // of a block, at most
constexpr int64_t ROWS_AT_ONCE = 8;        // squares that are multiplied at once: blocks are filled up to a multiple

// A block of planes of squares, by along Y and bz along Z, in memory for `rows` of them.
struct Block {
  int64_t by, bz, rows;
};

struct WinogradKernels {
  int64_t panel;  // outputs that are computed at once; the last panel of a matrix may have half of them

  // A row of `voxels` voxels of C channels -> float32, `before` voxels of zeros in front of it and `after` behind.
  void (*read)(const void* x, int64_t before, int64_t voxels, int64_t after, int64_t C, float* to);
  // padded (2 by + 2, 2 bz + 2, C) -> v (16, rows, C).
  void (*transform)(const float* padded, Block b, int64_t C, float* v);
  // m (16, rows, O) = sum over three planes of v times u (16, panels of O, 3, C, panel). A plane of zeros is null.
  void (*multiply)(const float* const* v, int64_t rows, int64_t C, const float* u, int64_t O, float* m);
  // The numbers of square `at` along Y: 2 x 2 bz of O, first those of the upper row, plus shift (O); to two rows of y,
  // each 0 or of `voxels` voxels, plus those of `residual`, 0 or two such rows.
  void (*finish)(const float* m, Block b, int64_t at, int64_t O, const float* shift, const void* const* residual,
                 int64_t voxels, void* const* y);
  // Outputs [first, first + panel or what is left of O) of w (O, 27, C) -> u.
  void (*weights)(const float* w, int64_t first, int64_t C, int64_t O, float* u);
};

// [0] float32, [1] bfloat16
extern const WinogradKernels winograd_portable[2];
#ifdef T2CT_X86
extern const WinogradKernels winograd_avx2[2];
extern const WinogradKernels winograd_avx512[2];
#endif

// x: (n, X, Y, Z, in), padded by one voxel of zeros along Y and Z, and along X where pad is 1.
struct WinogradShape {
  int64_t n, X, Y, Z, in, out, pad;
  bool bfloat16;
};

// w: (out, 27, in) float32. shift: (n, out) float32, added at every voxel. residual: like y, added, or null.
// y: (n, X + 2 pad - 2, Y, Z, out) in x's dtype. work: winograd_bytes of memory. isa: as for norm.h.
void conv3d_winograd(const WinogradShape& shape, const void* x, const float* w, const float* shift,
                     const void* residual, void* y, float* work, int threads, int isa);

int64_t winograd_bytes(const WinogradShape& shape, int threads);

}  // namespace t2ct
