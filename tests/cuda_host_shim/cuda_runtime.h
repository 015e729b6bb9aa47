// A stand-in for CUDA's runtime that runs kernels on the CPU, one thread after the other, so that cuda.cu can be
// compiled by a host compiler and its results checked without a GPU. Only what cuda.cu uses.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace host_shim {
// Runs body() as every thread of every block; a thread that waits gives way to the others of its block.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& body);
void wait_for_block();
double exchange_down(double value, int offset);
extern int64_t first_block;  // earlier blocks are left out: a huge grid's last ones can be tried alone
}  // namespace host_shim
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { host_shim::wait_for_block(); }
inline double __shfl_down_sync(unsigned, double value, int offset) { return host_shim::exchange_down(value, offset); }

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
typedef struct CUstream_st* cudaStream_t;
struct cudaFuncAttributes {
  int numRegs;
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  attributes->numRegs = 0;
  return cudaSuccess;
}
template <class A, class B>
void cuda_host_call(void (*kernel)(A, B), void** arguments) {
  kernel(*static_cast<A*>(arguments[0]), *static_cast<B*>(arguments[1]));
}
template <class F>
cudaError_t cudaLaunchKernel(F* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (grid.x == 0) return cudaErrorInvalidConfiguration;
  host_shim::run_grid(grid, block, [&] { cuda_host_call(kernel, arguments); });
  return cudaSuccess;
}
