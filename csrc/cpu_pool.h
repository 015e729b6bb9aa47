// Max-pooling of 2x2 windows that lie side by side. The backward needs which of a window's four elements was chosen,
// one byte for each output, and neither the input nor the output.
//
// Chosen is, as torch chooses, the first of the largest in the order of rows, or the last NaN where there is one. What
// comes out is that element's bits. A row is cut into the largest vectors that it fills, the last of which may overlap.
#pragma once

#include "pool_lanes.h"

namespace snnfast {
namespace {

// ---- one vector of outputs ----
// Channels last: a window's elements lie in four rows of channels.
template <class T, int bytes>
SNNFAST_FN void pool_channels(const T* const (&from)[4], T* to, uint8_t* chosen, int64_t i) {
  using P = Pool<T, bytes>;
  for (int k = 0; k < 4; ++k) __builtin_prefetch(reinterpret_cast<const char*>(from[k] + i) + kPrefetchBytes);
  const typename P::Bits window[4] = {P::load(from[0] + i), P::load(from[1] + i), P::load(from[2] + i),
                                      P::load(from[3] + i)};
  typename P::Bits which;
  P::store(to + i, largest<T, bytes>(window, which));
  if (chosen) P::store_bytes(chosen + i, which);
}
template <class T, int bytes>
SNNFAST_FN void unpool_channels(const T* grad, const uint8_t* chosen, T* const (&to)[4], int64_t i) {
  using P = Pool<T, bytes>;
  const auto g = added_to_zero<T, bytes>(P::load(grad + i));
  const auto which = P::load_bytes(chosen + i);
  for (int k = 0; k < 4; ++k) P::store(to[k] + i, P::where(P::equals(which, k), g));
}

// Channels first: they are neighbours in two rows.
template <class T, int bytes>
SNNFAST_FN void pool_pairs(const T* top, const T* bottom, T* to, uint8_t* chosen, int64_t i) {
  using P = Pool<T, bytes>;
  typename P::Bits window[4], which;
  if constexpr (P::kLanes == 1) {
    for (int k = 0; k < 2; ++k) window[k] = P::load(top + 2 * i + k), window[2 + k] = P::load(bottom + 2 * i + k);
  } else {
    split_runs<1>(P::load(top + 2 * i), P::load(top + 2 * i + P::kLanes), window[0], window[1]);
    split_runs<1>(P::load(bottom + 2 * i), P::load(bottom + 2 * i + P::kLanes), window[2], window[3]);
  }
  P::store(to + i, largest<T, bytes>(window, which));
  if (chosen) P::store_bytes(chosen + i, which);
}
template <class T, int bytes>
SNNFAST_FN void unpool_pairs(const T* grad, const uint8_t* chosen, T* top, T* bottom, int64_t i) {
  using P = Pool<T, bytes>;
  const auto g = added_to_zero<T, bytes>(P::load(grad + i));
  const auto which = P::load_bytes(chosen + i);
  typename P::Bits window[4];
  for (int k = 0; k < 4; ++k) window[k] = P::where(P::equals(which, k), g);
  if constexpr (P::kLanes == 1) {
    for (int k = 0; k < 2; ++k) P::store(top + 2 * i + k, window[k]), P::store(bottom + 2 * i + k, window[2 + k]);
  } else {
    join_runs<1>(window[0], window[1], window[0], window[1]);
    join_runs<1>(window[2], window[3], window[2], window[3]);
    for (int k = 0; k < 2; ++k) {
      P::store(top + 2 * i + k * P::kLanes, window[k]);
      P::store(bottom + 2 * i + k * P::kLanes, window[2 + k]);
    }
  }
}

// Rows of `run` outputs, fewer than a vector has lanes, with nothing left over at the right and below: top rows and
// bottom rows follow each other without gaps.
template <class T, int run>
SNNFAST_FN void pool_short_rows(const T* from, T* to, uint8_t* chosen, int64_t i) {
  using P = Pool<T, kVectorBytes>;
  using Bits = typename P::Bits;
  const T* const x = from + 4 * i;
  Bits even[2], odd[2], window[4], which;
  for (int k = 0; k < 2; ++k)
    split_runs<1>(P::load(x + 2 * k * P::kLanes), P::load(x + (2 * k + 1) * P::kLanes), even[k], odd[k]);
  split_runs<run>(even[0], even[1], window[0], window[2]);
  split_runs<run>(odd[0], odd[1], window[1], window[3]);
  P::store(to + i, largest<T, kVectorBytes>(window, which));
  if (chosen) P::store_bytes(chosen + i, which);
}
template <class T, int run>
SNNFAST_FN void unpool_short_rows(const T* grad, const uint8_t* chosen, T* to, int64_t i) {
  using P = Pool<T, kVectorBytes>;
  using Bits = typename P::Bits;
  const Bits g = added_to_zero<T, kVectorBytes>(P::load(grad + i)), which = P::load_bytes(chosen + i);
  Bits window[4], even[2], odd[2];
  for (int k = 0; k < 4; ++k) window[k] = P::where(P::equals(which, k), g);
  join_runs<run>(window[0], window[2], even[0], even[1]);
  join_runs<run>(window[1], window[3], odd[0], odd[1]);
  for (int k = 0; k < 2; ++k) {
    Bits a, b;
    join_runs<1>(even[k], odd[k], a, b);
    P::store(to + 4 * i + 2 * k * P::kLanes, a);
    P::store(to + 4 * i + (2 * k + 1) * P::kLanes, b);
  }
}

// ---- rows ----
// Calls f with the size of the largest vector, in bytes, that n elements fill; 16 bytes are the smallest.
template <class T, int bytes = kVectorBytes, class F>
SNNFAST_FN void with_vector_for(int64_t n, F f) {
  if constexpr (bytes >= 16) {
    if (n * int64_t(sizeof(T)) >= bytes) return f(Pool<T, bytes>());
    return with_vector_for<T, bytes / 2>(n, f);
  } else {
    f(Pool<T, sizeof(T)>());
  }
}
// Calls f(i) for vectors that cover n elements, of which they fill at least one: the last may overlap the one before,
// and writes there what that wrote. One call, for f is inlined.
template <int lanes, class F>
SNNFAST_FN void for_each_vector(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += lanes) f(smaller(i, n - lanes));
}

// Row r of the outputs, counted over all planes.
template <class T, int bytes>
SNNFAST_FN void pool_row(const PoolCall& c, int64_t r) {
  constexpr int lanes = Pool<T, bytes>::kLanes;
  const int64_t rows = c.H / 2, columns = c.W / 2, C = c.C;
  const T* const top = static_cast<const T*>(c.x) + (r / rows * c.H + r % rows * 2) * c.W * C;
  const T* const bottom = top + c.W * C;
  T* const y = static_cast<T*>(c.y) + r * columns * C;
  uint8_t* const chosen = c.chosen ? static_cast<uint8_t*>(c.chosen) + r * columns * C : nullptr;
  if (C == 1)
    return for_each_vector<lanes>(
        columns, [&](int64_t i) __attribute__((always_inline)) { pool_pairs<T, bytes>(top, bottom, y, chosen, i); });
  for (int64_t j = 0; j < columns; ++j) {
    const T* const from[4] = {top + 2 * j * C, top + (2 * j + 1) * C, bottom + 2 * j * C, bottom + (2 * j + 1) * C};
    for_each_vector<lanes>(C, [&](int64_t i) __attribute__((always_inline)) {
      pool_channels<T, bytes>(from, y + j * C, chosen ? chosen + j * C : nullptr, i);
    });
  }
}
template <class T, int bytes>
SNNFAST_FN void unpool_row(const PoolCall& c, int64_t r) {
  constexpr int lanes = Pool<T, bytes>::kLanes;
  const int64_t rows = c.H / 2, columns = c.W / 2, C = c.C, row = c.W * C;
  T* const top = static_cast<T*>(c.grad_x) + (r / rows * c.H + r % rows * 2) * row;
  T* const bottom = top + row;
  const T* const grad = static_cast<const T*>(c.grad_y) + r * columns * C;
  const uint8_t* const chosen = static_cast<const uint8_t*>(c.chosen) + r * columns * C;
  if (C == 1)
    for_each_vector<lanes>(columns, [&](int64_t i) __attribute__((always_inline)) {
      unpool_pairs<T, bytes>(grad, chosen, top, bottom, i);
    });
  else
    for (int64_t j = 0; j < columns; ++j) {
      T* const to[4] = {top + 2 * j * C, top + (2 * j + 1) * C, bottom + 2 * j * C, bottom + (2 * j + 1) * C};
      for_each_vector<lanes>(C, [&](int64_t i) __attribute__((always_inline)) {
        unpool_channels<T, bytes>(grad + j * C, chosen + j * C, to, i);
      });
    }
  if (c.W % 2) {  // what no window covers
    memset(top + row - C, 0, C * sizeof(T));
    memset(bottom + row - C, 0, C * sizeof(T));
  }
  if (c.H % 2 && r % rows == rows - 1) memset(bottom + row, 0, row * sizeof(T));
}

// Calls f with the length of short rows, if they are and this is a power of two.
template <int n>
struct Number {
  static constexpr int value = n;
};
template <class T, int run = 1, class F>
SNNFAST_FN void with_short_rows(const PoolCall& c, F f) {
  if constexpr (run < kVectorBytes / int(sizeof(T))) {
    if (c.C > 1 || c.H % 2 || c.W % 2) return;
    if (c.W != 2 * run) return with_short_rows<T, 2 * run>(c, f);
    f(Number<run>());
  }
}

// Calls row(r), which takes a row of outputs, or where rows are short short_rows<run>(i), which takes a vector of them,
// and row(r) for the last rows that do not fill one.
template <class T, class Row, class ShortRows>
SNNFAST_FN void for_each_row(const PoolCall& c, Row row, ShortRows short_rows) {
  const int64_t rows = c.planes * (c.H / 2), columns = c.W / 2;
  [[maybe_unused]] const int threads = c.planes * c.H * c.W * c.C < kSerialBelow ? 1 : int(smaller(c.threads, rows));
  constexpr int64_t lanes = kVectorBytes / int64_t(sizeof(T));
  int64_t first = 0;
  with_short_rows<T>(c, [&](auto run) __attribute__((always_inline)) {
    constexpr int length = decltype(run)::value;
    const int64_t vectors = rows * columns / lanes;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t v = 0; v < vectors; ++v) short_rows(Number<length>(), v * lanes);
    first = vectors * lanes / columns;
  });
  if (first == rows) return;
  with_vector_for<T>(c.C > 1 ? c.C : columns, [&](auto vector) __attribute__((always_inline)) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && first == 0)
    for (int64_t r = first; r < rows; ++r) row(vector, r);
  });
}

template <class T>
void pool(const PoolCall& c) {
  for_each_row<T>(
      c, [&](auto vector, int64_t r) __attribute__((always_inline)) { pool_row<T, decltype(vector)::kBytes>(c, r); },
      [&](auto run, int64_t i) __attribute__((always_inline)) {
        pool_short_rows<T, decltype(run)::value>(static_cast<const T*>(c.x), static_cast<T*>(c.y),
                                                 static_cast<uint8_t*>(c.chosen), i);
      });
}
template <class T>
void unpool(const PoolCall& c) {
  for_each_row<T>(
      c, [&](auto vector, int64_t r) __attribute__((always_inline)) { unpool_row<T, decltype(vector)::kBytes>(c, r); },
      [&](auto run, int64_t i) __attribute__((always_inline)) {
        unpool_short_rows<T, decltype(run)::value>(static_cast<const T*>(c.grad_y),
                                                   static_cast<const uint8_t*>(c.chosen), static_cast<T*>(c.grad_x), i);
      });
}

void max_pool(const PoolCall& c, bool backward) {
  switch (c.dtype) {
    case kFloat32:
      return backward ? unpool<float>(c) : pool<float>(c);
    case kFloat64:
      return backward ? unpool<double>(c) : pool<double>(c);
    case kBFloat16:
      return backward ? unpool<BFloat16>(c) : pool<BFloat16>(c);
    case kFloat16:  // whose bits the backward moves just so
      return backward ? unpool<BFloat16>(c) : pool<Float16>(c);
  }
}

}  // namespace
}  // namespace snnfast
