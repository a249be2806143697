// Kernels compiled by nvcc, run through the CUDA driver. The driver is opened when it is first asked for, so that the
// module builds without CUDA's headers, links none of its libraries and imports where there is no GPU.
#pragma once

#include <map>
#include <mutex>
#include <string>

namespace t2ct {

// Why there is no CUDA driver to use, in one line; empty where there is one.
std::string driver_missing();

// One __global__ function of an embedded fatbin, loaded on each device when it is first launched there: launch once
// before a stream is captured. Errors are std::runtime_error.
class Kernel {
 public:
  Kernel(const void* image, const char* name) : image_(image), name_(name) {}

  // `parameters` points at each parameter of the kernel; `stream` is the caller's and belongs to `device`.
  void launch(int device, void* stream, unsigned blocks, unsigned threads, void** parameters);

 private:
  struct Loaded {
    void *context, *function;
  };
  Loaded load(int device);

  const void* image_;
  const char* name_;
  std::mutex mutex_;
  std::map<int, Loaded> loaded_;
};

}  // namespace t2ct
