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

// bfloat16 is the upper half of a float32. widen is spelt out where the compiler needs more instructions.
#if T2CT_WIDTH == 16
inline vu widen(const uint16_t* p) { return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u*)p)); }
#elif T2CT_WIDTH == 8
inline vu widen(const uint16_t* p) { return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u*)p)); }
#else
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));
inline vu widen(const uint16_t* p) { return __builtin_convertvector(*reinterpret_cast<const vh*>(p), vu); }
#endif
inline vf load(const uint16_t* p) { return reinterpret_cast<vf>(widen(p) << 16); }

}  // namespace
}  // namespace t2ct
