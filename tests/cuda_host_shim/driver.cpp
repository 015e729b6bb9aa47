// The scheduler behind cuda_runtime.h, and what tests/test_cuda_host.py calls.
#include <ucontext.h>

#include <string>
#include <vector>

#include "cuda.h"
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

struct FlatCall {
  int64_t T, N, neuron, surrogate, flags, dtype, division, own_each;
  double threshold, v_reset, tau, alpha, gain, v_leak, v_init;
  void *x, *v0, *i0, *decay, *own[snnfast::kMaxOwn], *s, *v, *i, *v_seq, *grad_s, *grad_v, *grad_i, *grad_v_seq,
      *grad_x, *grad_v0, *grad_i0, *grad_own[snnfast::kMaxOwn], *grad_decay_partial, *workspace;
};

static snnfast::Call call_of(const FlatCall& f) {
  snnfast::Call c{};
  c.T = f.T, c.N = f.N, c.neuron = f.neuron, c.surrogate = f.surrogate, c.flags = f.flags, c.dtype = f.dtype;
  c.division = f.division, c.threshold = f.threshold, c.v_reset = f.v_reset, c.tau = f.tau, c.alpha = f.alpha;
  c.gain = f.gain, c.v_leak = f.v_leak, c.own_each = f.own_each, c.v_init = f.v_init, c.x = f.x, c.state[0] = f.v0,
  c.decay = f.decay, c.s = f.s, c.final_state[0] = f.v;
  c.v_seq = f.v_seq, c.grad_s = f.grad_s, c.grad_final_state[0] = f.grad_v, c.grad_v_seq = f.grad_v_seq;
  c.grad_x = f.grad_x, c.grad_state[0] = f.grad_v0, c.grad_decay_partial = f.grad_decay_partial;
  c.workspace = f.workspace, c.state[1] = f.i0, c.final_state[1] = f.i, c.grad_final_state[1] = f.grad_i;
  c.grad_state[1] = f.grad_i0;
  for (int k = 0; k < snnfast::kMaxOwn; ++k) c.own[k] = f.own[k], c.grad_own[k] = f.grad_own[k];
  return c;
}

static const char* kept(const std::string& error) {
  static std::string text;
  text = error;
  return text.c_str();
}
const char* shim_forward(const FlatCall* f, int device) {
  return kept(snnfast::cuda_forward(call_of(*f), device, nullptr));
}
const char* shim_backward(const FlatCall* f, int device) {
  return kept(snnfast::cuda_backward(call_of(*f), device, nullptr));
}
int64_t shim_workspace(const FlatCall* f) { return snnfast::cuda_backward_workspace(call_of(*f)); }
int64_t shim_partials(const FlatCall* f) { return snnfast::cuda_decay_partials(call_of(*f)); }
const char* shim_probe(int device) { return kept(snnfast::cuda_probe(device)); }
int shim_device() { return current_device; }
void shim_first_block(int64_t block) { host_shim::first_block = block; }
}
