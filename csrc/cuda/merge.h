// The statistics of tiles merged into those of groups: the arithmetic of one thread, for the GPU (merge.cu) and for the
// CPU that emulates it (merge.cpp). Both are compiled without contraction into fused multiply-adds, so they agree to
// the bit, and the order of every sum depends on the shape alone.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define T2CT_BOTH __host__ __device__ __forceinline__
#else
#define T2CT_BOTH inline
#endif

namespace t2ct {

constexpr int kMergeThreads = 256;  // a power of two; part of the order of the sums
constexpr int kInFlight = 4;        // loads that a thread waits for together

struct MergeArgs {
  const float *mean, *m2;  // (samples, tiles, channels)
  const float* count;      // (tiles): voxels in each; a tile of 0 is skipped whatever it holds
  float *out_mean, *out_rstd;  // (samples, groups)
  int64_t tiles;
  int channels, groups;
  double eps;
};

struct Part {
  double count, mean, m2;
};

// Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
T2CT_BOTH Part merge(const Part& a, const Part& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * share * a.count};
}

// What thread `thread` of block `block` = sample * groups + group reads: numbers thread, thread + kMergeThreads, ... of
// its (tiles, channels of the group). Sums about the first mean it meets, in double: no division per tile, and
// square - sum^2 / count loses no digit that a float could show, for it can exceed M2 by the number of tiles at most.
T2CT_BOTH Part gather(const MergeArgs& a, int block, int thread) {
  const int width = a.channels / a.groups, rows = kMergeThreads / width, rest = kMergeThreads % width;
  const int64_t start = block / a.groups * a.tiles * a.channels + block % a.groups * width;
  double count = 0, pivot = 0, sum = 0, square = 0, within = 0;
  int64_t tile = thread / width;
  int channel = thread % width;
  while (tile < a.tiles) {
    float n[kInFlight], value[kInFlight], m2[kInFlight];
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = start + tile * a.channels + channel;
      const bool inside = tile < a.tiles;
      n[i] = inside ? a.count[tile] : 0;
      value[i] = inside ? a.mean[at] : 0;
      m2[i] = inside ? a.m2[at] : 0;
      tile += rows;
      channel += rest;
      if (channel >= width) channel -= width, ++tile;
    }
    for (int i = 0; i < kInFlight; ++i) {
      const bool some = n[i] > 0;
      if (count == 0) pivot = value[i];
      const double d = some ? value[i] - pivot : 0, voxels = some ? n[i] : 0;
      count += voxels;
      sum += voxels * d;
      square += voxels * d * d;
      within += some ? m2[i] : 0;
    }
  }
  if (count == 0) return {0, 0, 0};
  const double shift = sum / count, between = square - sum * shift;
  return {count, pivot + shift, within + (between < 0 ? 0 : between)};  // a NaN stays
}

// A group without a voxel has no mean: NaN.
T2CT_BOTH void finish(const MergeArgs& a, int block, const Part& part) {
  const double variance = part.m2 / part.count;
  a.out_mean[block] = static_cast<float>(part.count > 0 ? part.mean : variance);
  a.out_rstd[block] = static_cast<float>(1 / sqrt(variance + a.eps));
}

void merge_stats_emulated(const MergeArgs& args, int samples);
void merge_stats(const MergeArgs& args, int samples, int device, void* stream);

}  // namespace t2ct
