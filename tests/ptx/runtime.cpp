// The part of CUDA's runtime that our objects are linked with, on top of machine.h: nvcc's own host code registers its
// kernels here and launches them, and what runs is the PTX that nvcc made of them. And a launch for Triton's.
#include "machine.h"

// As CUDA's headers have them, which need not be here.
struct dim3 {
  unsigned x, y, z;
};
struct cudaFuncAttributes;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

namespace {

std::vector<std::unique_ptr<ptx::Program>> programs;
std::map<const void*, std::pair<int, std::string>> launched_as;  // by the host's function: which program, and the name
int registering = 0;  // objects register their kernels in the order in which their PTX is loaded
std::string last_error;
ptx::Counts counts;
std::string profile;
int current_device = 0;
int64_t first_block = 0;
constexpr int kDevices = 2;

bool run(int program, const std::string& name, ptx::Grid grid, const std::vector<uint8_t>& parameters, int shared) {
  try {
    const ptx::Kernel& kernel = programs.at(size_t(program))->kernel(name);
    ptx::Machine machine(kernel, grid, parameters, shared);
    machine.run(first_block);
    machine.counts.launches = 1;
    const int64_t* of_launch = reinterpret_cast<const int64_t*>(&machine.counts);
    for (size_t i = 0; i < sizeof(counts) / sizeof(int64_t); ++i)
      reinterpret_cast<int64_t*>(&counts)[i] += of_launch[i];
    profile += "0\t// " + name + "\n";
    for (size_t i = 0; i < machine.executed.size(); ++i)
      if (machine.executed[i]) profile += std::to_string(machine.executed[i]) + "\t" + kernel.code[i].text + "\n";
    return true;
  } catch (const std::exception& error) {
    last_error = std::string(error.what()) + "\n  kernel " + name;
    return false;
  }
}

}  // namespace

extern "C" {

// ---- what nvcc's host code calls ----
void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(uintptr_t(++registering)); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* function, char*, const char* name, int, void*, void*, dim3*,
                            dim3*, int*) {
  launched_as[function] = {int(reinterpret_cast<uintptr_t>(handle)) - 1, name};
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }

// ---- what csrc calls ----
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) {
    last_error = "invalid device ordinal";
    return cudaErrorInvalidDevice;
  }
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* function) {
  return launched_as.count(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  const auto found = launched_as.find(function);
  if (found == launched_as.end() || grid.x == 0) {
    last_error = "invalid configuration argument";
    return cudaErrorInvalidConfiguration;
  }
  const auto& [program, name] = found->second;
  try {
    const ptx::Kernel& kernel = programs.at(size_t(program))->kernel(name);
    std::vector<uint8_t> parameters(size_t(kernel.parameter_bytes), 0);
    for (size_t k = 0; k < kernel.parameter_sizes.size(); ++k)
      memcpy(parameters.data() + kernel.parameter_offsets[k], arguments[k], size_t(kernel.parameter_sizes[k]));
    const ptx::Grid shape{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
    return run(program, name, shape, parameters, int(shared)) ? cudaSuccess : cudaErrorLaunchFailure;
  } catch (const std::exception& error) {
    last_error = error.what();
    return cudaErrorLaunchFailure;
  }
}

// ---- what the tests call ----
// A new program, whose number is the return value; below 0 there is an error.
int ptx_load(const char* text) {
  try {
    programs.push_back(std::make_unique<ptx::Program>(text));
    return int(programs.size()) - 1;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}
// `words` has 8 bytes for each parameter. Returns "" or what went wrong.
const char* ptx_launch(int program, const char* name, const uint32_t* blocks, int threads, int shared,
                       const uint64_t* words, int n) {
  last_error.clear();
  try {
    const ptx::Kernel& kernel = programs.at(size_t(program))->kernel(name);
    if (n > int(kernel.parameter_sizes.size())) ptx::fail("more arguments than parameters");
    std::vector<uint8_t> parameters(size_t(kernel.parameter_bytes), 0);
    for (int k = 0; k < n; ++k)
      memcpy(parameters.data() + kernel.parameter_offsets[size_t(k)], words + k,
             size_t(kernel.parameter_sizes[size_t(k)]));
    run(program, name, ptx::Grid{{blocks[0], blocks[1], blocks[2]}, {uint32_t(threads), 1, 1}}, parameters, shared);
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return last_error.c_str();
}
// The counts since the last call of this.
void ptx_take_counts(ptx::Counts* to) {
  *to = counts;
  counts = ptx::Counts{};
  profile.clear();
}
// What launches executed since then: how many warps, and the instruction, a line each; a line with 0 begins a kernel.
const char* ptx_profile() { return profile.c_str(); }
int shim_device() { return current_device; }
void shim_first_block(int64_t block) { first_block = block; }
}
