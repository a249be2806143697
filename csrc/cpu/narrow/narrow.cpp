// Spreads the rows of narrow.h over threads.
#include "narrow.h"

#include <algorithm>
#include <string>
#include <vector>

#include "../bfloat16.h"
#include "../norm/norm.h"  // the list of instruction sets

namespace t2ct {
namespace {

const NarrowKernels& find_kernels(const NarrowShape& s, int isa) {
#ifdef T2CT_X86
  const std::string name = isa_name(isa);
  if (name == "avx512") return narrow_avx512[s.bfloat16];
  if (name == "avx2") return narrow_avx2[s.bfloat16];
#endif
  return narrow_portable[s.bfloat16];
}

}  // namespace

void conv3d_narrow(const NarrowShape& s, const void* x, const float* w, const float* bias, void* y, int threads,
                   int isa) {
  const NarrowKernels& kernels = find_kernels(s, isa);
  const int64_t size = s.bfloat16 ? 2 : 4, line = s.Z * s.C * size;
  const int64_t X = s.X + 2 * s.pad_x - 2, Y = s.Y + 2 * s.pad_y - 2, Z = s.Z + 2 * s.pad_z - 2;
  const int64_t units = s.n * X * Y, work = units * Z * s.C * s.out;
  threads = static_cast<int>(std::clamp<int64_t>(std::min(units, work / 8192), 1, std::max(threads, 1)));

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> made(Z);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t n = unit / (X * Y), i = unit / Y % X - s.pad_x, j = unit % Y - s.pad_y;
      const void* rows[9];
      for (int64_t t = 0; t < 9; ++t) {
        const int64_t a = i + t / 3, b = j + t % 3;
        const bool inside = a >= 0 && a < s.X && b >= 0 && b < s.Y;
        rows[t] = inside ? static_cast<const char*>(x) + ((n * s.X + a) * s.Y + b) * line : nullptr;
      }
      for (int64_t o = 0; o < s.out; ++o) {
        kernels.row(rows, s.Z, s.C, -s.pad_z, w + o * 27 * s.C, bias ? bias[o] : 0.0f, Z, made.data());
        const int64_t to = unit * Z * s.out + o;
        for (int64_t z = 0; z < Z; ++z) {
          if (s.bfloat16)
            static_cast<uint16_t*>(y)[to + z * s.out] = round_bfloat16(made[z]);
          else
            static_cast<float*>(y)[to + z * s.out] = made[z];
        }
      }
    }
  }
}

}  // namespace t2ct
