// The serial kernels behind `smooth` of resample.h; included by kernels.h, whose vectors they use.
#pragma once

namespace t2ct {
namespace {

template <typename T>
void add_rows(const void* const* rows, float* sums, int64_t cells, int64_t C, int64_t stride) {
  const T *a = static_cast<const T*>(rows[0]), *b = static_cast<const T*>(rows[1]), *c = static_cast<const T*>(rows[2]);
  for (int64_t k = 0; k < cells; ++k, a += stride, b += stride, c += stride, sums += 2 * C)
    for (int64_t j = 0; j < 2 * C; j += W) store(sums + j, multiply_add(load(b + j), 2.0f, load(a + j) + load(c + j)));
}

template <typename T>
void blur(const float* const* rows, void* out, int64_t voxels, int64_t C) {
  T* y = static_cast<T*>(out);
  for (int64_t j = 0; j < C; j += W) {
    const float *a = rows[0] + j, *b = rows[1] + j, *c = rows[2] + j;
    const auto next = [&] {
      const vf sum = multiply_add(load(b), 2.0f, load(a) + load(c));
      a += C, b += C, c += C;
      return sum;
    };
    vf first = next(), second = next();
    for (int64_t z = 0; z < voxels; ++z) {
      const vf third = next();
      store(y + z * C + j, multiply_add(second, 2.0f, first + third) * (1.0f / 64));
      first = second, second = third;
    }
  }
}

}  // namespace
}  // namespace t2ct
