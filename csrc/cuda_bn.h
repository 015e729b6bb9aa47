// Batch norm in front of the neuron as the CUDA side takes it: every call makes its own constants per channel, so that
// a call is a few launches and nothing runs on the host between them.
#pragma once

#include <string>

#include "dispatch.h"

namespace snnfast {

struct CudaBatchNorm {
  BatchNormCall norm;         // its own tensors per channel are not used here, those of its call are
  double *mean, *var;         // [groups, channels]; outputs of the statistics
  const void *weight, *bias;  // [channels] or null
  int weight_dtype, bias_dtype;
  double eps;

  // outputs of the backward, in the state's type: [channels] each, and 0-d (null for a neuron without a decay)
  void *grad_weight, *grad_bias, *grad_decay;

  void* workspace;  // cuda_batch_norm_workspace() bytes
};

// As the functions of cuda.h. The norm's groups are 1, or T for statistics of each step; kBackward is the whole
// backward.
std::string cuda_batch_norm_statistics(const CudaBatchNorm& b, int device, void* stream);
std::string cuda_batch_norm_forward(const CudaBatchNorm& b, int device, void* stream);
std::string cuda_batch_norm_backward(const CudaBatchNorm& b, int device, void* stream);
inline std::string cuda_batch_norm(const CudaBatchNorm& b, BatchNormPass pass, int device, void* stream) {
  if (pass == kStatistics) return cuda_batch_norm_statistics(b, device, stream);
  return pass == kForward ? cuda_batch_norm_forward(b, device, stream) : cuda_batch_norm_backward(b, device, stream);
}
// Reads no memory, but the addresses: they decide how a pass divides its work.
int64_t cuda_batch_norm_workspace(const CudaBatchNorm& b, BatchNormPass pass);

}  // namespace snnfast
