#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace t2ct {
namespace {

// The few entries of cuda.h that are needed, declared here; the suffix _v2 is part of the driver's binary interface.
using Result = int;
using Handle = void*;

struct Driver {
  Result (*init)(unsigned flags);
  Result (*error_name)(Result error, const char** name);
  Result (*version)(int* version);
  Result (*device)(int* device, int ordinal);
  Result (*retain)(Handle* context, int device);  // the context that torch uses
  Result (*push)(Handle context);
  Result (*pop)(Handle* context);
  Result (*load)(Handle* module, const void* image);
  Result (*function)(Handle* function, Handle module, const char* name);
  Result (*launch)(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, Handle stream, void** parameters,
                   void** extra);
  std::string missing;

  Driver() {
    Handle library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      missing = "libcuda.so.1 was not found: there is no NVIDIA driver";
      return;
    }
    find(library, "cuInit", init);
    find(library, "cuGetErrorName", error_name);
    find(library, "cuDriverGetVersion", version);
    find(library, "cuDeviceGet", device);
    find(library, "cuDevicePrimaryCtxRetain", retain);
    find(library, "cuCtxPushCurrent_v2", push);
    find(library, "cuCtxPopCurrent_v2", pop);
    find(library, "cuModuleLoadData", load);
    find(library, "cuModuleGetFunction", function);
    find(library, "cuLaunchKernel", launch);
    if (!missing.empty()) return;
    if (Result error = init(0)) missing = "the CUDA driver did not start: " + name(error);
  }

  template <typename F>
  void find(Handle library, const char* symbol, F& f) {
    f = reinterpret_cast<F>(dlsym(library, symbol));
    if (!f && missing.empty()) missing = std::string("libcuda.so.1 has no ") + symbol + ": it is no CUDA driver";
  }

  std::string name(Result error) const {
    const char* text = nullptr;
    error_name(error, &text);
    return text ? text : "error " + std::to_string(error);
  }

  void check(Result error, const std::string& what) const {
    if (error) throw std::runtime_error(what + ": " + name(error));
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// The context of a device for as long as the scope lasts; the caller's own is current again afterwards.
struct Current {
  explicit Current(Handle context) { driver().check(driver().push(context), "cuCtxPushCurrent"); }
  ~Current() {
    Handle context;
    driver().pop(&context);
  }
};

}  // namespace

std::string driver_missing() { return driver().missing; }

Kernel::Loaded Kernel::load(int device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = loaded_.find(device);
  if (known != loaded_.end()) return known->second;

  const Driver& cu = driver();
  int number = 0, version = 0;
  Loaded fresh{};
  Handle module = nullptr;
  cu.check(cu.device(&number, device), "device " + std::to_string(device));
  cu.check(cu.retain(&fresh.context, number), "the context of device " + std::to_string(device));
  const Current current(fresh.context);
  cu.version(&version);
  const std::string which = std::string(name_) + " did not load on device " + std::to_string(device) +
                            " (driver for CUDA " + std::to_string(version / 1000) + "." +
                            std::to_string(version % 1000 / 10) + ")";
  cu.check(cu.load(&module, image_), which);
  cu.check(cu.function(&fresh.function, module, name_), which);
  return loaded_[device] = fresh;
}

void Kernel::launch(int device, void* stream, unsigned blocks, unsigned threads, void** parameters) {
  const Driver& cu = driver();
  if (!cu.missing.empty()) throw std::runtime_error(std::string(name_) + " cannot run: " + cu.missing);
  const Loaded kernel = load(device);
  const Current current(kernel.context);
  cu.check(cu.launch(kernel.function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, nullptr),
           std::string(name_) + " was not launched");
}

}  // namespace t2ct
