// Cuts the planes of winograd.h into blocks, spreads these over threads and keeps three transformed planes of each.
#include "winograd.h"

#include <algorithm>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../norm/norm.h"  // the list of instruction sets

namespace t2ct {
namespace {

const WinogradKernels& find_kernels(const WinogradShape& s, int isa) {
#ifdef T2CT_X86
  const std::string name = isa_name(isa);
  if (name == "avx512") return winograd_avx512[s.bfloat16];
  if (name == "avx2") return winograd_avx2[s.bfloat16];
#endif
  return winograd_portable[s.bfloat16];
}

constexpr int64_t WIDE = 16;            // squares of a block along Z, at most
constexpr int64_t WORTH = 4;            // planes that a thread is given at least: two more are transformed for them
constexpr int64_t UNITS_A_THREAD = 4;   // parts of the work, so that threads end together

int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Plan {
  int64_t squares_y, squares_z, by, bz, rows, planes, parts_y, parts_z, parts_x, length;

  Plan(const WinogradShape& s, int threads) {
    squares_y = up(s.Y, 2), squares_z = up(s.Z, 2), planes = s.X + 2 * s.pad - 2;
    parts_z = up(squares_z, WIDE), bz = up(squares_z, parts_z);
    parts_y = up(squares_y, SQUARES / bz), by = up(squares_y, parts_y);
    rows = up(by * bz, ROWS_AT_ONCE) * ROWS_AT_ONCE;
    const int64_t blocks = s.n * parts_y * parts_z;
    parts_x = std::clamp<int64_t>(up(UNITS_A_THREAD * threads, blocks), 1, std::max<int64_t>(planes / WORTH, 1));
    length = up(planes, parts_x), parts_x = up(planes, length);
  }
  int64_t units(const WinogradShape& s) const { return s.n * parts_y * parts_z * parts_x; }
  int64_t padded(const WinogradShape& s) const { return (2 * by + 2) * (2 * bz + 2) * s.in; }
  int64_t plane(const WinogradShape& s) const { return 16 * rows * s.in; }
  int64_t scratch(const WinogradShape& s) const { return padded(s) + 3 * plane(s) + 16 * rows * s.out; }
};

int64_t weight_numbers(const WinogradShape& s) { return 16 * 3 * s.in * s.out; }

// One block of planes of y from `start` to `stop`; scratch as Plan says.
struct Unit {
  const WinogradShape& s;
  const Plan& plan;
  const WinogradKernels& kernels;
  const char* x;
  float* scratch;
  int64_t n, y0, z0;  // y0, z0 in squares
  Block block;
  int64_t held[3];  // which plane of x each slot has

  float* slot(int64_t i) { return scratch + plan.padded(s) + i * plan.plane(s); }
  float* product() { return slot(3); }

  const float* transformed(int64_t plane) {
    if (plane < 0 || plane >= s.X) return nullptr;
    const int64_t i = plane % 3;
    if (held[i] != plane) {
      const int64_t size = s.bfloat16 ? 2 : 4, width = 2 * block.bz + 2, first = 2 * z0 - 1;
      const int64_t before = first < 0, after = std::max<int64_t>(first + width - s.Z, 0);
      for (int64_t j = 0; j < 2 * block.by + 2; ++j) {
        const int64_t row = 2 * y0 - 1 + j;
        float* to = scratch + j * width * s.in;
        if (row < 0 || row >= s.Y)
          kernels.read(x, width, 0, 0, s.in, to);
        else
          kernels.read(x + (((n * s.X + plane) * s.Y + row) * s.Z + first + before) * s.in * size, before,
                       width - before - after, after, s.in, to);
      }
      kernels.transform(scratch, block, s.in, slot(i));
      held[i] = plane;
    }
    return slot(i);
  }

  void run(int64_t start, int64_t stop, const float* u, const float* shift, const char* residual, char* y) {
    const int64_t line = s.Z * s.out * (s.bfloat16 ? 2 : 4), voxels = std::min(2 * block.bz, s.Z - 2 * z0);
    for (int64_t a = start; a < stop; ++a) {
      const float* v[3];
      for (int64_t p = 0; p < 3; ++p) v[p] = transformed(a - s.pad + p);
      kernels.multiply(v, block.rows, s.in, u, s.out, product());
      for (int64_t i = 0; i < block.by; ++i) {
        const int64_t row = 2 * (y0 + i);
        const int64_t to = ((n * plan.planes + a) * s.Y + row) * line + 2 * z0 * (line / s.Z);
        const bool second = row + 1 < s.Y;
        void* const rows[2] = {y + to, second ? y + to + line : nullptr};
        const char* const lower = residual ? residual + to : nullptr;
        const void* const added[2] = {lower, residual && second ? lower + line : nullptr};
        kernels.finish(product(), block, i, s.out, shift + n * s.out, residual ? added : nullptr, voxels, rows);
      }
    }
  }
};

}  // namespace

int64_t winograd_bytes(const WinogradShape& s, int threads) {
  const Plan plan(s, std::max(threads, 1));
  const int64_t used = std::min<int64_t>(plan.units(s), std::max(threads, 1));
  return (weight_numbers(s) + used * plan.scratch(s)) * sizeof(float);
}

void conv3d_winograd(const WinogradShape& s, const void* x, const float* w, const float* shift, const void* residual,
                     void* y, float* work, int threads, int isa) {
  const WinogradKernels& kernels = find_kernels(s, isa);
  threads = std::max(threads, 1);
  const Plan plan(s, threads);
  const int64_t units = plan.units(s), used = std::min<int64_t>(units, threads);
  const int64_t panels = up(s.out, kernels.panel);
  float *const u = work, *const scratch = work + weight_numbers(s);

#pragma omp parallel num_threads(static_cast<int>(used)) if (used > 1)
  {
    float* own = scratch;
#ifdef _OPENMP
    own += omp_get_thread_num() * plan.scratch(s);
#endif
    std::fill_n(own, plan.scratch(s), 0.0f);  // squares that fill a block up are multiplied too
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) kernels.weights(w, p * kernels.panel, s.in, s.out, u);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t part = unit % plan.parts_x, block = unit / plan.parts_x;
      const int64_t z0 = block % plan.parts_z * plan.bz, y0 = block / plan.parts_z % plan.parts_y * plan.by;
      Block b{std::min(plan.by, plan.squares_y - y0), std::min(plan.bz, plan.squares_z - z0), 0};
      b.rows = up(b.by * b.bz, ROWS_AT_ONCE) * ROWS_AT_ONCE;
      Unit{s, plan, kernels, static_cast<const char*>(x), own, block / (plan.parts_z * plan.parts_y), y0, z0, b,
           {-1, -1, -1}}.run(
          part * plan.length, std::min((part + 1) * plan.length, plan.planes), u, shift,
          static_cast<const char*>(residual), static_cast<char*>(y));
    }
  }
}

}  // namespace t2ct
