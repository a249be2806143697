#define T2CT_WIDTH 4
#include "kernels.h"

namespace t2ct {
const ConvKernel conv_portable = {"portable", V * W, multiply};
}  // namespace t2ct
