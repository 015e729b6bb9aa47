// The scheduler behind cuda_runtime.h.
#include <ucontext.h>

#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_shim {

int64_t first_block = 0;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;

// Every thread of a block is a fiber. They take turns, each running to its next barrier or its end, so all of them have
// reached a barrier before any passes it, given that all of them meet the same barriers.
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done;
};
std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* kernel_body;
std::vector<double> lanes;

void run_fiber() {
  (*kernel_body)();
  fibers[threadIdx.x].done = true;
}

void run_block(unsigned threads) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  lanes.assign(threads, 0.0);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].done) continue;
      threadIdx = dim3(i);
      swapcontext(&scheduler, &fibers[i].context);
      waiting = waiting || !fibers[i].done;
    }
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = block;
  kernel_body = &body;
  for (int64_t b = first_block; b < int64_t(grid.x); ++b) {
    blockIdx = dim3(unsigned(b));
    run_block(block.x);
  }
}

void wait_for_block() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

double exchange_down(double value, int offset) {
  const unsigned thread = threadIdx.x, from = thread % kWarp + offset < kWarp ? thread + offset : thread;
  lanes[thread] = value;
  wait_for_block();
  const double received = lanes[from];
  wait_for_block();
  return received;
}

}  // namespace host_shim

namespace {
constexpr int kDevices = 2;
int current_device = 0;
}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid configuration argument";
}

extern "C" {
int shim_device() { return current_device; }
void shim_first_block(int64_t block) { host_shim::first_block = block; }
}
