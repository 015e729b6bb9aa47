// Batch norm in front of the neuron as the CUDA side offers it: every call makes its own constants per channel, so that
// a call is a few launches and nothing runs on the host between them.
#pragma once

#include <string>

#include "dispatch.h"

namespace snnfast {

// As the functions of cuda.h. The norm's groups are 1, or T for statistics of each step; kBackward is the whole
// backward.
std::string cuda_batch_norm_statistics(const BatchNorm& b, int device, void* stream);
std::string cuda_batch_norm_forward(const BatchNorm& b, int device, void* stream);
std::string cuda_batch_norm_backward(const BatchNorm& b, int device, void* stream);
inline std::string cuda_batch_norm(const BatchNorm& b, BatchNormPass pass, int device, void* stream) {
  if (pass == kStatistics) return cuda_batch_norm_statistics(b, device, stream);
  return pass == kForward ? cuda_batch_norm_forward(b, device, stream) : cuda_batch_norm_backward(b, device, stream);
}
// Reads no memory, but the addresses: they decide how a pass divides its work.
int64_t cuda_batch_norm_workspace(const BatchNorm& b, BatchNormPass pass);

}  // namespace snnfast
