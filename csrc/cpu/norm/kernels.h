// The serial kernels of norm.h, written once in the compiler's vector types and compiled once per instruction set: the
// including file sets T2CT_ISA (a name) and T2CT_WIDTH (floats in a register, a divisor of 16).
//
// Nothing of the standard library is used here: an inline function of it compiled for AVX-512 could be the copy that
// the linker keeps for everyone.
#include "norm.h"
#include "../rounding.h"
#include "../vectors.h"

namespace t2ct {
namespace {

typedef int32_t vi __attribute__((vector_size(4 * W)));

// Spelt out where the compiler needs more instructions.
#if T2CT_WIDTH == 16
inline vf clamp(vf t, float low, float high) {
  return _mm512_min_ps(_mm512_max_ps(t, _mm512_set1_ps(low)), _mm512_set1_ps(high));
}
#elif T2CT_WIDTH == 8
inline vf clamp(vf t, float low, float high) {
  return _mm256_min_ps(_mm256_max_ps(t, _mm256_set1_ps(low)), _mm256_set1_ps(high));
}
#else
inline vf clamp(vf t, float low, float high) {
  t = t > low ? t : vf{} + low;
  return t < high ? t : vf{} + high;
}
#endif

// exp(-z), |relative error| <= 1 ulp for -88 <= z <= 87, the nearer end of that range beyond it and for NaN.
// -z = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by a minimax polynomial whose own relative error is 4e-9.
inline vf exp_minus(vf z) {
  z = clamp(z, -88.0f, 87.0f);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  vf shifted = magic - z * 1.44269504f;
  vf n = shifted - magic;
  vf r = -z - n * 0.693359375f;  // ln 2 in two pieces, the first short enough for exact products
  r = r + n * 2.12194440e-4f;
  vf q = r * 0.00138145988f + 0.00836871658f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  q = (q * r) * r + r + 1.0f;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(q) + (reinterpret_cast<vi>(shifted) << 23));
}

// z / (1 + exp(-z)): within 4 ulp of float64 for |z| <= 87, below 1e-36 in magnitude under that, NaN for NaN.
inline vf silu_of(vf z) { return z / (1.0f + exp_minus(z)); }

// d silu / dz = s (1 + z (1 - s)), s = 1 / (1 + exp(-z))
inline vf silu_slope(vf z) {
  vf s = 1.0f / (1.0f + exp_minus(z));
  return s * (1.0f + z * (1.0f - s));
}

template <typename T>
void copy(const T* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Per-channel sums of a row's P numbers, in double: sum[c] = row[c] + row[c + C] + ...
void fold(const float* row, int64_t C, int64_t P, double* sum) {
  for (int64_t c = 0; c < C; ++c) sum[c] = row[c];
  for (int64_t j = C; j < P; j += C)
    for (int64_t c = 0; c < C; ++c) sum[c] += row[j + c];
}

// V vectors of every row: sum of d = x - guess and of d^2, kept in registers down the block.
template <int V, typename T>
void sums(const T* x, int64_t rows, int64_t P, const float* guess, float* s1, float* s2) {
  vf g[V], a[V], b[V];
  for (int v = 0; v < V; ++v) g[v] = load(guess + v * W), a[v] = load(s1 + v * W), b[v] = load(s2 + v * W);
  for (int64_t i = 0; i < rows; ++i, x += P)
    for (int v = 0; v < V; ++v) {
      vf d = load(x + v * W) - g[v];
      a[v] += d;
      b[v] = d * d + b[v];
    }
  for (int v = 0; v < V; ++v) store(s1 + v * W, a[v]), store(s2 + v * W, b[v]);
}

template <typename T>
void sums_of_rows(const T* x, int64_t rows, int64_t P, const float* guess, float* s1, float* s2) {
  int64_t j = 0;
  for (; j + 4 * W <= P; j += 4 * W) sums<4>(x + j, rows, P, guess + j, s1 + j, s2 + j);
  for (; j < P; j += W) sums<1>(x + j, rows, P, guess + j, s1 + j, s2 + j);
}

// One pass with sums taken about a guess of each channel's mean. The guess is the mean over every 8th row, so by
// Cauchy-Schwarz (guess - mean)^2 <= 9 variance whatever the data: subtracting count (guess - mean)^2 afterwards loses
// at most a factor 10 of float32's precision, in M2 alone, where E[x^2] - E[x]^2 could lose everything.
template <typename T>
void stats(const void* data, int64_t count, int64_t C, int64_t P, int64_t groups, float* scratch, double* channel,
           double* out) {
  const T* x = static_cast<const T*>(data);
  float *guess = scratch, *s1 = scratch + P, *s2 = scratch + 2 * P;
  float* about = scratch + 3 * P;
  T* tail = reinterpret_cast<T*>(scratch + 4 * P);
  const int64_t rows = count / P, rest = count % P, voxels = count / C;
  double *mean = channel, *m2 = channel + C;

  if (rows) {
    for (int64_t j = 0; j < P; j += W) {
      vf sum = {};
      for (int64_t i = 0; i < rows; i += 8) sum += load(x + i * P + j);
      store(guess + j, sum);
    }
    fold(guess, C, P, mean);
    const double share = 1.0 / static_cast<double>((rows + 7) / 8 * (P / C));
    for (int64_t c = 0; c < C; ++c) guess[c] = static_cast<float>(mean[c] * share);
  } else {  // fewer voxels than a row: the first one
    copy(x, tail, C);
    for (int64_t c = C; c < P; ++c) tail[c] = 0;
    for (int64_t j = 0; j < P; j += W) store(guess + j, load(tail + j));
  }
  for (int64_t j = C; j < P; ++j) guess[j] = guess[j - C];
  for (int64_t j = 0; j < P; ++j) s1[j] = s2[j] = 0.0f;

  sums_of_rows(x, rows, P, guess, s1, s2);
  if (rest) {
    for (int64_t j = rest; j < P; ++j) about[j] = 0.0f, tail[j] = 0;  // the padding: 0 about 0 adds nothing
    for (int64_t j = 0; j < rest; ++j) about[j] = guess[j];
    copy(x + rows * P, tail, rest);
    sums_of_rows(tail, 1, P, about, s1, s2);
  }

  const double share = 1.0 / static_cast<double>(voxels);
  fold(s1, C, P, mean);
  fold(s2, C, P, m2);
  for (int64_t c = 0; c < C; ++c) {
    double excess = mean[c] * mean[c] * share, sum = m2[c] - excess;
    mean[c] = guess[c] + mean[c] * share;
    m2[c] = sum < 0.0 ? 0.0 : sum;
  }
  const int64_t width = C / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double m = 0.0, within = 0.0, between = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) m += mean[c], within += m2[c];
    m /= static_cast<double>(width);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) between += (mean[c] - m) * (mean[c] - m);
    out[g] = m;
    out[groups + g] = within + static_cast<double>(voxels) * between;
  }
}

template <bool silu, typename T>
void apply_rows(const T* x, T* y, int64_t rows, int64_t P, const float* scale, const float* shift) {
  for (int64_t i = 0; i < rows; ++i, x += P, y += P)
    for (int64_t j = 0; j < P; j += W) {
      vf z = load(x + j) * load(scale + j) + load(shift + j);
      store(y + j, silu ? silu_of(z) : z);
    }
}

template <typename T>
void apply(const void* from, void* to, int64_t count, int64_t P, const float* scale, const float* shift, bool silu,
           float* scratch) {
  const T* x = static_cast<const T*>(from);
  T *y = static_cast<T*>(to), *tail = reinterpret_cast<T*>(scratch);
  const int64_t rows = count / P, rest = count % P;
  auto* run = silu ? apply_rows<true, T> : apply_rows<false, T>;
  run(x, y, rows, P, scale, shift);
  if (rest) {
    for (int64_t j = rest; j < P; ++j) tail[j] = 0;
    copy(x + rows * P, tail, rest);
    run(tail, tail, 1, P, scale, shift);
    copy(tail, y + rows * P, rest);
  }
}

template <bool silu, int V, typename T>
void reduce_rows(const T* dy, const T* x, int64_t rows, int64_t P, const float* scale, const float* shift,
                 const float* rstd, const float* offset, float* s1, float* s2) {
  vf a[V], b[V];
  for (int v = 0; v < V; ++v) a[v] = load(s1 + v * W), b[v] = load(s2 + v * W);
  for (int64_t i = 0; i < rows; ++i, x += P, dy += P)
    for (int v = 0; v < V; ++v) {
      vf value = load(x + v * W), dz = load(dy + v * W);
      if (silu) dz *= silu_slope(value * load(scale + v * W) + load(shift + v * W));
      a[v] += dz;
      b[v] = dz * (value * load(rstd + v * W) + load(offset + v * W)) + b[v];
    }
  for (int v = 0; v < V; ++v) store(s1 + v * W, a[v]), store(s2 + v * W, b[v]);
}

template <bool silu, typename T>
void reduce_block(const T* dy, const T* x, int64_t rows, int64_t P, const float* scale, const float* shift,
                  const float* rstd, const float* offset, float* s1, float* s2) {
  int64_t j = 0;
  for (; j + 2 * W <= P; j += 2 * W)
    reduce_rows<silu, 2>(dy + j, x + j, rows, P, scale + j, shift + j, rstd + j, offset + j, s1 + j, s2 + j);
  for (; j < P; j += W)
    reduce_rows<silu, 1>(dy + j, x + j, rows, P, scale + j, shift + j, rstd + j, offset + j, s1 + j, s2 + j);
}

template <typename T>
void reduce(const void* gradient, const void* data, int64_t count, int64_t C, int64_t P, const float* scale,
            const float* shift, const float* rstd, const float* offset, bool silu, float* scratch, double* out) {
  const T *dy = static_cast<const T*>(gradient), *x = static_cast<const T*>(data);
  float *s1 = scratch, *s2 = scratch + P;
  T *tail_dy = reinterpret_cast<T*>(scratch + 2 * P), *tail_x = reinterpret_cast<T*>(scratch + 3 * P);
  const int64_t rows = count / P, rest = count % P;
  auto* run = silu ? reduce_block<true, T> : reduce_block<false, T>;
  for (int64_t j = 0; j < P; ++j) s1[j] = s2[j] = 0.0f;
  run(dy, x, rows, P, scale, shift, rstd, offset, s1, s2);
  if (rest) {  // dy = 0 in the padding adds nothing
    for (int64_t j = rest; j < P; ++j) tail_dy[j] = tail_x[j] = 0;
    copy(dy + rows * P, tail_dy, rest);
    copy(x + rows * P, tail_x, rest);
    run(tail_dy, tail_x, 1, P, scale, shift, rstd, offset, s1, s2);
  }
  fold(s1, C, P, out);
  fold(s2, C, P, out + C);
}

template <bool silu, typename T>
void gradient_rows(const T* dy, const T* x, T* dx, int64_t rows, int64_t P, const float* scale, const float* shift,
                   const float* slope, const float* constant) {
  for (int64_t i = 0; i < rows; ++i, x += P, dy += P, dx += P)
    for (int64_t j = 0; j < P; j += W) {
      vf value = load(x + j), dz = load(dy + j), s = load(scale + j);
      if (silu) dz *= silu_slope(value * s + load(shift + j));
      store(dx + j, dz * s + (value * load(slope + j) + load(constant + j)));
    }
}

template <typename T>
void gradient(const void* upstream, const void* data, void* result, int64_t count, int64_t P, const float* scale,
              const float* shift, const float* slope, const float* constant, bool silu, float* scratch) {
  const T *dy = static_cast<const T*>(upstream), *x = static_cast<const T*>(data);
  T *dx = static_cast<T*>(result), *tail_dy = reinterpret_cast<T*>(scratch);
  T* tail_x = reinterpret_cast<T*>(scratch + P);
  const int64_t rows = count / P, rest = count % P;
  auto* run = silu ? gradient_rows<true, T> : gradient_rows<false, T>;
  run(dy, x, dx, rows, P, scale, shift, slope, constant);
  if (rest) {
    for (int64_t j = rest; j < P; ++j) tail_dy[j] = tail_x[j] = 0;
    copy(dy + rows * P, tail_dy, rest);
    copy(x + rows * P, tail_x, rest);
    run(tail_dy, tail_x, tail_x, 1, P, scale, shift, slope, constant);
    copy(tail_x, dx + rows * P, rest);
  }
}

template <typename T>
constexpr NormKernels table(const char* name) {
  return {name, stats<T>, apply<T>, reduce<T>, gradient<T>};
}

}  // namespace
}  // namespace t2ct
