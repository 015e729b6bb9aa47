// What batch norm computes for each channel, on the CPU (bn_channels.h) and on GPUs (cuda_bn_kernels.cuh) alike: in
// float64, rounded once to the state's type R.
#pragma once

#include "portable.h"

namespace snnfast {
namespace {

struct ChannelMoments {
  double mean, var;
};
// From the sums of x - first and of its square over `count` elements.
SNNFAST_FN ChannelMoments channel_moments(double first, double sum, double square, double count) {
  const double away = sum / count, var = square / count - away * away;
  return {first + away, var < 0 ? 0 : var};
}
SNNFAST_FN double unbiased(double var, double count) { return var * (count / (count - 1)); }

// Of x * scale + shift. shift is made from the rounded scale, so that a large mean does not magnify that rounding.
template <class R>
struct ChannelConstants {
  R scale, shift, centre;
};
template <class R>
SNNFAST_FN ChannelConstants<R> channel_constants(double mean, double var, double eps, double weight, double bias) {
  const R scale = R(1.0 / sqrt(var + eps) * weight);
  return {scale, R(bias - mean * double(scale)), R(mean)};
}

// Gradients of weight and bias, and what grad_x takes, through mean and variance, of x - centre (slope) and of nothing
// (offset); from the sums of g, the gradient of the normalised x, and of g * (x - centre).
template <class R>
struct ChannelGradients {
  double weight, bias;
  R slope, offset;
};
template <class R>
SNNFAST_FN ChannelGradients<R> channel_gradients(double mean, double var, double eps, R scale, R centre, double sum_g,
                                                 double sum_gx, double count) {
  const double offcentre = mean - double(centre);  // what rounding the mean left
  const double rstd = 1.0 / sqrt(var + eps), from_mean = sum_gx - offcentre * sum_g;
  const double slope = double(scale) * rstd * rstd * from_mean / -count;
  return {from_mean * rstd, sum_g, R(slope), R(double(scale) * sum_g / -count - slope * offcentre)};
}

}  // namespace
}  // namespace snnfast
