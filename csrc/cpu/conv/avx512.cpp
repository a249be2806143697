#define T2CT_WIDTH 16
#include "kernels.h"

namespace t2ct {
const ConvKernel conv_avx512 = {"avx512", V * W, multiply};
}  // namespace t2ct
