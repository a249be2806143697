// Spreads the rows of resample.h over threads.
#include "resample.h"

#include <algorithm>
#include <string>
#include <vector>

#include "../norm/norm.h"  // the list of instruction sets

namespace t2ct {
namespace {

// A result that a cache cannot hold is written past it: a store into the cache would first read what it overwrites.
constexpr int64_t STREAM_BYTES = 16 << 20;
constexpr int64_t LINE = 64;
constexpr int64_t ROWS = 8;  // of dx, a gradient's unit of work: two rows of sums are shared with the next unit
constexpr int64_t SMOOTH_ROWS = 32;  // of y, the same for smoothing

const ResampleKernels& find_kernels(const ResampleShape& s, int isa) {
#ifdef T2CT_X86
  const std::string name = isa_name(isa);
  if (name == "avx512") return resample_avx512[s.bfloat16];
  if (name == "avx2") return resample_avx2[s.bfloat16];
#endif
  return resample_portable[s.bfloat16];
}

int64_t clamp(int64_t i, int64_t size) { return std::min(std::max<int64_t>(i, 0), size - 1); }

int worthwhile(int threads, int64_t units, int64_t numbers) {
  return static_cast<int>(std::clamp<int64_t>(std::min(units, numbers / 32768), 1, std::max(threads, 1)));
}

}  // namespace

void upsample(const ResampleShape& s, int64_t start, int64_t stop, const void* x, void* y, bool fresh, int threads,
              int isa) {
  const ResampleKernels& kernels = find_kernels(s, isa);
  const int64_t voxel = s.C * (s.bfloat16 ? 2 : 4), row = s.Z * voxel, planes = stop - start;
  const int64_t first = (start + 1) / 2, cells = stop / 2 - first + 1;  // along X
  const int64_t units = s.n * cells * (s.Y + 1), bytes = s.n * planes * 2 * s.Y * 2 * row;
  const bool lines = voxel % LINE == 0 && reinterpret_cast<uintptr_t>(y) % LINE == 0;
  const bool stream = !fresh && bytes >= STREAM_BYTES && lines;
  threads = worthwhile(threads, units, s.n * planes * 4 * s.Y * s.Z * s.C);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> scratch(resample_scratch(s.Z, s.C));
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t n = unit / (cells * (s.Y + 1)), i = first + unit / (s.Y + 1) % cells, j = unit % (s.Y + 1);
      const void* rows[4];
      void* out[4];
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t a = k / 2 - 1, b = k % 2 - 1, plane = 2 * i + a, line = 2 * j + b;
        rows[k] = static_cast<const char*>(x) + ((n * s.X + clamp(i + a, s.X)) * s.Y + clamp(j + b, s.Y)) * row;
        const bool wanted = start <= plane && plane < stop && 0 <= line && line < 2 * s.Y;
        out[k] = wanted ? static_cast<char*>(y) + ((n * planes + plane - start) * 2 * s.Y + line) * 2 * row : nullptr;
      }
      kernels.between(rows, out, s.Z, s.C, stream, scratch.data());
    }
  }
}

void upsample_backward(const ResampleShape& s, const void* dy, void* dx, int threads, int isa) {
  const ResampleKernels& kernels = find_kernels(s, isa);
  const int64_t row = s.Z * s.C * (s.bfloat16 ? 2 : 4), blocks = (s.Y + ROWS - 1) / ROWS, units = s.n * blocks * s.X;
  threads = worthwhile(threads, units, s.n * s.X * 8 * s.Y * s.Z * s.C);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> scratch(resample_scratch(s.Z, s.C)), ring(4 * s.Z * s.C);
    const auto sums = [&](int64_t line) { return ring.data() + ((line + 1) % 4) * s.Z * s.C; };
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) {  // X fastest: the next unit finds two of its planes in the cache
      const int64_t n = unit / (blocks * s.X), i = unit % s.X, first = unit / s.X % blocks * ROWS;
      const int64_t last = std::min(first + ROWS, s.Y);
      for (int64_t line = 2 * first - 1; line <= 2 * last; ++line) {
        const void* rows[4];
        for (int64_t a = 0; a < 4; ++a) {
          const int64_t plane = clamp(2 * i - 1 + a, 2 * s.X);
          rows[a] = static_cast<const char*>(dy) + ((n * 2 * s.X + plane) * 2 * s.Y + clamp(line, 2 * s.Y)) * 2 * row;
        }
        kernels.gather(rows, sums(line), s.Z, s.C, scratch.data());
        if (line % 2 == 0 && line > 2 * first) {
          const int64_t j = line / 2 - 1;
          const float* four[4] = {sums(line - 3), sums(line - 2), sums(line - 1), sums(line)};
          kernels.weigh(four, static_cast<char*>(dx) + ((n * s.X + i) * s.Y + j) * row, s.Z * s.C);
        }
      }
    }
  }
}

void smooth(const ResampleShape& s, const void* before, const void* x, void* y, int threads, int isa) {
  const ResampleKernels& kernels = find_kernels(s, isa);
  const int64_t size = s.bfloat16 ? 2 : 4, cell = 8 * s.C, row = s.Z * cell * size;
  const int64_t planes = 2 * s.X - 2, lines = 2 * s.Y - 2, voxels = 2 * s.Z - 2;
  const int64_t blocks = (lines + SMOOTH_ROWS - 1) / SMOOTH_ROWS, units = planes * blocks;
  threads = worthwhile(threads, units, planes * lines * voxels * s.C);
  const auto at = [&](int64_t plane, int64_t line) {  // of voxels
    const int64_t i = plane / 2 - (before != nullptr);
    const char* start = static_cast<const char*>(i < 0 ? before : x) + (i < 0 ? 0 : i) * s.Y * row;
    return start + line / 2 * row + (plane % 2 * 4 + line % 2 * 2) * s.C * size;
  };

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> ring(3 * 2 * s.Z * s.C);
    const auto sums = [&](int64_t line) { return ring.data() + line % 3 * 2 * s.Z * s.C; };
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) {  // X fastest: the next unit finds two of its planes in the cache
      const int64_t k = unit % planes, first = unit / planes * SMOOTH_ROWS, last = std::min(first + SMOOTH_ROWS, lines);
      for (int64_t line = first; line < last + 2; ++line) {
        const void* rows[3] = {at(k, line), at(k + 1, line), at(k + 2, line)};
        kernels.add_rows(rows, sums(line), s.Z, s.C, cell);
        if (line < first + 2) continue;
        const float* three[3] = {sums(line - 2), sums(line - 1), sums(line)};
        kernels.blur(three, static_cast<char*>(y) + (k * lines + line - 2) * voxels * s.C * size, voxels, s.C);
      }
    }
  }
}

}  // namespace t2ct
