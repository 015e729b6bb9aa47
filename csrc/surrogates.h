// Surrogate gradients: the derivative of a spike by u = h - threshold, times a gain, one struct each.
//
// To add one: a struct and a row of SNNFAST_SURROGATES here, a branch in snnfast/backends/triton_dynamics.py, and its
// object in snnfast/surrogate.py. The row's number is the `id` of that object.
#pragma once

#include "portable.h"

namespace snnfast {
namespace {

// e^a for a <= 0, written out because the compiler does not vectorise exp(). A gradient needs no last bits: the
// relative error is below 3e-7 in float32 (minimax polynomial of degree 5) and 1e-15 in float64 (Taylor to degree 13).
template <class V>
SNNFAST_FN V polynomial_exp(V r, float) {
  V p = broadcast<V>(8.297647326e-3f);
  p = multiply_add(p, r, broadcast<V>(4.191543257e-2f));
  p = multiply_add(p, r, broadcast<V>(1.666757511e-1f));
  p = multiply_add(p, r, broadcast<V>(4.999889440e-1f));
  p = multiply_add(p, r, broadcast<V>(9.999996918e-1f));
  return multiply_add(p, r, broadcast<V>(1.000000072f));
}
template <class V>
SNNFAST_FN V polynomial_exp(V r, double) {
  V p = broadcast<V>(1.0 / 6227020800.0);
  p = multiply_add(p, r, broadcast<V>(1.0 / 479001600.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 39916800.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 3628800.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 362880.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 40320.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 5040.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 720.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 120.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 24.0));
  p = multiply_add(p, r, broadcast<V>(1.0 / 6.0));
  p = multiply_add(p, r, broadcast<V>(0.5));
  p = multiply_add(p, r, broadcast<V>(1.0));
  return multiply_add(p, r, broadcast<V>(1.0));
}
SNNFAST_FN constexpr float rounding_magic(float) { return 12582912.0f; }  // 1.5 * 2^23: adding it rounds to an integer
SNNFAST_FN constexpr double rounding_magic(double) { return 6755399441055744.0; }
SNNFAST_FN constexpr float minus_ln2_high(float) { return -0.69314718055994530942f; }
SNNFAST_FN constexpr double minus_ln2_high(double) { return -6.93147180369123816490e-1; }
SNNFAST_FN constexpr float minus_ln2_low(float) { return 0.0f; }
SNNFAST_FN constexpr double minus_ln2_low(double) { return -1.90821492927058770002e-10; }

template <class V>
SNNFAST_FN V exp_nonpositive(V a) {
  using R = RealOf<V>;
  const V shifted = multiply_add(a, broadcast<V>(R(1.44269504088896340736)), broadcast<V>(rounding_magic(R())));
  const V n = shifted - rounding_magic(R());
  V r = multiply_add(n, broadcast<V>(minus_ln2_high(R())), a);
  if (minus_ln2_low(R()) != R(0)) r = multiply_add(n, broadcast<V>(minus_ln2_low(R())), r);
  return scale_by_exponent(polynomial_exp(r, R()), n, shifted);
}
#ifdef __CUDA_ARCH__
template <>
SNNFAST_FN float exp_nonpositive<float>(float a) {
  float power;  // without the code for denormal results, as in quotient()
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(a * 1.44269504088896340736f));
  return power;
}
template <>
SNNFAST_FN double exp_nonpositive<double>(double a) {
  return exp(a);
}
#endif

struct Sigmoid {  // alpha * sigmoid(alpha u) * (1 - sigmoid(alpha u)), in the form that cannot overflow
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    const V e = exp_nonpositive<V>(minus_absolute(u * alpha));
    const V one_plus = e + R(1);
    return quotient(e * (alpha * gain), one_plus * one_plus);
  }
};
struct ATan {
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    const V scaled = u * (R(1.57079632679489661923) * alpha);
    return quotient(broadcast<V>(alpha / R(2) * gain), multiply_add(scaled, scaled, broadcast<V>(R(1))));
  }
};
struct PiecewiseQuadratic {
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    const V slope = multiply_add(absolute(u), broadcast<V>(-alpha * alpha), broadcast<V>(alpha));
    return select(slope < V{}, V{}, slope * gain);
  }
};
struct PiecewiseExp {
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    return exp_nonpositive<V>(minus_absolute(u * alpha)) * (alpha / R(2) * gain);
  }
};
struct SoftSign {
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    const V d = absolute(u) + quotient(R(1), alpha);
    return quotient(broadcast<V>(quotient(gain, R(2) * alpha)), d * d);
  }
};
struct SuperSpike {
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    const V d = absolute(u) + R(1);
    return quotient(broadcast<V>(alpha * gain), d * d);
  }
};
struct Erf {
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    const V scaled = u * alpha;
    return exp_nonpositive<V>(-(scaled * scaled)) * (alpha * R(0.56418958354775628695) * gain);
  }
};
struct Rect {
  template <class V, class R>
  static SNNFAST_FN V derivative(V u, R alpha, R gain) {
    return select(absolute(u) < R(0.5) / alpha, broadcast<V>(alpha * gain), V{});
  }
};

#define SNNFAST_SURROGATES(X) \
  X(0, Sigmoid)               \
  X(1, ATan)                  \
  X(2, PiecewiseQuadratic)    \
  X(3, PiecewiseExp)          \
  X(4, SoftSign)              \
  X(5, SuperSpike)            \
  X(6, Erf)                   \
  X(7, Rect)

}  // namespace
}  // namespace snnfast
