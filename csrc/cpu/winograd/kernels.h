// The serial kernels of winograd.h, written once in the compiler's vector types and compiled once per instruction set:
// the including file sets T2CT_WIDTH (floats in a register). No standard library here: see norm/kernels.h. setup.py
// compiles these units with -ffp-contract=off: multiply_add says what is fused.
#include "../fused.h"
#include "../rounding.h"
#include "../vectors.h"
#include "winograd.h"

namespace t2ct {
namespace {

constexpr int R = W == 16 ? ROWS_AT_ONCE : ROWS_AT_ONCE / 2;  // R * V sums in 32 registers, or in 16
constexpr int V = 2;

inline void transformed(vf a, vf b, vf c, vf d, vf* to, int step) {  // B'
  to[0] = a - c;
  to[step] = b + c;
  to[2 * step] = c - b;
  to[3 * step] = b - d;
}

template <typename T>
void read(const void* x, int64_t before, int64_t voxels, int64_t after, int64_t C, float* to) {
  const T* from = static_cast<const T*>(x);
  for (int64_t i = 0; i < before * C; i += W) store(to + i, vf{});
  to += before * C;
  for (int64_t i = 0; i < voxels * C; i += W) store(to + i, load(from + i));
  to += voxels * C;
  for (int64_t i = 0; i < after * C; i += W) store(to + i, vf{});
}

void transform(const float* padded, Block b, int64_t C, float* v) {
  const int64_t line = (2 * b.bz + 2) * C, number = b.rows * C;
  for (int64_t i = 0; i < b.by; ++i)
    for (int64_t j = 0; j < b.bz; ++j, v += C) {
      const float* from = padded + 2 * i * line + 2 * j * C;
      for (int64_t c = 0; c < C; c += W) {
        vf rows[4][4], columns[4];
        for (int z = 0; z < 4; ++z) {
          const float* at = from + z * C + c;
          transformed(load(at), load(at + line), load(at + 2 * line), load(at + 3 * line), &rows[0][z], 4);
        }
        for (int y = 0; y < 4; ++y) {
          transformed(rows[y][0], rows[y][1], rows[y][2], rows[y][3], columns, 1);
          for (int z = 0; z < 4; ++z) store(v + (4 * y + z) * number + c, columns[z]);
        }
      }
    }
}

constexpr int64_t CHAIN = 64;  // channels whose products are one chain of additions: sums of sums round less

// R rows by N vectors of outputs: the sum over three planes and their channels.
template <int N>
__attribute__((always_inline)) inline void product(const float* const* v, int64_t C, const float* u, int64_t O,
                                                   float* m) {
  bool first = true;
  for (int p = 0; p < 3; ++p) {
    const float* row = v[p];
    if (!row) {
      u += C * N * W;
      continue;
    }
    for (int64_t done = 0; done < C; done += CHAIN) {
      const int64_t chain = C - done < CHAIN ? C - done : CHAIN;
      vf s[R][N];
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) s[r][n] = vf{};
      for (int64_t c = 0; c < chain; ++c, ++row, u += N * W) {
        vf w[N];
        for (int n = 0; n < N; ++n) w[n] = load(u + n * W);
        for (int r = 0; r < R; ++r)
          for (int n = 0; n < N; ++n) s[r][n] = multiply_add(w[n], row[r * C], s[r][n]);
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          float* to = m + r * O + n * W;
          store(to, first ? s[r][n] : load(to) + s[r][n]);
        }
      first = false;
    }
  }
}

void multiply(const float* const* v, int64_t rows, int64_t C, const float* u, int64_t O, float* m) {
  for (int64_t f = 0; f < 16; ++f)
    for (int64_t o = 0; o < O; o += V * W) {
      const bool whole = o + V * W <= O;
      for (int64_t r = 0; r < rows; r += R) {
        const float* planes[3];
        for (int p = 0; p < 3; ++p) planes[p] = v[p] ? v[p] + (f * rows + r) * C : nullptr;
        float* to = m + (f * rows + r) * O + o;
        if (whole)
          product<V>(planes, C, u, O, to);
        else
          product<1>(planes, C, u, O, to);
      }
      u += 3 * C * (whole ? V * W : W);
    }
}

template <typename T>
void finish(const float* m, Block b, int64_t at, int64_t O, const float* shift, const void* const* residual,
            int64_t voxels, void* const* y) {
  for (int64_t j = 0; j < b.bz; ++j) {
    const float* from = m + (at * b.bz + j) * O;
    for (int64_t o = 0; o < O; o += W) {
      vf rows[2][4];
      for (int z = 0; z < 4; ++z) {
        vf d[4];
        for (int r = 0; r < 4; ++r) d[r] = load(from + (4 * r + z) * b.rows * O + o);
        rows[0][z] = d[0] + d[1] + d[2];
        rows[1][z] = d[1] - d[2] - d[3];
      }
      const vf added = load(shift + o);
      for (int r = 0; r < 2; ++r) {
        if (!y[r]) continue;
        const vf* d = rows[r];
        const vf made[2] = {d[0] + d[1] + d[2] + added, d[1] - d[2] - d[3] + added};
        for (int64_t k = 0; k < 2 && 2 * j + k < voxels; ++k) {
          const int64_t to = (2 * j + k) * O + o;
          vf sum = made[k];
          if (residual) sum += load(static_cast<const T*>(residual[r]) + to);
          store(static_cast<T*>(y[r]) + to, sum);
        }
      }
    }
  }
}

inline void filtered(vf a, vf b, vf c, vf* to) {  // G
  to[0] = a;
  to[1] = ((a + c) + b) * 0.5f;
  to[2] = ((a + c) - b) * 0.5f;
  to[3] = c;
}

void weights(const float* w, int64_t first, int64_t C, int64_t O, float* u) {
  const int64_t width = O - first < V * W ? O - first : V * W;
  const int64_t number = 3 * C * O;  // between the 16 numbers of a filter; every panel before this one is whole
  float some[16][W][V * W];          // of W channels, so that what is turned round stays in the nearest cache
  for (int64_t p = 0; p < 3; ++p)
    for (int64_t c = 0; c < C; c += W) {
      for (int64_t o = 0; o < width; ++o) {
        const float* from = w + ((first + o) * 27 + 9 * p) * C + c;
        vf columns[3][4], made[4];
        for (int z = 0; z < 3; ++z) {
          const float* at = from + z * C;
          filtered(load(at), load(at + 3 * C), load(at + 6 * C), columns[z]);
        }
        for (int y = 0; y < 4; ++y) {
          filtered(columns[0][y], columns[1][y], columns[2][y], made);
          for (int z = 0; z < 4; ++z)
            for (int i = 0; i < W; ++i) some[4 * y + z][i][o] = made[z][i];
        }
      }
      for (int f = 0; f < 16; ++f)
        for (int i = 0; i < W; ++i)
          for (int64_t o = 0; o < width; o += W)
            store(u + f * number + first * 3 * C + (p * C + c + i) * width + o, load(&some[f][i][o]));
    }
}

template <typename T>
constexpr WinogradKernels table() {
  return {V * W, read<T>, transform, multiply, finish<T>, weights};
}

}  // namespace
}  // namespace t2ct
