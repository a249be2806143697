// Multiplies and adds with one rounding where the instruction set can, for units compiled with -ffp-contract=off: what is
// fused must not be up to the compiler, or a part would lose the bits of the whole.
#pragma once

#include "vectors.h"

namespace t2ct {
namespace {

#if T2CT_WIDTH == 16
inline vf multiply_add(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
#elif T2CT_WIDTH == 8
inline vf multiply_add(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
#else
inline vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
#endif

// A number in every lane. Adding it to zeros would not do: -0 would become 0, so the addition would stay.
#if T2CT_WIDTH == 16
inline vf spread(float a) { return _mm512_set1_ps(a); }
#elif T2CT_WIDTH == 8
inline vf spread(float a) { return _mm256_set1_ps(a); }
#else
inline vf spread(float a) { return vf{a, a, a, a}; }
#endif
inline vf multiply_add(vf a, float b, vf c) { return multiply_add(a, spread(b), c); }

}  // namespace
}  // namespace t2ct
