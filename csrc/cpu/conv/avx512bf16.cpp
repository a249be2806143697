#define T2CT_WIDTH 16
#define T2CT_PAIRS
#include "kernels.h"

namespace t2ct {
const ConvKernel conv_avx512bf16 = {"avx512bf16", V * W, multiply};
}  // namespace t2ct
