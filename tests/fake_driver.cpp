// A libcuda.so.1 for tests/test_cuda.py: it checks what csrc/cuda/driver.cpp asks of a driver and launches merge.cu's
// emulation on addresses of the CPU. FAKE_CUDA names a function that fails.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../csrc/cuda/merge.cpp"

namespace {

int depth = 0;  // contexts pushed
char context, module, function;

int result(const char* name) {
  const char* failing = getenv("FAKE_CUDA");
  return failing && !strcmp(failing, name) ? 100 : 0;
}

int expect(bool good, const char* what) {
  if (!good) printf("unexpected: %s\n", what);
  return good ? 0 : 1;
}

}  // namespace

extern "C" {
int cuInit(unsigned flags) { return expect(flags == 0, "flags") + result("cuInit"); }
int cuGetErrorName(int error, const char** name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE" : nullptr;
  return 0;
}
int cuDriverGetVersion(int* version) { return *version = 13010, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal + 40, result("cuDeviceGet"); }
int cuDevicePrimaryCtxRetain(void** c, int device) {
  puts("retain");
  return *c = &context, expect(device == 43, "device");
}
int cuCtxPushCurrent_v2(void* c) { return ++depth, expect(c == &context, "context"); }
int cuCtxPopCurrent_v2(void** c) { return --depth, *c = &context, 0; }
int cuModuleLoadData(void** m, const void* image) {
  unsigned magic;
  memcpy(&magic, image, sizeof magic);
  return *m = &module, expect(magic == 0xBA55ED50 && reinterpret_cast<size_t>(image) % 8 == 0 && depth == 1, "image") +
                           result("cuModuleLoadData");
}
int cuModuleGetFunction(void** f, void* m, const char* name) {
  return *f = &function, expect(m == &module && !strcmp(name, "t2ct_merge_stats"), "function");
}
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by, unsigned bz,
                   unsigned bytes, void* stream, void** parameters, void** extra) {
  const auto& args = *static_cast<t2ct::MergeArgs*>(parameters[0]);
  printf("stream %zu, %u blocks of %u\n", reinterpret_cast<size_t>(stream), x, threads);
  t2ct::merge_stats_emulated(args, x / args.groups);
  return expect(f == &function && y * z * by * bz == 1 && !bytes && !extra && depth == 1, "launch") +
         result("cuLaunchKernel");
}
}
