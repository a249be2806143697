// The vector of floats that the serial kernels are written in; the including file sets T2CT_WIDTH, floats in a register.
// Inside an unnamed namespace, as the kernels: every instruction set has its own copy.
#pragma once

#include <cstdint>

#if T2CT_WIDTH > 4
#include <immintrin.h>
#endif

namespace t2ct {
namespace {

constexpr int W = T2CT_WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
// Loads and stores go through this: any alignment, any type below (a memcpy into a vector spills, 20 times slower).
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }

}  // namespace
}  // namespace t2ct
