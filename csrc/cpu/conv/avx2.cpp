#define T2CT_WIDTH 8
#include "kernels.h"

namespace t2ct {
const ConvKernel conv_avx2 = {"avx2", V * W, multiply};
}  // namespace t2ct
