#define T2CT_WIDTH 4
#include "kernels.h"

namespace t2ct {
const NormKernels norm_portable[2] = {table<float>("portable"), table<uint16_t>("portable")};
}  // namespace t2ct
