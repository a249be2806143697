// Cuts the work of norm.h into blocks, spreads them over threads and merges their sums in the order of the blocks.
#include "norm.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace t2ct {
namespace {

std::vector<const NormKernels*> find_isas() {
  std::vector<const NormKernels*> found;
#ifdef T2CT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(norm_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(norm_avx2);
#endif
  found.push_back(norm_portable);
  return found;
}

const std::vector<const NormKernels*>& isas() {
  static const std::vector<const NormKernels*> found = find_isas();
  return found;
}

// The blocks of one tensor. 32768 numbers keep the loops long and a block with its sums in a core's second-level
// cache; 64 rows at least, so that the per-channel work at a block's end stays small beside it.
struct Blocks {
  int64_t n, voxels, C, G, P, voxels_per_block, per_sample, total;
  int64_t bytes;  // of one number
  const NormKernels& kernels;
  int threads;

  Blocks(const NormShape& s, int wanted, int isa)
      : n(s.n), voxels(s.voxels), C(s.channels), G(s.groups), P(std::lcm(s.channels, int64_t{16})),
        voxels_per_block(P / C * std::max<int64_t>(32768 / P, 64)),
        per_sample((voxels + voxels_per_block - 1) / voxels_per_block), total(n * per_sample),
        bytes(s.bfloat16 ? 2 : 4), kernels(isas().at(isa)[s.bfloat16]),
        threads(static_cast<int>(std::min<int64_t>(std::max(wanted, 1), total))) {}

  int64_t offset(int64_t block) const {  // in bytes
    return ((block / per_sample) * voxels + (block % per_sample) * voxels_per_block) * C * bytes;
  }
  int64_t block_voxels(int64_t block) const {
    return std::min(voxels_per_block, voxels - (block % per_sample) * voxels_per_block);
  }

  // work(block, first byte, count of numbers, scratch) for every block; scratch: 5 P floats, and 2 C doubles.
  // backwards: every thread goes through the blocks that it had before from the last to the first. What it read last
  // is still in the cache then; going forwards, a tensor that the cache cannot hold would find nothing there.
  template <typename Work>
  void each(Work work, bool backwards = false) const {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> scratch(5 * P);
      std::vector<double> channel(2 * C);
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        const int64_t begin = total * part / threads, end = total * (part + 1) / threads;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t block = backwards ? begin + end - 1 - i : i;
          work(block, offset(block), block_voxels(block) * C, scratch.data(), channel.data());
        }
      }
    }
  }

  // Patterns of P numbers, `kinds` of them per sample, written by value(sample * G + group, channel, values[kinds]).
  template <int kinds, typename Value>
  std::vector<float> patterns(Value value) const {
    std::vector<float> all(n * kinds * P);
    for (int64_t i = 0; i < n; ++i) {
      float* first = all.data() + i * kinds * P;
      for (int64_t c = 0, g = i * G; g < (i + 1) * G; ++g)
        for (int64_t end = c + C / G; c < end; ++c) {
          float values[kinds];
          value(g, c, values);
          for (int k = 0; k < kinds; ++k) first[k * P + c] = values[k];
        }
      for (int k = 0; k < kinds; ++k)
        for (int64_t j = C; j < P; ++j) first[k * P + j] = first[k * P + j - C];
    }
    return all;
  }
  template <int kinds>
  const float* pattern(const std::vector<float>& all, int64_t block, int kind) const {
    return all.data() + (block / per_sample * kinds + kind) * P;
  }
};

}  // namespace

int isa_count() { return static_cast<int>(isas().size()); }
const char* isa_name(int isa) { return isas().at(isa)->name; }

void group_stats(const NormShape& shape, const void* x, double* mean, double* m2, int threads, int isa) {
  const Blocks b(shape, threads, isa);
  std::vector<double> parts(b.total * 2 * b.G);
  b.each([&](int64_t block, int64_t first, int64_t count, float* scratch, double* channel) {
    b.kernels.stats(static_cast<const char*>(x) + first, count, b.C, b.P, b.G, scratch, channel,
                    parts.data() + block * 2 * b.G);
  });
  for (int64_t i = 0; i < b.n; ++i) {
    double *m = mean + i * b.G, *s = m2 + i * b.G;
    std::fill(m, m + b.G, 0.0);
    std::fill(s, s + b.G, 0.0);
    for (int64_t block = i * b.per_sample; block < (i + 1) * b.per_sample; ++block) {
      const double share = static_cast<double>(b.block_voxels(block)) / static_cast<double>(b.voxels);
      for (int64_t g = 0; g < b.G; ++g) m[g] += share * parts[block * 2 * b.G + g];
    }
    for (int64_t block = i * b.per_sample; block < (i + 1) * b.per_sample; ++block) {
      const double numbers = static_cast<double>(b.block_voxels(block) * (b.C / b.G));
      const double* part = parts.data() + block * 2 * b.G;
      for (int64_t g = 0; g < b.G; ++g) s[g] += part[b.G + g] + numbers * (part[g] - m[g]) * (part[g] - m[g]);
    }
  }
}

void group_apply(const NormShape& shape, const void* x, void* y, const float* mean, const float* rstd,
                 const float* weight, const float* bias, bool silu, int threads, int isa) {
  const Blocks b(shape, threads, isa);
  const auto all = b.patterns<2>([&](int64_t g, int64_t c, float* values) {
    const double scale = static_cast<double>(rstd[g]) * weight[c];
    values[0] = static_cast<float>(scale);
    values[1] = static_cast<float>(bias[c] - mean[g] * scale);
  });
  b.each([&](int64_t block, int64_t first, int64_t count, float* scratch, double*) {
    b.kernels.apply(static_cast<const char*>(x) + first, static_cast<char*>(y) + first, count, b.P,
                    b.pattern<2>(all, block, 0), b.pattern<2>(all, block, 1), silu, scratch);
  }, true);
}

void group_norm(const NormShape& shape, const void* x, void* y, const float* weight, const float* bias, double eps,
                bool silu, float* mean, float* rstd, int threads, int isa) {
  const int64_t stats = shape.n * shape.groups;
  std::vector<double> m(stats), m2(stats);
  group_stats(shape, x, m.data(), m2.data(), threads, isa);
  const double count = static_cast<double>(shape.voxels * (shape.channels / shape.groups));
  for (int64_t i = 0; i < stats; ++i) {
    mean[i] = static_cast<float>(m[i]);
    rstd[i] = static_cast<float>(1.0 / std::sqrt(m2[i] / count + eps));
  }
  group_apply(shape, x, y, mean, rstd, weight, bias, silu, threads, isa);
}

void group_norm_backward(const NormShape& shape, const void* dy, const void* x, void* dx, const float* mean,
                         const float* rstd, const float* weight, const float* bias, bool silu, float* dweight,
                         float* dbias, int threads, int isa) {
  const Blocks b(shape, threads, isa);
  const int64_t width = b.C / b.G;
  const auto forward = b.patterns<4>([&](int64_t g, int64_t c, float* values) {
    const double scale = static_cast<double>(rstd[g]) * weight[c];
    values[0] = static_cast<float>(scale);
    values[1] = static_cast<float>(bias[c] - mean[g] * scale);
    values[2] = rstd[g];
    values[3] = static_cast<float>(-static_cast<double>(mean[g]) * rstd[g]);
  });
  std::vector<double> parts(b.total * 2 * b.C);
  b.each([&](int64_t block, int64_t first, int64_t count, float* scratch, double*) {
    b.kernels.reduce(static_cast<const char*>(dy) + first, static_cast<const char*>(x) + first, count, b.C, b.P,
                     b.pattern<4>(forward, block, 0), b.pattern<4>(forward, block, 1), b.pattern<4>(forward, block, 2),
                     b.pattern<4>(forward, block, 3), silu, scratch, parts.data() + block * 2 * b.C);
  });

  // sums[i]: sum dz, then sum dz * xhat, per channel of sample i
  std::vector<double> sums(b.n * 2 * b.C, 0.0), total(2 * b.C, 0.0);
  for (int64_t block = 0; block < b.total; ++block)
    for (int64_t k = 0; k < 2 * b.C; ++k) sums[block / b.per_sample * 2 * b.C + k] += parts[block * 2 * b.C + k];
  for (int64_t i = 0; i < b.n; ++i)
    for (int64_t k = 0; k < 2 * b.C; ++k) total[k] += sums[i * 2 * b.C + k];
  for (int64_t c = 0; c < b.C; ++c) {
    dbias[c] = static_cast<float>(total[c]);
    dweight[c] = static_cast<float>(total[b.C + c]);
  }

  // dx = rstd (w dz - mean(w dz) - xhat mean(w dz xhat)), the means over a group, as dz * scale + x * slope + constant
  const double share = 1.0 / static_cast<double>(b.voxels * width);
  std::vector<double> means(b.n * b.G * 2, 0.0);
  for (int64_t i = 0; i < b.n; ++i)
    for (int64_t c = 0; c < b.C; ++c)
      for (int64_t k = 0; k < 2; ++k)
        means[(i * b.G + c / width) * 2 + k] += weight[c] * sums[(i * 2 + k) * b.C + c] * share;
  const auto backward = b.patterns<2>([&](int64_t g, int64_t, float* values) {
    const double slope = -static_cast<double>(rstd[g]) * rstd[g] * means[g * 2 + 1];
    values[0] = static_cast<float>(slope);
    values[1] = static_cast<float>(-rstd[g] * means[g * 2] - mean[g] * slope);
  });
  b.each([&](int64_t block, int64_t first, int64_t count, float* scratch, double*) {
    b.kernels.gradient(static_cast<const char*>(dy) + first, static_cast<const char*>(x) + first,
                       static_cast<char*>(dx) + first, count, b.P, b.pattern<4>(forward, block, 0),
                       b.pattern<4>(forward, block, 1), b.pattern<2>(backward, block, 0),
                       b.pattern<2>(backward, block, 1), silu, scratch);
  }, true);
}

}  // namespace t2ct
