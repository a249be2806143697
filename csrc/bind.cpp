// t2ct._C: the compiled kernels behind t2ct.ops. Plain pointers and sizes, no torch headers, so that one build serves
// every torch. Shapes, layouts and lifetimes are checked by the callers in t2ct/ops; nobody else calls this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/conv/conv.h"
#include "cpu/narrow/narrow.h"
#include "cpu/norm/norm.h"
#include "cpu/resample/resample.h"
#include "cpu/winograd/winograd.h"
#include "cuda/driver.h"
#include "cuda/merge.h"

namespace py = pybind11;
using address = uintptr_t;

namespace {

template <typename T>
T* at(address p) {
  return reinterpret_cast<T*>(p);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < t2ct::isa_count(); ++i) names.push_back(t2ct::isa_name(i));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of t2ct. Tensors are channels-last, given as addresses; `shape` is (samples, voxels, "
            "channels, groups, bfloat16); `isa` is an index into isas().";
  m.def("isas", &isas, "Instruction sets compiled in that this machine has, best first.");
  m.attr("compiled_isas") = std::vector<std::string>{
#ifdef T2CT_X86
      "avx512", "avx2",
#endif
      "portable"};

  using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;
  auto unpack = [](const Shape& s) {
    return t2ct::NormShape{std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s), std::get<4>(s)};
  };
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("group_stats",
        [unpack](Shape shape, address x, address mean, address m2, int threads, int isa) {
          t2ct::group_stats(unpack(shape), at<void>(x), at<double>(mean), at<double>(m2), threads, isa);
        },
        release(), "x -> float64 mean and M2 of every group, (samples, groups) each.");
  m.def("group_apply",
        [unpack](Shape shape, address x, address y, address mean, address rstd, address weight, address bias, bool silu,
                 int threads, int isa) {
          t2ct::group_apply(unpack(shape), at<void>(x), at<void>(y), at<float>(mean), at<float>(rstd),
                            at<float>(weight), at<float>(bias), silu, threads, isa);
        },
        release(), "y = [silu]((x - mean) * rstd * weight + bias); y may be x. Statistics and parameters float32.");
  m.def("group_norm",
        [unpack](Shape shape, address x, address y, address weight, address bias, double eps, bool silu, address mean,
                 address rstd, int threads, int isa) {
          t2ct::group_norm(unpack(shape), at<void>(x), at<void>(y), at<float>(weight), at<float>(bias), eps, silu,
                           at<float>(mean), at<float>(rstd), threads, isa);
        },
        release(), "Statistics, then apply; writes float32 mean and rstd (samples, groups) too.");
  m.def("group_norm_backward",
        [unpack](Shape shape, address dy, address x, address dx, address mean, address rstd, address weight,
                 address bias, bool silu, address dweight, address dbias, int threads, int isa) {
          t2ct::group_norm_backward(unpack(shape), at<void>(dy), at<void>(x), at<void>(dx), at<float>(mean), at<float>(rstd),
                               at<float>(weight), at<float>(bias), silu, at<float>(dweight), at<float>(dbias), threads,
                               isa);
        },
        release(), "The gradients of group_norm: dx in x's dtype, dweight and dbias float32 (channels,).");

  using Volume = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
  m.def("conv3d",
        [](Volume v, address x, address w, address bias, address y, int threads, int isa) {
          const t2ct::ConvShape shape{std::get<0>(v), std::get<1>(v), std::get<2>(v), std::get<3>(v),
                                      std::get<4>(v), std::get<5>(v), std::get<6>(v)};
          t2ct::conv3d(shape, at<void>(x), at<void>(w), at<float>(bias), at<void>(y), threads, isa);
        },
        release(),
        "3x3x3, stride 1, padding 1, for small volumes. shape: (n, X, Y, Z, in, out, bfloat16); w (out, in, 3, 3, 3) as "
        "torch keeps it; bias float32 or 0.");
  m.attr("conv3d_bfloat16") = t2ct::conv_has_bfloat16();

  using Pads = std::tuple<int64_t, int64_t, int64_t>;
  m.def("conv3d_narrow",
        [](Volume v, Pads p, address x, address w, address bias, address y, int threads, int isa) {
          const t2ct::NarrowShape shape{std::get<0>(v), std::get<1>(v), std::get<2>(v), std::get<3>(v), std::get<4>(v),
                                        std::get<5>(v), std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<6>(v)};
          t2ct::conv3d_narrow(shape, at<void>(x), at<float>(w), at<float>(bias), at<void>(y), threads, isa);
        },
        release(),
        "3x3x3, stride 1, padding 0 or 1 of each axis, to few channels. shape as conv3d's, in a multiple of 16; "
        "w (out, 3, 3, 3, in) and bias float32.");

  auto filtered = [](const Volume& v, int64_t pad) {
    return t2ct::WinogradShape{std::get<0>(v), std::get<1>(v), std::get<2>(v), std::get<3>(v),
                               std::get<4>(v), std::get<5>(v), pad, std::get<6>(v)};
  };
  m.def("conv3d_winograd",
        [filtered](Volume v, int64_t pad, address x, address w, address shift, address residual, address y, address work,
                   int threads, int isa) {
          t2ct::conv3d_winograd(filtered(v, pad), at<void>(x), at<float>(w), at<float>(shift), at<void>(residual),
                                at<void>(y), at<float>(work), threads, isa);
        },
        release(),
        "3x3x3, stride 1, padding `pad` along X, 1 along Y and Z, in 12 multiplications of 27. shape as conv3d's, in and "
        "out multiples of 16; w (out, 3, 3, 3, in) and shift (n, out) float32; residual like y or 0, added; work: "
        "winograd_bytes of memory.");
  m.def("winograd_bytes", [filtered](Volume v, int64_t pad, int threads) {
    return t2ct::winograd_bytes(filtered(v, pad), threads);
  }, "Bytes of memory that conv3d_winograd works in.");

  using Grid = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
  auto grid = [](const Grid& g) {
    return t2ct::ResampleShape{std::get<0>(g), std::get<1>(g), std::get<2>(g),
                               std::get<3>(g), std::get<4>(g), std::get<5>(g)};
  };
  m.def("upsample",
        [grid](Grid g, int64_t start, int64_t stop, address x, address y, bool fresh, int threads, int isa) {
          t2ct::upsample(grid(g), start, stop, at<void>(x), at<void>(y), fresh, threads, isa);
        },
        release(),
        "Trilinear doubling; y holds planes start to stop along X. shape: x's (n, X, Y, Z, channels, bfloat16). fresh: y "
        "is new memory.");
  m.def("upsample_backward",
        [grid](Grid g, address dy, address dx, int threads, int isa) {
          t2ct::upsample_backward(grid(g), at<void>(dy), at<void>(dx), threads, isa);
        },
        release(), "The gradient of upsample with every plane; shape: dx's.");
  m.def("smooth",
        [grid](Grid g, address before, address x, address y, int threads, int isa) {
          t2ct::smooth(grid(g), at<void>(before), at<void>(x), at<void>(y), threads, isa);
        },
        release(), "From cells of 2 x 2 x 2 voxels, the first plane of them at `before` or 0, to the voxels between, "
        "weighted 1/4, 1/2, 1/4 along every axis. shape: (1, X, Y, Z, channels, bfloat16), in cells.");

  using Tiles = std::tuple<int, int64_t, int, int>;
  auto merge_args = [](const Tiles& s, address mean, address m2, address count, double eps, address out_mean,
                       address out_rstd) {
    return t2ct::MergeArgs{at<float>(mean), at<float>(m2), at<float>(count), at<float>(out_mean), at<float>(out_rstd),
                           std::get<1>(s), std::get<2>(s), std::get<3>(s), eps};
  };
  m.def("merge_stats_emulated",
        [merge_args](Tiles s, address mean, address m2, address count, double eps, address out_mean, address out_rstd) {
          t2ct::merge_stats_emulated(merge_args(s, mean, m2, count, eps, out_mean, out_rstd), std::get<0>(s));
        },
        release(), "merge_stats on addresses of the CPU, with the same bits.");
#ifdef T2CT_CUDA
  m.attr("cuda_targets") = std::vector<std::string>{T2CT_CUDA};
  m.attr("cuda_absent") = "";
  m.def("cuda_driver_missing", &t2ct::driver_missing, "Why there is no CUDA driver to use; empty where there is one.");
  m.def("merge_stats",
        [merge_args](Tiles s, address mean, address m2, address count, double eps, address out_mean, address out_rstd,
                     int device, address stream) {
          t2ct::merge_stats(merge_args(s, mean, m2, count, eps, out_mean, out_rstd), std::get<0>(s), device,
                            at<void>(stream));
        },
        release(),
        "Statistics of tiles -> mean and rstd (samples, groups) on a device and its stream, all float32. shape: "
        "(samples, tiles, channels, groups); mean, m2 (samples, tiles, channels); count (tiles).");
#else
  m.attr("cuda_targets") = std::vector<std::string>{};
  m.attr("cuda_absent") = T2CT_CUDA_ABSENT;
#endif
}
