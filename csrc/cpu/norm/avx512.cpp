#define T2CT_WIDTH 16
#include "kernels.h"

namespace t2ct {
const NormKernels norm_avx512[2] = {table<float>("avx512"), table<uint16_t>("avx512")};
}  // namespace t2ct
