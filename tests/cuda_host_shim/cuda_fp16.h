// See cuda_runtime.h.
#pragma once

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half a) { return float(a.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
