// Group normalisation of channels-last memory on the CPU: what the dispatcher (norm.cpp) and the serial kernels of one
// instruction set (kernels.h) say to each other.
//
// A tensor is n samples of `voxels` voxels of C numbers, float32 or bfloat16. Work is cut into blocks of voxels whose
// size depends on C alone, never on the number of threads, so that every sum is taken in one order and a result has the
// same bits on 1 thread and on 64.
//
// A block is read in rows of P = lcm(C, 16) numbers: whole vectors for every C, and number j of a row always belongs to
// channel j % C, so per-channel constants are laid out once as patterns of P numbers.
#pragma once

#include <cstdint>

namespace t2ct {

struct NormKernels {
  const char* name;

  // One block of `count` = voxels * C numbers -> out[0..groups) mean, out[groups..2 groups) M2 = sum((x - mean)^2).
  // scratch: 5 P floats and 2 C doubles.
  void (*stats)(const void* x, int64_t count, int64_t C, int64_t P, int64_t groups, float* scratch, double* channel,
                double* out);

  // y = x * scale + shift, then silu where asked; y may be x. scale, shift: patterns. scratch: 3 P numbers.
  void (*apply)(const void* x, void* y, int64_t count, int64_t P, const float* scale, const float* shift, bool silu,
                float* scratch);

  // With z = x * scale + shift, dz = dy * act'(z) and xhat = x * rstd + offset: out[0..C) = sum dz, out[C..2C) =
  // sum dz * xhat over the block. scratch: 4 P floats.
  void (*reduce)(const void* dy, const void* x, int64_t count, int64_t C, int64_t P, const float* scale,
                 const float* shift, const float* rstd, const float* offset, bool silu, float* scratch, double* out);

  // dx = dz * scale + x * slope + constant. scratch: 3 P numbers.
  void (*gradient)(const void* dy, const void* x, void* dx, int64_t count, int64_t P, const float* scale,
                   const float* shift, const float* slope, const float* constant, bool silu, float* scratch);
};

// [0] float32, [1] bfloat16
extern const NormKernels norm_portable[2];
#ifdef T2CT_X86
extern const NormKernels norm_avx2[2];
extern const NormKernels norm_avx512[2];
#endif

// The instruction sets that were compiled and that this machine has, best first.
int isa_count();
const char* isa_name(int isa);

struct NormShape {
  int64_t n, voxels, channels, groups;
  bool bfloat16;
};

// mean, m2: (n, groups), sums over voxels * channels / groups numbers each.
void group_stats(const NormShape& shape, const void* x, double* mean, double* m2, int threads, int isa);

// y = [silu]((x - mean) * rstd * weight + bias); mean, rstd: (n, groups); weight, bias: (channels,); y may be x.
void group_apply(const NormShape& shape, const void* x, void* y, const float* mean, const float* rstd,
                 const float* weight, const float* bias, bool silu, int threads, int isa);

// Both in one: y, and the float32 mean and rstd = 1 / sqrt(variance + eps) that it used.
void group_norm(const NormShape& shape, const void* x, void* y, const float* weight, const float* bias, double eps,
                bool silu, float* mean, float* rstd, int threads, int isa);

// The gradients of group_norm; dweight, dbias: (channels,).
void group_norm_backward(const NormShape& shape, const void* dy, const void* x, void* dx, const float* mean,
                         const float* rstd, const float* weight, const float* bias, bool silu, float* dweight,
                         float* dbias, int threads, int isa);

}  // namespace t2ct
