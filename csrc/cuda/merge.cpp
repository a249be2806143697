// merge.cu as the CPU sees it: the launch, and an emulation of its blocks that tests can check without a GPU.
#include "merge.h"

#ifdef T2CT_CUDA
#include "driver.h"

extern "C" const unsigned char t2ct_image_merge[];  // the fatbin of merge.cu, embedded by setup.py
#endif

namespace t2ct {

void merge_stats_emulated(const MergeArgs& args, int samples) {
  Part parts[kMergeThreads];
  for (int block = 0; block < samples * args.groups; ++block) {
    for (int thread = 0; thread < kMergeThreads; ++thread) parts[thread] = gather(args, block, thread);
    for (int half = kMergeThreads / 2; half; half /= 2)
      for (int thread = 0; thread < half; ++thread) parts[thread] = merge(parts[thread], parts[thread + half]);
    finish(args, block, parts[0]);
  }
}

#ifdef T2CT_CUDA
void merge_stats(const MergeArgs& args, int samples, int device, void* stream) {
  static Kernel kernel(t2ct_image_merge, "t2ct_merge_stats");
  void* parameters[] = {const_cast<MergeArgs*>(&args)};
  kernel.launch(device, stream, static_cast<unsigned>(samples * args.groups), kMergeThreads, parameters);
}
#endif

}  // namespace t2ct
