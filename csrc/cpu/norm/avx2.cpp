#define T2CT_WIDTH 8
#include "kernels.h"

namespace t2ct {
const NormKernels norm_avx2[2] = {table<float>("avx2"), table<uint16_t>("avx2")};
}  // namespace t2ct
