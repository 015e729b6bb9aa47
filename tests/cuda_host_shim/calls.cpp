// What tests/test_cuda_host.py calls, whatever runs the kernels behind it.
#include "cuda.h"

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
}
