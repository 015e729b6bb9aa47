// Calls in float32 whose input is the same at every step, as direct coding makes it of an image: x and grad_x have one
// step, the sum over time being part of the backward. Everything else stays in registers, or in the first-level cache.
#pragma once

#include "cpu_one_step.h"

namespace snnfast {
namespace {

constexpr int64_t kMostConstantSteps = 16;  // CONSTANT_STEPS in snnfast/constant_input.py

template <class Neuron>
constexpr bool kTakesConstantInput = Neuron::kOwn == 0 && Neuron::kStates == 1 && Neuron::kTape == 1;

template <class Neuron, bool stream>
void forward_constant_input(const Call& c, int64_t begin, int64_t end) {
  const OneStep<Neuron> from(c, begin);
  float* const s = static_cast<float*>(c.s) + begin;
  float* const v = static_cast<float*>(c.final_state[0]) + begin;
  const int64_t N = c.N, T = c.T;
  const auto loop = [&](const Params<float> p) __attribute__((always_inline)) {
    for_each_in_row<float, stream>(s, end - begin, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      V state[1], tape[1], own[kMaxOwn] = {};
      from.read(i, state, own);
      const V x = load(from.x + i, (V*)nullptr);
      for (int64_t t = 0; t < T; ++t) {
        if constexpr (!stream) __builtin_prefetch(s + t * N + i + kFurther, 1);
        store_spikes<stream>(s + t * N + i, Neuron::step(x, state, tape, own, p));
      }
      store<false>(v + i, state[0]);
    });
  };
  with_known_reset<true>(params_of<float>(c), [&](const Params<float> p) __attribute__((always_inline)) {
    if constexpr (Neuron::kDivides)
      with_known_division(p, loop);
    else
      loop(p);
  });
  if (stream) store_fence();
}

// Returns the gradient of the decay.
template <class Neuron>
double backward_constant_input(const Call& c, int64_t begin, int64_t end) {
  const OneStep<Neuron> from(c, begin);
  const float* const grad_s = c.grad_s ? static_cast<const float*>(c.grad_s) + begin : nullptr;
  const float* const grad_v =
      c.grad_final_state[0] ? static_cast<const float*>(c.grad_final_state[0]) + begin : nullptr;
  float* const grad_v0 = c.grad_state[0] ? static_cast<float*>(c.grad_state[0]) + begin : nullptr;
  float* const grad_x = static_cast<float*>(c.grad_x) + begin;
  const int64_t N = c.N, T = c.T;
  DecaySum<float> decay;
  with_known_reset<false>(params_of<float>(c), [&](const Params<float> p) __attribute__((always_inline)) {
    for_each_in_row<float, false>(grad_x, end - begin, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      const V own[kMaxOwn] = {};
      V state[1], parameters[kMaxOwn], h[kMostConstantSteps], before[kMostConstantSteps], kept[kMostConstantSteps];
      from.read(i, state, parameters);
      const V x = load(from.x + i, (V*)nullptr);
      for (int64_t t = 0; t < T; ++t) {
        if (grad_s) __builtin_prefetch(grad_s + t * N + i + kFurther);
        V tape[1];
        before[t] = state[0];
        Neuron::step(x, state, tape, own, p);
        h[t] = tape[0];
      }
      switch (p.surrogate) {
#define SNNFAST_CASE(id, Surrogate)                                                                                   \
  case id:                                                                                                            \
    for (int64_t t = 0; t < T; ++t) kept[t] = Surrogate::template derivative<V>(h[t] - p.threshold, p.alpha, p.gain); \
    break;
        SNNFAST_SURROGATES(SNNFAST_CASE)
#undef SNNFAST_CASE
      }
      V grad_state[1] = {grad_v ? load(grad_v + i, (V*)nullptr) : V{}};
      ParameterGradients<V> grads{};
      for (int64_t t = T - 1; t >= 0; --t) {
        const V tape[1] = {h[t]}, start[1] = {before[t]}, spikes = grad_s ? load(grad_s + t * N + i, (V*)nullptr) : V{};
        kept[t] = Neuron::step_backward(spikes, grad_state, tape, start, kept[t], own, p, grads);
      }
      V sum = kept[0];
      for (int64_t t = 1; t < T; ++t) sum += kept[t];
      store<false>(grad_x + i, sum);
      if (grad_v0) store<false>(grad_v0 + i, grad_state[0]);
      if constexpr (Neuron::kLearnable) decay.add(grads.decay);
    });
  });
  return decay.total();
}

}  // namespace
}  // namespace snnfast
