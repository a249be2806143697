// bfloat16 for code that no instruction set was chosen for: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace t2ct {

inline uint16_t round_bfloat16(float value) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace t2ct
