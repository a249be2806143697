// The serial kernels of resample.h, written once in the compiler's vector types and compiled once per instruction set:
// the including file sets T2CT_WIDTH (floats in a register). No standard library here: see norm/kernels.h.
//
// setup.py compiles these units with -ffp-contract=off: which products a compiler fuses may differ from copy to copy of
// a loop, and the bits with it. multiply_add says what is fused.
#include "../fused.h"
#include "../vectors.h"
#include "resample.h"

namespace t2ct {
namespace {

inline void store(float* p, vf a, vf b) { store(p, a), store(p + W, b); }

// bfloat16 is the upper half of a float32, rounded to nearest even. A NaN needs no care here: what is rounded was made
// of bfloat16 numbers, so a NaN's lower half is 0 and cannot carry into its upper one.
#if T2CT_WIDTH == 16
inline __m512i rounded(vf v) {
  const __m512i u = (__m512i)v, up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
}
inline void store(uint16_t* p, vf v) {
  _mm256_storeu_si256((__m256i_u*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(v), 16)));
}
inline __m512i both(vf a, vf b) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(rounded(a), odd, rounded(b));
}
inline void store(uint16_t* p, vf a, vf b) { _mm512_storeu_si512(p, both(a, b)); }
inline void stream(uint16_t* p, vf a, vf b) { _mm512_stream_si512((__m512i*)p, both(a, b)); }
inline void stream(float* p, vf a, vf b) { _mm512_stream_ps(p, a), _mm512_stream_ps(p + W, b); }
inline void fence() { _mm_sfence(); }
#elif T2CT_WIDTH == 8
inline __m256i upper(vf v) {
  vu u = (vu)v;
  return (__m256i)((u + ((u >> 16 & 1u) + 0x7fffu)) >> 16);
}
inline __m256i both(vf a, vf b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(upper(a), upper(b)), 0xd8); }
inline void store(uint16_t* p, vf v) { _mm_storeu_si128((__m128i_u*)p, _mm256_castsi256_si128(both(v, v))); }
inline void store(uint16_t* p, vf a, vf b) { _mm256_storeu_si256((__m256i_u*)p, both(a, b)); }
inline void stream(uint16_t* p, vf a, vf b) { _mm256_stream_si256((__m256i*)p, both(a, b)); }
inline void stream(float* p, vf a, vf b) { _mm256_stream_ps(p, a), _mm256_stream_ps(p + W, b); }
inline void fence() { _mm_sfence(); }
#else
inline void store(uint16_t* p, vf v) {
  vu u = reinterpret_cast<vu>(v);
  *reinterpret_cast<vh*>(p) = __builtin_convertvector((u + ((u >> 16 & 1u) + 0x7fffu)) >> 16, vh);
}
inline void store(uint16_t* p, vf a, vf b) { store(p, a), store(p + W, b); }
template <typename T>
void stream(T* p, vf a, vf b) { store(p, a, b); }
inline void fence() {}
#endif

// The first n < W numbers of a vector.
template <typename T>
vf load(const T* p, int64_t n) {
  T all[W] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
}
template <typename T>
void store(T* p, vf v, int64_t n) {
  T all[W];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
}

// Of quarters a and b: what lies three quarters of the way to a.
inline vf towards(vf a, vf b) { return multiply_add(a, 3.0f, b); }

// From voxels of the four rows to quarters of what lies between them along X and Y.
inline void mix(const vf* x, vf* made) {
  vf a[4], b[4];  // a[2 * which along X + which along Y]
  for (int i = 0; i < 4; ++i) a[i] = 0.25f * x[i];
  for (int i = 0; i < 4; ++i) b[i] = 0.25f * towards(a[i], a[i ^ 2]);
  for (int i = 0; i < 4; ++i) made[i] = 0.25f * towards(b[i], b[i ^ 1]);
}

template <int vectors, bool past, typename T>
void put(T* p, const vf* v) {
  if constexpr (vectors == 1)
    store(p, v[0]);
  else if constexpr (past)
    stream(p, v[0], v[1]);
  else
    store(p, v[0], v[1]);
}

// Some numbers of one cell along Z: the four rows, at x + from, of voxel k -> doubled voxels 2k - 1 (out + to - C) and
// 2k of the rows that are wanted. q: the quarters of voxel k - 1, which those of voxel k replace. The first cell has 2k
// alone, which is its voxel itself.
template <int vectors, bool first, bool past, typename T>
__attribute__((always_inline)) inline void cell(const T* const* x, int64_t from, T* const* out, int64_t to, float* q,
                                                int64_t stride, int64_t C) {
  vf v[4], made[vectors][4], low[vectors], high[vectors];
  for (int k = 0; k < vectors; ++k) {
    for (int i = 0; i < 4; ++i) v[i] = load(x[i] + from + k * W);
    mix(v, made[k]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < vectors; ++k) {
      float* kept = q + i * stride + k * W;
      const vf before = first ? made[k][i] : load(kept);
      low[k] = towards(before, made[k][i]), high[k] = towards(made[k][i], before);
      store(kept, made[k][i]);
    }
    if (!out[i]) continue;
    if (!first) put<vectors, past>(out[i] + to - C, low);
    put<vectors, past>(out[i] + to, high);
  }
}

// The same for n < W numbers, by way of whole vectors; q has numbers to spare.
template <bool first, typename T>
__attribute__((noinline)) void part_of_cell(const T* const* x, int64_t from, T* const* out, int64_t to, float* q,
                                            int64_t stride, int64_t C, int64_t n) {
  T in[4][W] = {}, made[4][2 * W];
  const T* whole[4];
  T* result[4];
  for (int i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < n; ++j) in[i][j] = x[i][from + j];
    whole[i] = in[i], result[i] = made[i];
  }
  cell<1, first, false>(whole, 0, result, W, q, stride, W);
  for (int i = 0; i < 4; ++i)
    for (int64_t j = 0; j < n && out[i]; ++j) {
      if (!first) out[i][to - C + j] = made[i][j];
      out[i][to + j] = made[i][W + j];
    }
}

template <bool first, bool past, typename T>
__attribute__((always_inline)) inline void voxel(const T* const* x, T* const* out, int64_t k, float* q, int64_t stride,
                                                 int64_t C) {
  const int64_t from = k * C, to = 2 * from;
  int64_t c = 0;
  for (; c + 2 * W <= C; c += 2 * W) cell<2, first, past>(x, from + c, out, to + c, q + c, stride, C);
  for (; c + W <= C; c += W) cell<1, first, past>(x, from + c, out, to + c, q + c, stride, C);
  if (c < C) part_of_cell<first>(x, from + c, out, to + c, q + c, stride, C, C - c);
}

inline void copy(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <bool past, typename T>
void cells(const void* const* rows, void* const* out, int64_t Z, int64_t C, float* q) {
  const int64_t stride = C + 16;
  const T* x[4];
  T* y[4];
  for (int i = 0; i < 4; ++i) x[i] = static_cast<const T*>(rows[i]), y[i] = static_cast<T*>(out[i]);
  voxel<true, past>(x, y, 0, q, stride, C);
  for (int64_t k = 1; k < Z; ++k) voxel<false, past>(x, y, k, q, stride, C);
  for (int i = 0; i < 4; ++i)  // the edge voxel itself
    for (int64_t c = 0; c < C && y[i]; c += W) {
      const vf v = load(q + i * stride + c), last = towards(v, v);
      T* p = y[i] + (2 * Z - 1) * C + c;
      c + W <= C ? store(p, last) : store(p, last, C - c);
    }
  if (past) fence();
}

template <typename T>
void between(const void* const* rows, void* const* out, int64_t Z, int64_t C, bool past, float* scratch) {
  (past ? cells<true, T> : cells<false, T>)(rows, out, Z, C, scratch);
}

inline vf weighted(vf a, vf b, vf c, vf d) { return multiply_add(b + c, 0.75f, 0.25f * (a + d)); }

template <typename T>
void gather(const void* const* rows, float* sums, int64_t Z, int64_t C, float* scratch) {
  const T* p[4];
  for (int i = 0; i < 4; ++i) p[i] = static_cast<const T*>(rows[i]);
  const int64_t piece = resample_voxels(Z, C);
  for (int64_t first = 0; first < Z; first += piece) {
    const int64_t last = first + piece < Z ? first + piece : Z;
    // scratch: doubled voxels 2 first - 1 to 2 last, those beyond the border the edge again
    const int64_t low = first ? 2 * first - 1 : 0, high = last < Z ? 2 * last + 1 : 2 * Z;
    float* t = scratch + (low - (2 * first - 1)) * C;
    int64_t j = low * C;
    const int64_t end = high * C;
    for (; j + W <= end; j += W)
      store(t + j - low * C, weighted(load(p[0] + j), load(p[1] + j), load(p[2] + j), load(p[3] + j)));
    if (const int64_t n = end - j)
      store(t + j - low * C, weighted(load(p[0] + j, n), load(p[1] + j, n), load(p[2] + j, n), load(p[3] + j, n)), n);
    if (!first) copy(scratch + C, scratch, C);
    if (last == Z) copy(scratch + 2 * (Z - first) * C, scratch + (2 * (Z - first) + 1) * C, C);
    for (int64_t k = first; k < last; ++k) {
      const float* q = scratch + 2 * (k - first) * C;
      float* s = sums + k * C;
      int64_t c = 0;
      for (; c + W <= C; c += W)
        store(s + c, weighted(load(q + c), load(q + C + c), load(q + 2 * C + c), load(q + 3 * C + c)));
      if (const int64_t n = C - c)  // scratch has W numbers to spare
        store(s + c, weighted(load(q + c), load(q + C + c), load(q + 2 * C + c), load(q + 3 * C + c)), n);
    }
  }
}

template <typename T>
void weigh(const float* const* sums, void* result, int64_t count) {
  T* dx = static_cast<T*>(result);
  const float *a = sums[0], *b = sums[1], *c = sums[2], *d = sums[3];
  int64_t j = 0;
  for (; j + W <= count; j += W) store(dx + j, weighted(load(a + j), load(b + j), load(c + j), load(d + j)));
  if (const int64_t n = count - j)
    store(dx + j, weighted(load(a + j, n), load(b + j, n), load(c + j, n), load(d + j, n)), n);
}

}  // namespace
}  // namespace t2ct

#include "smooth_kernels.h"

namespace t2ct {
namespace {

template <typename T>
constexpr ResampleKernels table() {
  return {between<T>, gather<T>, weigh<T>, add_rows<T>, blur<T>};
}

}  // namespace
}  // namespace t2ct
