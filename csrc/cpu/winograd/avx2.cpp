#define T2CT_WIDTH 8
#include "kernels.h"

namespace t2ct {
const WinogradKernels winograd_avx2[2] = {table<float>(), table<uint16_t>()};
}  // namespace t2ct
