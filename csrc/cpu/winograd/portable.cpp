#define T2CT_WIDTH 4
#include "kernels.h"

namespace t2ct {
const WinogradKernels winograd_portable[2] = {table<float>(), table<uint16_t>()};
}  // namespace t2ct
