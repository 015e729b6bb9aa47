// A window of max-pooling in lanes: vectors of any size over the bits of any number type, and which of four is largest.
#pragma once

#include "cpu_rows.h"

namespace snnfast {
namespace {

// ---- lanes of any size of vector ----
template <int size>
struct BitsOf;
template <>
struct BitsOf<2> {
  using Unsigned = uint16_t;
  using Signed = int16_t;
};
template <>
struct BitsOf<4> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
};
template <>
struct BitsOf<8> {
  using Unsigned = uint64_t;
  using Signed = int64_t;
};
template <class R, int bytes>
struct LanesOf {
  typedef R type __attribute__((vector_size(bytes)));
};
template <class R>
struct LanesOf<R, sizeof(R)> {
  using type = R;
};

// A vector of `bytes` of T's bits; of bytes = sizeof(T), a scalar.
template <class T, int bytes>
struct Pool {
  static constexpr int kBytes = bytes, kLanes = bytes / int(sizeof(T));
  using Element = typename BitsOf<sizeof(T)>::Unsigned;
  using Bits = typename LanesOf<Element, bytes>::type;
  using Signed = typename LanesOf<typename BitsOf<sizeof(T)>::Signed, bytes>::type;

  static SNNFAST_FN Bits load(const T* from) { return load_bits<Bits>(from); }
  static SNNFAST_FN void store(T* to, Bits v) { memcpy(to, &v, sizeof(v)); }

  // Lanes of 0 to 3 as bytes, and back. GCC 12 makes of __builtin_convertvector what takes longer than all the rest.
  static SNNFAST_FN void store_bytes(uint8_t* to, Bits v) {
    if constexpr (kLanes == 1) {
      *to = uint8_t(v);
#if defined(__AVX512F__)
    } else if constexpr (bytes == 64) {
      const auto lanes = bits_as<__m512i>(v);
      if constexpr (sizeof(T) == 2) store_bits<false>(to, _mm512_cvtepi16_epi8(lanes));
      if constexpr (sizeof(T) == 4) store_bits<false>(to, _mm512_cvtepi32_epi8(lanes));
      if constexpr (sizeof(T) == 8) _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8(lanes));
#endif
#if defined(__AVX2__)
    } else if constexpr (bytes == 32 && sizeof(T) < 8) {
      auto lanes = bits_as<__m256i>(v);
      if constexpr (sizeof(T) == 4) lanes = _mm256_packs_epi32(lanes, lanes);
      const __m256i packed = _mm256_packus_epi16(lanes, lanes);  // within 128 bits each
      const __m128i low = _mm256_castsi256_si128(packed), high = _mm256_extracti128_si256(packed, 1);
      if constexpr (sizeof(T) == 4) _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(low, high));
      if constexpr (sizeof(T) == 2) _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi64(low, high));
#endif
#if defined(__SSE2__)
    } else if constexpr (bytes == 16 && sizeof(T) < 8) {
      auto lanes = bits_as<__m128i>(v);
      if constexpr (sizeof(T) == 4) lanes = _mm_packs_epi32(lanes, lanes);
      const __m128i packed = _mm_packus_epi16(lanes, lanes);
      if constexpr (sizeof(T) == 4) store_bits<false>(to, _mm_cvtsi128_si32(packed));
      if constexpr (sizeof(T) == 2) _mm_storel_epi64((__m128i*)to, packed);
#endif
    } else {
      for (int i = 0; i < kLanes; ++i) to[i] = uint8_t(v[i]);
    }
  }
  static SNNFAST_FN Bits load_bytes(const uint8_t* from) {
    if constexpr (kLanes == 1) {
      return *from;
#if defined(__AVX512F__)
    } else if constexpr (bytes == 64) {
      if constexpr (sizeof(T) == 2) return bits_as<Bits>(_mm512_cvtepu8_epi16(load_bits<__m256i>(from)));
      if constexpr (sizeof(T) == 4) return bits_as<Bits>(_mm512_cvtepu8_epi32(load_bits<__m128i>(from)));
      if constexpr (sizeof(T) == 8) return bits_as<Bits>(_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from)));
#endif
#if defined(__AVX2__)
    } else if constexpr (bytes == 32 && sizeof(T) < 8) {
      if constexpr (sizeof(T) == 2) return bits_as<Bits>(_mm256_cvtepu8_epi16(load_bits<__m128i>(from)));
      if constexpr (sizeof(T) == 4) return bits_as<Bits>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#endif
#if defined(__SSE2__)
    } else if constexpr (bytes == 16 && sizeof(T) < 8) {
      const __m128i zero = _mm_setzero_si128();
      if constexpr (sizeof(T) == 2)
        return bits_as<Bits>(_mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)from), zero));
      if constexpr (sizeof(T) == 4) {
        const __m128i few = _mm_unpacklo_epi8(_mm_cvtsi32_si128(load_bits<int>(from)), zero);
        return bits_as<Bits>(_mm_unpacklo_epi16(few, zero));
      }
#endif
    } else {
      Bits v{};
      for (int i = 0; i < kLanes; ++i) v[i] = from[i];
      return v;
    }
  }
  static SNNFAST_FN Bits where(Signed mask, Bits v) { return v & (Bits)mask; }
  static SNNFAST_FN Signed equals(Bits a, Element b) {
    if constexpr (kLanes == 1)
      return a == b ? -1 : 0;
    else
      return a == b;
  }
};

// ---- which is larger ----
// The numbers behind the bits in a form that can be compared; `beats` is whether v comes out although `most` was found
// before it.
template <class T, int bytes>
struct Order {
  using P = Pool<T, bytes>;
  using Real = typename LanesOf<T, bytes>::type;
  using Key = Real;
  static SNNFAST_FN Key key(typename P::Bits v) { return bits_as<Real>(v); }
  static SNNFAST_FN auto beats(Key v, Key most) { return (v > most) | (v != v); }
};
// Of 16 bits: integers in the order of the numbers, both zeros being 0 and every NaN the largest.
template <class T, int bytes, int infinity>
struct OrderOfHalves {
  using P = Pool<T, bytes>;
  using Key = typename P::Signed;
  static constexpr int16_t kNaN = 0x7fff;
  static SNNFAST_FN Key key(typename P::Bits v) {
    const Key magnitude = (Key)(v & 0x7fff);
    const Key ordered = select((Key)v < 0, Key(-magnitude), magnitude);
    return select(magnitude > int16_t(infinity), Key(Key{} + kNaN), ordered);
  }
  static SNNFAST_FN auto beats(Key v, Key most) { return (v > most) | (v == kNaN); }
};
template <int bytes>
struct Order<BFloat16, bytes> : OrderOfHalves<BFloat16, bytes, 0x7f80> {};
template <int bytes>
struct Order<Float16, bytes> : OrderOfHalves<Float16, bytes, 0x7c00> {};

// Of a window's elements, in the order of rows, the first of the largest or the last NaN, and its number.
template <class T, int bytes>
SNNFAST_FN typename Pool<T, bytes>::Bits largest(const typename Pool<T, bytes>::Bits (&window)[4],
                                                 typename Pool<T, bytes>::Bits& chosen) {
  using O = Order<T, bytes>;
  using Bits = typename Pool<T, bytes>::Bits;
  Bits found = window[0];
  auto most = O::key(found);
  chosen = Bits{};
  for (int k = 1; k < 4; ++k) {
    const auto key = O::key(window[k]);
    const auto beats = O::beats(key, most);
    found = select(beats, window[k], found);
    most = select(beats, key, most);
    chosen = select(beats, Bits(Bits{} + typename Pool<T, bytes>::Element(k)), chosen);
  }
  return found;
}

// As torch adds it to 0, which makes -0 a 0.
template <class T, int bytes>
SNNFAST_FN typename Pool<T, bytes>::Bits added_to_zero(typename Pool<T, bytes>::Bits g) {
  using P = Pool<T, bytes>;
  using U = typename P::Element;
  constexpr U minus_zero = U(U(1) << (8 * sizeof(U) - 1));
  return P::where(~P::equals(g, minus_zero), g);
}

}  // namespace
}  // namespace snnfast
