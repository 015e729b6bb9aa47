// What cuda.cu offers to bindings.cpp. Every function sets the device it is given and returns an empty string or the
// CUDA error's text; nothing allocates or synchronises. T is at least 1.
#pragma once

#include <string>

#include "dispatch.h"

namespace snnfast {

// Empty when a kernel of this build can run on the device, else why not.
std::string cuda_probe(int device);
std::string cuda_forward(const Call& call, int device, void* stream);
std::string cuda_backward(const Call& call, int device, void* stream);
std::string cuda_pack_bits(const BitsCall& call, int device, void* stream);
std::string cuda_unpack_bits(const BitsCall& call, int device, void* stream);
// Bytes of Call::workspace that the backward needs, and the length of Call::grad_decay_partial (0 for a neuron without
// a decay), all of which it writes. Neither reads a pointer of the call.
int64_t cuda_backward_workspace(const Call& call);
int64_t cuda_decay_partials(const Call& call);
// What this build was compiled for: "sm_80 sm_90 ... + PTX".
const char* cuda_architectures();

}  // namespace snnfast
