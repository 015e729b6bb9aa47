// Tensors of two values, such as spikes, as one bit an element: element i is bit i % 8 of byte i / 8. One of the values
// is 0; the other is known by its bits alone, so one code serves every number type of a size, and what comes back is
// what went in, bit for bit.
#pragma once

#include "cpu_rows.h"

namespace snnfast {
namespace {

constexpr int64_t kWord = 64;            // elements
constexpr int64_t kBitsBlock = 1 << 14;  // elements between looks at whether another thread has given up

// The bits of a word's elements that are `one`; `other` collects bits of those that are neither that nor 0.
template <class U>
SNNFAST_FN uint64_t ones_of_word(const U* from, U one, uint64_t& other) {
  uint64_t ones = 0, zeros = 0;
#if defined(__AVX512BW__)
  constexpr int lanes = 64 / sizeof(U);
  const __m512i nothing = _mm512_setzero_si512();
  for (int k = 0; k < int(kWord); k += lanes) {
    const __m512i v = _mm512_loadu_si512(from + k);
    if constexpr (sizeof(U) == 2) {
      ones |= uint64_t(_mm512_cmpeq_epi16_mask(v, _mm512_set1_epi16(short(one)))) << k;
      zeros |= uint64_t(_mm512_cmpeq_epi16_mask(v, nothing)) << k;
    } else if constexpr (sizeof(U) == 4) {
      ones |= uint64_t(_mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(int(one)))) << k;
      zeros |= uint64_t(_mm512_cmpeq_epi32_mask(v, nothing)) << k;
    } else {
      ones |= uint64_t(_mm512_cmpeq_epi64_mask(v, _mm512_set1_epi64(int64_t(one)))) << k;
      zeros |= uint64_t(_mm512_cmpeq_epi64_mask(v, nothing)) << k;
    }
  }
#elif defined(__AVX2__)
  constexpr int lanes = 32 / sizeof(U);
  const __m256i nothing = _mm256_setzero_si256();
  const auto at = [&](int k) __attribute__((always_inline)) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
  };
  if constexpr (sizeof(U) == 2) {
    const __m256i value = _mm256_set1_epi16(short(one));
    for (int k = 0; k < int(kWord); k += 2 * lanes) {
      // Packing goes within halves of a register, so the quarters come out as 0, 2, 1, 3.
      const auto bits = [&](__m256i a, __m256i b) __attribute__((always_inline)) {
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
        return uint64_t(uint32_t(_mm256_movemask_epi8(bytes)));
      };
      const __m256i a = at(k), b = at(k + lanes);
      ones |= bits(_mm256_cmpeq_epi16(a, value), _mm256_cmpeq_epi16(b, value)) << k;
      zeros |= bits(_mm256_cmpeq_epi16(a, nothing), _mm256_cmpeq_epi16(b, nothing)) << k;
    }
  } else {
    for (int k = 0; k < int(kWord); k += lanes) {
      const __m256i v = at(k);
      if constexpr (sizeof(U) == 4) {
        const auto bits = [](__m256i mask) { return uint64_t(unsigned(_mm256_movemask_ps((__m256)mask))); };
        ones |= bits(_mm256_cmpeq_epi32(v, _mm256_set1_epi32(int(one)))) << k;
        zeros |= bits(_mm256_cmpeq_epi32(v, nothing)) << k;
      } else {
        const auto bits = [](__m256i mask) { return uint64_t(unsigned(_mm256_movemask_pd((__m256d)mask))); };
        ones |= bits(_mm256_cmpeq_epi64(v, _mm256_set1_epi64x(int64_t(one)))) << k;
        zeros |= bits(_mm256_cmpeq_epi64(v, nothing)) << k;
      }
    }
  }
#elif defined(__SSE2__)
  const auto at = [&](int k) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
  };
  const __m128i nothing = _mm_setzero_si128();
  if constexpr (sizeof(U) == 8) {
    for (int k = 0; k < int(kWord); ++k) {
      ones |= uint64_t(from[k] == one) << k;
      zeros |= uint64_t(from[k] == 0) << k;
    }
  } else {
    constexpr int lanes = 16 / sizeof(U);
    for (int k = 0; k < int(kWord); k += 16) {
      const auto bits = [&](__m128i value) __attribute__((always_inline)) {
        if constexpr (sizeof(U) == 2) {
          const __m128i low = _mm_cmpeq_epi16(at(k), value), high = _mm_cmpeq_epi16(at(k + lanes), value);
          return uint64_t(unsigned(_mm_movemask_epi8(_mm_packs_epi16(low, high))));
        } else {
          const __m128i low = _mm_packs_epi32(_mm_cmpeq_epi32(at(k), value), _mm_cmpeq_epi32(at(k + lanes), value));
          const __m128i high =
              _mm_packs_epi32(_mm_cmpeq_epi32(at(k + 2 * lanes), value), _mm_cmpeq_epi32(at(k + 3 * lanes), value));
          return uint64_t(unsigned(_mm_movemask_epi8(_mm_packs_epi16(low, high))));
        }
      };
      ones |= bits(sizeof(U) == 2 ? _mm_set1_epi16(short(one)) : _mm_set1_epi32(int(one))) << k;
      zeros |= bits(nothing) << k;
    }
  }
#else
  for (int k = 0; k < int(kWord); ++k) {
    ones |= uint64_t(from[k] == one) << k;
    zeros |= uint64_t(from[k] == 0) << k;
  }
#endif
  other |= ~(ones | zeros);
  return ones;
}

// Whether the elements begin to end, packed to `bits`, are all 0 or `one`. begin is a whole word; the last word's
// missing elements count as 0.
template <class U>
bool pack_block(const U* from, int64_t begin, int64_t end, U one, uint8_t* bits) {
  uint64_t other = 0;
  int64_t i = begin;
  for (; i + kWord <= end; i += kWord) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + i) + kPrefetchBytes);
    const uint64_t word = ones_of_word(from + i, one, other);
    memcpy(bits + i / 8, &word, sizeof(word));
  }
  if (i < end) {
    U rest[kWord] = {};
    memcpy(rest, from + i, (end - i) * sizeof(U));
    const uint64_t word = ones_of_word(rest, one, other);
    memcpy(bits + i / 8, &word, sizeof(word));
  }
  return !other;
}

// The first element that is not 0; anything where all are.
template <class U>
U first_value(const U* from, int64_t n) {
  int64_t i = 0;
  for (U any = 0; i + kWord <= n; i += kWord) {
    for (int k = 0; k < int(kWord); ++k) any |= from[i + k];
    if (any) break;
  }
  while (i < n && !from[i]) ++i;
  return i < n ? from[i] : U(1);
}

int threads_for_bits(int64_t blocks, int threads) { return blocks < 3 ? 1 : int(smaller(blocks, threads)); }

template <class U>
bool pack_all(const U* from, int64_t n, int threads, uint8_t* bits, uint64_t* one_bits) {
  const U one = first_value(from, n);
  *one_bits = one;
  // What is no such tensor shows at its beginning, before any other thread is asked.
  if (!pack_block(from, 0, smaller(n, kBitsBlock), one, bits)) return false;
  const int64_t blocks = (n + kBitsBlock - 1) / kBitsBlock;
  threads = threads_for_bits(blocks, threads);
  int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 1; b < blocks; ++b) {
    if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) continue;
    if (!pack_block(from, b * kBitsBlock, smaller(n, (b + 1) * kBitsBlock), one, bits))
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  }
  return !failed;
}

// Lanes of a vector whose bits can be told apart within one lane's own bits.
template <class U>
struct BitLanes {
  static constexpr int kLanes = kVectorBytes / int(sizeof(U)) < 16 ? kVectorBytes / int(sizeof(U)) : 16;
  typedef U Vector __attribute__((vector_size(sizeof(U) * kLanes)));
};

template <class U>
SNNFAST_FN void unpack_word(uint64_t word, U one, U* to) {
  using V = typename BitLanes<U>::Vector;
  constexpr int lanes = BitLanes<U>::kLanes;
  V lane;
  for (int k = 0; k < lanes; ++k) lane[k] = U(1) << k;
  for (int k = 0; k < int(kWord); k += lanes) {
    const U part = U(word >> k);
    const V mask = (V)(((V{} + part) & lane) != 0);
    const V v = mask & one;
    memcpy(to + k, &v, sizeof(v));
  }
}

template <class U>
void unpack_all(const uint8_t* bits, int64_t n, int threads, uint64_t one_bits, U* to) {
  const U one = U(one_bits);
  const int64_t blocks = (n + kBitsBlock - 1) / kBitsBlock;
  threads = threads_for_bits(blocks, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = smaller(n, (b + 1) * kBitsBlock);
    int64_t i = b * kBitsBlock;
    uint64_t word;
    for (; i + kWord <= end; i += kWord) {
      memcpy(&word, bits + i / 8, sizeof(word));
      unpack_word(word, one, to + i);
    }
    if (i < end) {
      U rest[kWord];
      memcpy(&word, bits + i / 8, sizeof(word));
      unpack_word(word, one, rest);
      memcpy(to + i, rest, (end - i) * sizeof(U));
    }
  }
}

bool pack_bits(const BitsCall& c, uint64_t* one) {
  uint8_t* bits = static_cast<uint8_t*>(c.bits);
  switch (c.element_bytes) {
    case 2:
      return pack_all(static_cast<const uint16_t*>(c.elements), c.n, c.threads, bits, one);
    case 4:
      return pack_all(static_cast<const uint32_t*>(c.elements), c.n, c.threads, bits, one);
    case 8:
      return pack_all(static_cast<const uint64_t*>(c.elements), c.n, c.threads, bits, one);
  }
  return false;
}

void unpack_bits(const BitsCall& c) {
  const uint8_t* bits = static_cast<const uint8_t*>(c.bits);
  switch (c.element_bytes) {
    case 2:
      return unpack_all(bits, c.n, c.threads, c.one, static_cast<uint16_t*>(c.elements));
    case 4:
      return unpack_all(bits, c.n, c.threads, c.one, static_cast<uint32_t*>(c.elements));
    case 8:
      return unpack_all(bits, c.n, c.threads, c.one, static_cast<uint64_t*>(c.elements));
  }
}

}  // namespace
}  // namespace snnfast
