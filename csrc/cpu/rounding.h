// Stores a vector of floats as bfloat16, for kernels that are written in vectors.h.
#pragma once

#include "vectors.h"

namespace t2ct {
namespace {

#if T2CT_WIDTH == 16
inline void narrow(uint16_t* p, vu u) { _mm256_storeu_si256((__m256i_u*)p, _mm512_cvtepi32_epi16((__m512i)u)); }
#elif T2CT_WIDTH == 8
inline void narrow(uint16_t* p, vu u) {
  __m128i low = _mm256_castsi256_si128((__m256i)u), high = _mm256_extracti128_si256((__m256i)u, 1);
  _mm_storeu_si128((__m128i_u*)p, _mm_packus_epi32(low, high));
}
#else
inline void narrow(uint16_t* p, vu u) { *reinterpret_cast<vh*>(p) = __builtin_convertvector(u, vh); }
#endif

inline void store(uint16_t* p, vf v) {  // round to nearest even; a NaN stays one
  vu u = reinterpret_cast<vu>(v);
  u += 0x7fffu + ((u >> 16) & 1u);
  narrow(p, (v == v ? u : vu{} + 0x7fc00000u) >> 16);
}

}  // namespace
}  // namespace t2ct
