// What tests/test_cuda_host_bn.py calls: batch norm and neuron in one.
#include "cuda_bn.h"

extern "C" {

struct FlatBatchNorm {
  int64_t pass, T, N, neuron, surrogate, flags, dtype, division, channels, inner, groups, batch_statistics,
      weight_dtype, bias_dtype, connect, running_dtype;
  double threshold, v_reset, tau, alpha, gain, v_init, eps, momentum;
  void *x, *v0, *decay, *mean, *var, *weight, *bias, *s, *v, *grad_s, *grad_v, *grad_x, *grad_v0, *grad_weight,
      *grad_bias, *grad_decay, *workspace, *skip, *grad_skip, *running_mean, *running_var;
};

static snnfast::BatchNorm norm_of(const FlatBatchNorm& f) {
  snnfast::BatchNorm b{};
  snnfast::Call& c = b.norm.call;
  c.T = f.T, c.N = f.N, c.neuron = f.neuron, c.surrogate = f.surrogate, c.flags = f.flags, c.dtype = f.dtype;
  c.division = f.division, c.threshold = f.threshold, c.v_reset = f.v_reset, c.tau = f.tau, c.alpha = f.alpha;
  c.gain = f.gain, c.v_init = f.v_init, c.x = f.x, c.state[0] = f.v0, c.decay = f.decay, c.s = f.s;
  c.final_state[0] = f.v, c.grad_s = f.grad_s, c.grad_final_state[0] = f.grad_v, c.grad_x = f.grad_x;
  c.grad_state[0] = f.grad_v0;
  b.norm.channels = f.channels, b.norm.inner = f.inner, b.norm.groups = f.groups;
  b.norm.batch_statistics = f.batch_statistics;
  b.mean = static_cast<double*>(f.mean), b.var = static_cast<double*>(f.var), b.weight = f.weight, b.bias = f.bias;
  b.weight_dtype = f.weight_dtype, b.bias_dtype = f.bias_dtype, b.eps = f.eps, b.grad_weight = f.grad_weight;
  b.grad_bias = f.grad_bias, b.grad_decay = f.grad_decay, b.workspace = f.workspace;
  b.norm.connect = f.connect, b.norm.skip = f.skip, b.norm.grad_skip = f.grad_skip;
  b.running_mean = f.running_mean, b.running_var = f.running_var, b.running_dtype = f.running_dtype;
  b.momentum = f.momentum;
  return b;
}

int64_t shim_batch_norm_workspace(const FlatBatchNorm* f) {
  return snnfast::cuda_batch_norm_workspace(norm_of(*f), snnfast::BatchNormPass(f->pass));
}
const char* shim_batch_norm(const FlatBatchNorm* f) {
  static std::string error;
  error = snnfast::cuda_batch_norm(norm_of(*f), snnfast::BatchNormPass(f->pass), 0, nullptr);
  return error.c_str();
}
}
