// Calls of one time step in float32, which a user's own loop over time makes: everything between the loads and the
// stores stays in registers. With one row there is nothing to keep in a cache, and long streams are what the memory
// serves fastest: the inputs of such a loop come from there.
#pragma once

#include "cpu_backward.h"

namespace snnfast {
namespace {

template <class T>
constexpr bool kServesOneStep = false;
template <>
constexpr bool kServesOneStep<float> = true;
constexpr int64_t kFurther = kPrefetchBytes / 4 / int64_t(sizeof(float));

// Where the neurons' states and own parameters come from; loads of a vector of neurons or of one.
template <class Neuron>
struct OneStep {
  const float* x;
  const float* state[Neuron::kStates];  // null: all start at `initial`
  float initial[Neuron::kStates];
  const float* own[kMaxOwn];
  bool own_each[kMaxOwn];

  OneStep(const Call& c, int64_t begin) : x(static_cast<const float*>(c.x) + begin), own{}, own_each{} {
    for (int k = 0; k < Neuron::kStates; ++k) {
      state[k] = c.state[k] ? static_cast<const float*>(c.state[k]) + begin : nullptr;
      initial[k] = float(initial_state(c, k));
    }
    for (int k = 0; k < Neuron::kOwn; ++k) {
      own_each[k] = c.own_each >> k & 1;
      own[k] = static_cast<const float*>(c.own[k]) + (own_each[k] ? begin : 0);
    }
  }

  template <class V>
  SNNFAST_FN void read(int64_t i, V (&before)[Neuron::kStates], V (&parameters)[kMaxOwn]) const {
    __builtin_prefetch(x + i + kFurther);
    for (int k = 0; k < Neuron::kStates; ++k) {
      if (state[k]) __builtin_prefetch(state[k] + i + kFurther);
      before[k] = state[k] ? load(state[k] + i, (V*)nullptr) : broadcast<V>(initial[k]);
    }
    for (int k = 0; k < Neuron::kOwn; ++k)
      parameters[k] = own_each[k] ? load(own[k] + i, (V*)nullptr) : broadcast<V>(*own[k]);
  }
};

template <class Neuron>
void forward_one_step(const Call& c, int64_t begin, int64_t end) {
  const OneStep<Neuron> from(c, begin);
  float* const s = static_cast<float*>(c.s) + begin;
  float* to[Neuron::kStates];
  for (int k = 0; k < Neuron::kStates; ++k) to[k] = static_cast<float*>(c.final_state[k]) + begin;
  const auto loop = [&](const Params<float> p) __attribute__((always_inline)) {
    for_each_in_row<float, false>(s, end - begin, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      V state[Neuron::kStates], tape[Neuron::kTape], own[kMaxOwn] = {};
      from.read(i, state, own);
      // Ordinary stores wait for ownership of their line; asking early hides it.
      __builtin_prefetch(s + i + kFurther, 1);
      for (int k = 0; k < Neuron::kStates; ++k) __builtin_prefetch(to[k] + i + kFurther, 1);
      const V spikes = Neuron::step(load(from.x + i, (V*)nullptr), state, tape, own, p);
      for (int k = 0; k < Neuron::kStates; ++k) store<false>(to[k] + i, state[k]);
      if constexpr (Neuron::kOwn > 0)  // may be several at once
        store<false>(s + i, spikes);
      else
        store_spikes<false>(s + i, spikes);
    });
  };
  const Params<float> known = params_of<float>(c);
  if constexpr (Neuron::kOwn > 0) return loop(known);
  with_known_reset<true>(known, [&](const Params<float> p) __attribute__((always_inline)) {
    if constexpr (Neuron::kDivides)
      with_known_division(p, loop);
    else
      loop(p);
  });
}

// Returns the gradient of the decay.
template <class Neuron>
double backward_one_step(const Call& c, int64_t begin, int64_t end) {
  const OneStep<Neuron> from(c, begin);
  const auto at = [begin](auto* pointer, auto* type) {
    return pointer ? static_cast<decltype(type)>(pointer) + begin : nullptr;
  };
  const float* const grad_s = at(c.grad_s, (const float*)nullptr);
  float* const grad_x = static_cast<float*>(c.grad_x) + begin;
  const float* grad_final[Neuron::kStates];
  float *grad_state[Neuron::kStates], *grad_own[kMaxOwn];
  for (int k = 0; k < Neuron::kStates; ++k) {
    grad_final[k] = at(c.grad_final_state[k], (const float*)nullptr);
    grad_state[k] = at(c.grad_state[k], (float*)nullptr);
  }
  for (int k = 0; k < Neuron::kOwn; ++k) grad_own[k] = at(c.grad_own[k], (float*)nullptr);
  DecaySum<float> decay;
  with_known_reset<false>(params_of<float>(c), [&](const Params<float> p) __attribute__((always_inline)) {
    for_each_in_row<float, false>(grad_x, end - begin, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      V before[Neuron::kStates], state[Neuron::kStates], tape[Neuron::kTape], own[kMaxOwn] = {}, grad[Neuron::kStates];
      from.read(i, before, own);
      for (int k = 0; k < Neuron::kStates; ++k) {
        state[k] = before[k];
        grad[k] = grad_final[k] ? load(grad_final[k] + i, (V*)nullptr) : V{};
      }
      Neuron::step(load(from.x + i, (V*)nullptr), state, tape, own, p);
      const V u = Neuron::kOwn > 0 ? tape[0] - own[kThreshold] : tape[0] - p.threshold;
      V derivative{};
      switch (p.surrogate) {
#define SNNFAST_CASE(id, Surrogate)                                     \
  case id:                                                              \
    derivative = Surrogate::template derivative<V>(u, p.alpha, p.gain); \
    break;
        SNNFAST_SURROGATES(SNNFAST_CASE)
#undef SNNFAST_CASE
      }
      if (grad_s) __builtin_prefetch(grad_s + i + kFurther);
      __builtin_prefetch(grad_x + i + kFurther, 1);
      for (int k = 0; k < Neuron::kStates; ++k)
        if (grad_state[k]) __builtin_prefetch(grad_state[k] + i + kFurther, 1);
      ParameterGradients<V> grads{};
      const V spikes = grad_s ? load(grad_s + i, (V*)nullptr) : V{};
      store<false>(grad_x + i, Neuron::step_backward(spikes, grad, tape, before, derivative, own, p, grads));
      for (int k = 0; k < Neuron::kStates; ++k)
        if (grad_state[k]) store<false>(grad_state[k] + i, grad[k]);
      for (int k = 0; k < Neuron::kOwn; ++k)
        if (grad_own[k]) store<false>(grad_own[k] + i, grads.own[k]);
      if constexpr (Neuron::kLearnable) decay.add(grads.decay);
    });
  });
  return decay.total();
}

}  // namespace
}  // namespace snnfast
