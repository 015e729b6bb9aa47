// One call as the kernels see it, and the table of neuron x dtype that cpu.cpp and cuda.cu turn into kernels.
// Surrogate, reset, detach_reset and decay_input stay values at run time (see surrogates.h for why).
#pragma once

#include <float.h>
#include <stdint.h>

#include "neurons.h"

namespace snnfast {

constexpr int kMaxStates = 2;

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Shapes: x and everything per time step is [T, N]; states are [N] in float32 (float64 for float64 input). All dense.
struct Call {
  int64_t T, N;
  int neuron, surrogate, flags, dtype, division;
  double threshold, v_reset, tau, alpha, gain, v_leak, v_init;

  const void* x;
  const void* state[kMaxStates];  // before the first step; null: v_init for the first, 0 for the others
  const void* decay;              // 0-d, the state's type; null for neurons without one
  const void* own[kMaxOwn];       // one value, or one for each neuron where own_each has the bit; the state's type
  int own_each;

  // outputs of the forward
  void* s;
  void* final_state[kMaxStates];
  void* v_seq;  // may be null

  // inputs of the backward; each may be null
  const void* grad_s;
  const void* grad_final_state[kMaxStates];
  const void* grad_v_seq;

  // outputs of the backward
  void* grad_x;
  void* grad_state[kMaxStates];  // may be null
  void* grad_own[kMaxOwn];       // [N] each; null for all or for none that the neuron has
  void* grad_decay_partial;      // [decay_partials()] float64, summed in order by the caller; null without a decay

  void* workspace;    // backward_workspace() bytes, CUDA only
  int threads;        // CPU only
  int stream_stores;  // CPU only: 1 writes past the caches, 0 does not
};

// Where a residual connection joins: the charge of each step takes it too, or the spikes and it are what comes out
// (SEW, Fang et al., NeurIPS 2021): s + skip, s * skip, (1 - s) * skip.
enum Connect : int { kNoSkip = 0, kCharge = 1, kAdd = 2, kAnd = 3, kIand = 4 };

// Batch norm in front of the neuron, as a row loop needs it: x of the call is the norm's input. Channel of neuron n:
// n / inner % channels.
struct BatchNormCall {
  Call call;
  int64_t channels, inner, groups;  // groups: 1, or T for statistics of each step
  bool batch_statistics;            // whether gradients go through mean and variance too

  // CPU only. Constants are per channel or, where a channel's neighbours are few (see runs), per element of
  // [repeats, channels, inner], for long rows; there is one set of them for each group.
  const void* first;  // statistics: any value near each channel's, [groups, constants] float64
  const void* scale;  // [groups, constants] in the state's type, as are the following
  const void* shift;
  const void* centre;  // backward: the mean
  const void* slope;   // the backward's second pass: what grad_x takes of x - centre
  const void* offset;  // and of nothing

  double* sums;  // output, [groups, channels, 2]: statistics x - first and its square; backward g and g * (x - centre)

  int connect;
  const void* skip;  // [T, N] of x's dtype; null for kNoSkip, and for kAdd in the backward, which does not need it
  void* grad_skip;   // likewise, of kCharge, kAnd and kIand

  bool runs() const { return inner >= 32; }
  int64_t neighbours() const { return runs() ? 1 : inner; }
  int64_t repeats() const {
    int64_t many = 1;
    for (int64_t all = channels * inner; !runs() && (all < 128 || (all < 512 && all % 32)); all *= 2) many *= 2;
    return many;
  }
  int64_t constants() const { return repeats() * channels * neighbours(); }
};
enum BatchNormPass { kStatistics, kForward, kBackward, kBackwardInput };  // the last is part of the caller's kBackward

// The same as Python gives it, with the norm's own tensors: what is computed per channel, the kernels compute.
struct BatchNorm {
  BatchNormCall norm;
  double *mean, *var;                // [groups, channels]; outputs of the statistics
  void *running_mean, *running_var;  // [channels] or null; the statistics move them by momentum towards each group's
  int running_dtype;
  double momentum;
  const void *weight, *bias;  // [channels] or null
  int weight_dtype, bias_dtype;
  double eps;

  // outputs of the backward, in the state's type: [channels] each, and 0-d (null for a neuron without a decay)
  void *grad_weight, *grad_bias, *grad_decay;

  void* workspace;  // CUDA only: cuda_batch_norm_workspace() bytes
};

// n elements of two values, one of them 0, and their bits in whole 8-byte words; element i is bit i % 8 of byte i / 8.
struct BitsCall {
  int64_t n;
  int element_bytes;
  void* elements;  // pack reads and unpack writes them
  void* bits;
  uint64_t one;  // the other value, as its bits; the CPU's pack finds it
  void* other;   // CUDA only: a byte, 0 at first, that pack sets where it meets any further value
  int threads;   // CPU only
};

// The loss of feature distillation for one pair (cpu_features.h), float32, everything contiguous: the mean over
// [images, to, places] of (weight * mean over time of student + bias - teacher)^2, and its gradients.
struct FeatureCall {
  int64_t T, images, from, to, places;
  const void *student, *teacher;  // [T, images, from, places], [images, to, places]
  const void *weight, *bias;      // [to, from], [to]

  // outputs: a number; and where gradients are wanted the mean over time and they, of student that of one step
  void *loss, *mean, *grad_student, *grad_weight, *grad_bias;

  float* partial;  // feature_partial_floats()
  int threads;
};
// At most so many chunks of images. They depend on the shape alone, so that no sum depends on the threads.
constexpr int64_t kFeatureChunks = 16;

// Max-pooling of 2x2 windows side by side: x [planes, H, W, C] and y [planes, H / 2, W / 2, C], dense. Channels first
// is many planes of C = 1.
struct PoolCall {
  int dtype;
  int64_t planes, H, W, C;  // H and W at least 2
  const void* x;
  void* y;
  void* chosen;  // a byte for each output: the row, times 2, and the column of the window's element that came out;
                 // null where no backward will ask
  const void* grad_y;
  void* grad_x;
  int threads;
};

// A convolution over the inputs that are not 0 (cpu_events.h), float32, dense: x [images, C, H, W] or, channels last,
// [images, H, W, C], and y [images, Ho, Wo, O].
struct EventCall {
  int64_t images, C, H, W, O, Ho, Wo;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  bool channels_last, weight_channels_last;
  const float* x;
  const float* weight;  // event_packed_floats(): as pack_event_weights writes them
  float* y;

  // The gradient of the weights, stride 1: of y's gradient, channels last.
  const float* grad_y;
  float* grad_weight;  // [O, C, kernel_h, kernel_w], or with weight_channels_last [O, kernel_h, kernel_w, C]
  float* workspace;    // event_workspace_floats()
  int threads;
};
constexpr int64_t kEventUnit = 16, kEventOutputs = 64;  // output channels: those filled up to, and those of a block
constexpr int64_t kMostEventsOfWindow = 640;            // for a block of input channels

namespace {

// Input channels of a block: a byte holds their number, and the weights of a block stay in the second-level cache.
inline int64_t event_inputs(int64_t places_of_window) {  // at most 80
  const int64_t fitting = kMostEventsOfWindow / places_of_window / 8 * 8;
  return fitting < 8 ? 8 : fitting > 64 ? 64 : fitting;
}
inline int64_t event_padded(int64_t outputs) { return (outputs + kEventUnit - 1) / kEventUnit * kEventUnit; }
inline int64_t event_workspace_floats(const EventCall& c) {
  const auto border = [](int64_t reach, int64_t padding) { return reach > padding ? 2 * (reach - padding) : 0; };
  return (c.O + kEventOutputs - 1) / kEventOutputs * kEventOutputs * c.images *
         (c.Ho + border((c.kernel_h - 1) * c.dilation_h, c.padding_h)) *
         (c.Wo + border((c.kernel_w - 1) * c.dilation_w, c.padding_w));
}
inline int64_t event_packed_floats(const EventCall& c) {
  return event_padded(c.O) * (c.C * c.kernel_h * c.kernel_w + 1);
}

inline int64_t feature_partial_floats(const FeatureCall& c) {
  constexpr int64_t most_lanes = 16;
  return kFeatureChunks * ((c.from + most_lanes - 1) / most_lanes * most_lanes + most_lanes) * c.to;
}

inline double initial_state(const Call& c, int k) { return k == 0 ? c.v_init : 0.0; }

// The next number above; not a denormal one, which the CPU kernels would read as 0.
inline float above(float a) { return fabsf(a) < FLT_MIN ? FLT_MIN : nextafterf(a, INFINITY); }
inline double above(double a) { return fabs(a) < DBL_MIN ? DBL_MIN : nextafter(a, double(INFINITY)); }

template <class R>
inline Params<R> params_of(const Call& c) {
  Params<R> p;
  p.threshold = R(c.threshold);
  p.fire_at = c.flags & kStrict ? above(p.threshold) : p.threshold;
  p.v_reset = R(c.v_reset);
  p.v_leak = R(c.v_leak);
  p.tau = R(c.tau);
  p.inv_tau = R(1) / R(c.tau);
  p.inv_tau_rest = R(1.0 / double(R(c.tau)) - double(p.inv_tau));
  p.decay = c.decay ? *static_cast<const R*>(c.decay) : R(0);
  p.kept = R(1) - (c.decay ? p.decay : p.inv_tau);
  p.alpha = R(c.alpha);
  p.gain = R(c.gain);
  const bool soft = c.flags & kSoftReset;
  p.quiet = soft ? -(R(0) * p.threshold) : R(0) * p.v_reset;
  p.fired_factor = R(soft);
  p.fired_term = soft ? -p.threshold : p.v_reset;
  p.clear_at = soft ? R(NAN) : p.fire_at;
  p.input_factor = c.flags & kDecayInput ? p.inv_tau : R(1);
  p.surrogate = c.surrogate;
  p.division = c.division;
  p.decay_input = c.flags & kDecayInput;
  p.soft_reset = c.flags & kSoftReset;
  p.zero_reset = !p.soft_reset && p.v_reset == R(0) && !(c.flags & kMultiSpike);
  p.detach_reset = c.flags & kDetachReset;
  p.strict = c.flags & kStrict;
  p.multi_spike = c.flags & kMultiSpike;
  p.resets = !(c.flags & kNoReset);
  p.clipped = c.flags & kClipped;
  return p;
}

// The state's type for a dtype of the input.
template <class T>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};

}  // namespace
}  // namespace snnfast
