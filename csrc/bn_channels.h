// What batch norm and neuron in one compute per channel, around the row loops of bn_neuron.h: mean and variance from
// sums, the constants of x * scale + shift, the gradients of weight and bias, and what grad_x takes of x - centre. In
// float64, as channel_kernel does it on a GPU (cuda_bn_kernels.cuh), rounded once to the state's type.
#pragma once

#include "bn_formulas.h"
#include "bn_neuron.h"

namespace snnfast {
namespace {

double element(const void* from, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat64:
      return static_cast<const double*>(from)[i];
    case kBFloat16:
      return to_float(static_cast<const BFloat16*>(from)[i]);
    case kFloat16:
      return to_float(static_cast<const Float16*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}

void set_element(void* to, int dtype, int64_t i, double value) {
  switch (dtype) {
    case kFloat64:
      static_cast<double*>(to)[i] = value;
      break;
    case kBFloat16:
      store<false>(static_cast<BFloat16*>(to) + i, float(value));
      break;
    case kFloat16:
      store<false>(static_cast<Float16*>(to) + i, float(value));
      break;
    default:
      static_cast<float*>(to)[i] = float(value);
  }
}
void move_element(void* to, int dtype, int64_t i, double towards, double momentum) {
  set_element(to, dtype, i, (1.0 - momentum) * element(to, dtype, i) + momentum * towards);
}

// Arrays of [groups, constants] of one call.
template <class V>
class ChannelArrays {
 public:
  ChannelArrays(const BatchNormCall& b, int arrays)
      : b_(b),
        constants_(b.constants()),
        size_(b.groups * constants_),
        memory_(static_cast<V*>(malloc(arrays * size_ * sizeof(V)))) {}
  ~ChannelArrays() { free(memory_); }
  ChannelArrays(const ChannelArrays&) = delete;
  ChannelArrays& operator=(const ChannelArrays&) = delete;

  bool allocated() const { return memory_; }
  const V* array(int k) const { return memory_ + k * size_; }
  // of group * channels + channel
  void set(int k, int64_t i, V value) {
    const int64_t row = b_.channels * b_.neighbours();
    for (V *to = memory_ + place(k, i), *const end = to + constants_; to < end; to += row)
      for (int64_t j = 0; j < b_.neighbours(); ++j) to[j] = value;
  }
  V get(int k, int64_t i) const { return memory_[place(k, i)]; }

 private:
  int64_t place(int k, int64_t i) const {
    return k * size_ + i / b_.channels * constants_ + i % b_.channels * b_.neighbours();
  }

  const BatchNormCall& b_;
  const int64_t constants_, size_;
  V* const memory_;
};

// The sums of a pass, [groups, channels, 2].
class ChannelSums {
 public:
  explicit ChannelSums(BatchNormCall& b)
      : memory_(static_cast<double*>(malloc(2 * b.groups * b.channels * sizeof(double)))) {
    b.sums = memory_;
  }
  ~ChannelSums() { free(memory_); }
  ChannelSums(const ChannelSums&) = delete;
  ChannelSums& operator=(const ChannelSums&) = delete;

  bool allocated() const { return memory_; }
  double operator()(int64_t i, int k) const { return memory_[2 * i + k]; }

 private:
  double* const memory_;
};

// How many elements of x each mean is of.
double count_of(const BatchNormCall& b) { return double(b.call.T / b.groups) * double(b.call.N / b.channels); }

bool norm_statistics(const BatchNorm& n) {
  BatchNormCall b = n.norm;
  ChannelArrays<double> first(b, 1);
  const ChannelSums sums(b);
  if (!first.allocated() || !sums.allocated()) return false;
  const int64_t vectors = b.groups * b.channels;
  for (int64_t i = 0; i < vectors; ++i)
    first.set(0, i, element(b.call.x, b.call.dtype, i / b.channels * b.call.N + i % b.channels * b.inner));
  b.first = first.array(0);
  if (!run_rows(b, kStatistics)) return false;
  const double count = count_of(b);
  for (int64_t i = 0; i < vectors; ++i) {
    const ChannelMoments found = channel_moments(first.get(0, i), sums(i, 0), sums(i, 1), count);
    n.mean[i] = found.mean;
    n.var[i] = found.var;
    if (!n.running_mean) continue;
    const int64_t channel = i % b.channels;
    move_element(n.running_mean, n.running_dtype, channel, found.mean, n.momentum);
    move_element(n.running_var, n.running_dtype, channel, unbiased(found.var, count), n.momentum);
  }
  return true;
}

enum { kScale, kShift, kCentre, kSlope, kOffset };
template <class R>
void make_constants(const BatchNorm& n, ChannelArrays<R>& to, bool centre) {
  for (int64_t i = 0; i < n.norm.groups * n.norm.channels; ++i) {
    const int64_t channel = i % n.norm.channels;
    const double weight = n.weight ? element(n.weight, n.weight_dtype, channel) : 1.0;
    const double bias = n.bias ? element(n.bias, n.bias_dtype, channel) : 0.0;
    const ChannelConstants<R> found = channel_constants<R>(n.mean[i], n.var[i], n.eps, weight, bias);
    to.set(kScale, i, found.scale);
    to.set(kShift, i, found.shift);
    if (centre) to.set(kCentre, i, found.centre);
  }
}

template <class R>
bool norm_forward(const BatchNorm& n) {
  BatchNormCall b = n.norm;
  ChannelArrays<R> constants(b, 2);
  if (!constants.allocated()) return false;
  make_constants(n, constants, false);
  b.scale = constants.array(kScale);
  b.shift = constants.array(kShift);
  return run_rows(b, kForward);
}

template <class R>
bool norm_backward(const BatchNorm& n) {
  BatchNormCall b = n.norm;
  ChannelArrays<R> constants(b, 5);
  const ChannelSums sums(b);
  if (!constants.allocated() || !sums.allocated()) return false;
  make_constants(n, constants, true);
  b.scale = constants.array(kScale);
  b.shift = constants.array(kShift);
  b.centre = constants.array(kCentre);
  double decays[kMostChunks] = {};
  b.call.grad_decay_partial = decays;
  if (!run_rows(b, kBackward)) return false;
  if (n.grad_decay) {
    double sum = 0;
    for (double part : decays) sum += part;
    *static_cast<R*>(n.grad_decay) = R(sum);
  }
  const double count = count_of(b);
  for (int64_t channel = 0; channel < b.channels; ++channel) {
    double grad_weight = 0, grad_bias = 0;
    for (int64_t i = channel; i < b.groups * b.channels; i += b.channels) {
      const ChannelGradients<R> found = channel_gradients<R>(n.mean[i], n.var[i], n.eps, constants.get(kScale, i),
                                                             constants.get(kCentre, i), sums(i, 0), sums(i, 1), count);
      grad_weight += found.weight;
      grad_bias += found.bias;
      if (!b.batch_statistics) continue;
      constants.set(kSlope, i, found.slope);
      constants.set(kOffset, i, found.offset);
    }
    static_cast<R*>(n.grad_weight)[channel] = R(grad_weight);
    static_cast<R*>(n.grad_bias)[channel] = R(grad_bias);
  }
  if (!b.batch_statistics) return true;
  b.slope = constants.array(kSlope);
  b.offset = constants.array(kOffset);
  return run_rows(b, kBackwardInput);
}

// False where memory ran out, and then nothing that was written counts.
bool run_batch_norm(const BatchNorm& n, BatchNormPass pass) {
  const bool wide = n.norm.call.dtype == kFloat64;
  if (pass == kStatistics) return norm_statistics(n);
  if (pass == kForward) return wide ? norm_forward<double>(n) : norm_forward<float>(n);
  return wide ? norm_backward<double>(n) : norm_backward<float>(n);
}

}  // namespace
}  // namespace snnfast
