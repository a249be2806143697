// One block per sample and group, one fixed tree over its threads, no atomics.
#include "merge.h"

extern "C" __global__ void __launch_bounds__(t2ct::kMergeThreads) t2ct_merge_stats(const t2ct::MergeArgs args) {
  __shared__ t2ct::Part parts[t2ct::kMergeThreads];
  const int thread = threadIdx.x;
  parts[thread] = t2ct::gather(args, blockIdx.x, thread);
#pragma unroll 1  // a step of the tree is long, and its time is the wait between steps
  for (int half = t2ct::kMergeThreads / 2; half; half /= 2) {
    __syncthreads();
    if (thread < half) parts[thread] = t2ct::merge(parts[thread], parts[thread + half]);
  }
  if (thread == 0) t2ct::finish(args, blockIdx.x, parts[0]);
}
