// A convolution that reads the inputs that are not 0 and nothing else: what a spiking network's convolution needs where
// few neurons fire. For each place and block of input channels a list of events, the channels that are not 0; and for
// each output the sum of the weights' rows that the events of its window name, 64 output channels in registers.
//
// A sum's order depends on the shape and the events alone, not on threads, and neither does a bit of it.
#pragma once

#include <stdlib.h>

#include "cpu_rows.h"

namespace snnfast {
namespace {

constexpr int kEventFloats = kVectorBytes / int(sizeof(float));
constexpr int kVectorsOfUnit = kEventUnit / kEventFloats;  // a unit is 16 output channels
constexpr int smaller_of(int a, int b) { return a < b ? a : b; }
constexpr int kMostUnits = kVectorBytes == 16 ? 2 : 4;      // at once, in registers
constexpr int64_t kEventScratchBytes = int64_t(384) << 10;  // of lists; with the weights' block in the second cache

// ---- weights ----
// [block of 64 output channels][block of input channels][place in the window][input channel][output channel], and
// behind them the bias. Output channels are filled up with zeros to whole units.
void pack_event_weights(const EventCall& c, const float* weight, const float* bias, float* packed) {
  const int64_t K = c.kernel_h * c.kernel_w, block = event_inputs(K), padded = event_padded(c.O);
#pragma omp parallel for num_threads(c.threads) if (c.threads > 1 && c.O * c.C * K >= kSerialBelow) schedule(dynamic)
  for (int64_t first = 0; first < padded; first += kEventUnit) {
    const int64_t ob = first / kEventOutputs * kEventOutputs, width = smaller(kEventOutputs, padded - ob);
    const int64_t present = smaller(kEventUnit, c.O - first);
    float* const to = packed + ob * c.C * K + (first - ob);
    for (int64_t begin = 0; begin < c.C; begin += block) {
      const int64_t channels = smaller(block, c.C - begin);
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t k = 0; k < K; ++k) {
          float* const row = to + (begin * K + k * channels + i) * width;
          const int64_t at = c.weight_channels_last ? k * c.C + begin + i : (begin + i) * K + k;
          const float* const from = weight + first * c.C * K + at;
          for (int64_t o = 0; o < kEventUnit; ++o) row[o] = o < present ? from[o * c.C * K] : 0.0f;
        }
    }
  }
  for (int64_t o = 0; o < padded; ++o) packed[padded * c.C * K + o] = bias && o < c.O ? bias[o] : 0.0f;
}

// ---- events ----
// Bit i: lane i is not 0.
SNNFAST_FN uint32_t lanes_with_events(Float32Vector v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(bits_as<__m512>(v), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(bits_as<__m256>(v), _mm256_setzero_ps(), _CMP_NEQ_UQ));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpneq_ps(bits_as<__m128>(v), _mm_setzero_ps()));
#else
  uint32_t found = 0;
  for (int i = 0; i < kEventFloats; ++i) found |= uint32_t(v[i] != 0) << i;
  return found;
#endif
}

// Calls event(i) where from[i] is not 0.
template <class F>
SNNFAST_FN void for_each_event(const float* from, int64_t n, F event) {
  int64_t i = 0;
  for (; i + kEventFloats <= n; i += kEventFloats)
    for (uint32_t lanes = lanes_with_events(load_bits<Float32Vector>(from + i)); lanes; lanes &= lanes - 1)
      event(i + __builtin_ctz(lanes));
  for (; i < n; ++i)
    if (from[i] != 0) event(i);
}

// Calls event(i, x, value) where the value of channel first + i, i < n, in row y and column x of an image is not 0.
template <class F>
SNNFAST_FN void for_each_event_of_row(const EventCall& c, int64_t image, int64_t y, int64_t first, int64_t n, F event) {
  const float* const from = c.x + image * c.C * c.H * c.W;
  if (c.channels_last)
    for (int64_t x = 0; x < c.W; ++x) {
      const float* const place = from + (y * c.W + x) * c.C + first;
      for_each_event(place, n, [&](int64_t i) { event(i, x, place[i]); });
    }
  else
    for (int64_t i = 0; i < n; ++i) {
      const float* const line = from + ((first + i) * c.H + y) * c.W;
      for_each_event(line, c.W, [&](int64_t x) { event(i, x, line[x]); });
    }
}

int64_t count_events(const float* x, int64_t n, int threads) {
  int64_t found = 0;
  [[maybe_unused]] const int team = n < kSerialBelow ? 1 : threads;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : found) schedule(static)
  for (int64_t begin = 0; begin < n; begin += kSerialBelow) {
    const int64_t end = smaller(begin + kSerialBelow, n);
    int64_t i = begin;
    for (; i + kEventFloats <= end; i += kEventFloats)
      found += __builtin_popcount(lanes_with_events(load_bits<Float32Vector>(x + i)));
    for (; i < end; ++i) found += x[i] != 0;
  }
  return found;
}

// What an item of work is: some images, and rows of their outputs.
struct EventItem {
  int64_t image, images, row, rows;
};
int64_t rows_read(const EventCall& c, int64_t rows) {
  return (rows - 1) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1;
}

// The events of an item for a block of input channels, by place: the padding has places too, and no events.
class Events {
 public:
  static constexpr int64_t kTogether = 16;  // events that are copied at once, however many there are

  Events(const EventCall& c, int64_t most_places)
      : width(c.W + 2 * c.padding_w), block(event_inputs(c.kernel_h * c.kernel_w)) {
    const int64_t most = most_places * block + kTogether;
    memory_ = static_cast<char*>(malloc(most * (sizeof(float) + sizeof(uint16_t)) + most_places));
    values = reinterpret_cast<float*>(memory_);
    channels = reinterpret_cast<uint16_t*>(values + most);
    counts = reinterpret_cast<uint8_t*>(channels + most);
  }
  ~Events() { free(memory_); }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  static int64_t bytes_of_place(const EventCall& c) {
    return event_inputs(c.kernel_h * c.kernel_w) * (sizeof(float) + sizeof(uint16_t)) + 1;
  }
  bool allocated() const { return memory_; }

  // Of channels [first, first + n). Whether every value is 1.
  bool fill(const EventCall& c, const EventItem& item, int64_t first, int64_t n) {
    const int64_t rows = rows_read(c, item.rows);
    memset(counts, 0, item.images * rows * width);
    ones_ = true;
    for (int64_t k = 0; k < item.images; ++k)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t y = item.row * c.stride_h + r - c.padding_h;
        if (y < 0 || y >= c.H) continue;
        const int64_t at = (k * rows + r) * width + c.padding_w;
        for_each_event_of_row(c, item.image + k, y, first, n,
                              [&](int64_t i, int64_t x, float value) { add(at + x, i, value); });
      }
    return ones_;
  }

  const int64_t width, block;
  float* values;
  uint16_t* channels;
  uint8_t* counts;

 private:
  SNNFAST_FN void add(int64_t place, int64_t channel, float value) {
    const int64_t at = place * block + counts[place]++;
    channels[at] = uint16_t(channel);
    values[at] = value;
    ones_ &= value == 1.0f;
  }

  bool ones_ = true;
  char* memory_;
};

// ---- sums ----
// The events of one output's window, and the rows of weights that they meet. Lists are short and of any length: a
// branch for each would be guessed wrongly more often than it costs to copy sixteen at once and count on.
class Window {
 public:
  explicit Window(const EventCall& c, const Events& events, int64_t channels) : places_(c.kernel_h * c.kernel_w) {
    for (int64_t k = 0; k < places_; ++k)
      offset_[k] = k / c.kernel_w * c.dilation_h * events.width + k % c.kernel_w * c.dilation_w;
    channels_ = channels;
  }

  template <bool ones>
  SNNFAST_FN void gather(const Events& events, int64_t corner) {
    typedef uint16_t Together __attribute__((vector_size(Events::kTogether * sizeof(uint16_t))));
    n = 0;
    for (int64_t k = 0; k < places_; ++k) {
      const int64_t place = corner + offset_[k], found = events.counts[place];
      const uint16_t* const channels = events.channels + place * events.block;
      const float* const from = events.values + place * events.block;
      int64_t i = 0;
      do {
        store_bits<false>(rows + n + i, load_bits<Together>(channels + i) + uint16_t(k * channels_));
        if (!ones) memcpy(values + n + i, from + i, Events::kTogether * sizeof(float));
        i += Events::kTogether;
      } while (i < found);
      n += found;
    }
  }

  static constexpr int64_t kMostPlaces = 80;
  int64_t n = 0;
  uint16_t rows[kMostEventsOfWindow + Events::kTogether];
  float values[kMostEventsOfWindow + Events::kTogether];

 private:
  int64_t places_, channels_, offset_[kMostPlaces];
};

template <int units, bool ones>
SNNFAST_FN void event_sums(const Window& window, const float* weight, int64_t width, const float* start, float* to) {
  constexpr int vectors = units * kVectorsOfUnit, chains = vectors < 8 ? 2 : 1;
  using V = Float32Vector;
  V sum[chains][vectors] = {};
  for (int v = 0; v < vectors; ++v) sum[0][v] = load_bits<V>(start + v * kEventFloats);
  const auto add = [&](V(&to)[vectors], int64_t i) {
    const float* const row = weight + window.rows[i] * width;
    for (int v = 0; v < vectors; ++v) {
      const V w = load_bits<V>(row + v * kEventFloats);
      to[v] = ones ? to[v] + w : multiply_add(broadcast<V>(window.values[i]), w, to[v]);
    }
  };
  int64_t i = 0;
  for (; i + chains <= window.n; i += chains)
    for (int chain = 0; chain < chains; ++chain) add(sum[chain], i + chain);
  if (i < window.n) add(sum[0], i);
  for (int v = 0; v < vectors; ++v)
    store_bits<false>(to + v * kEventFloats, chains == 2 ? sum[0][v] + sum[chains - 1][v] : sum[0][v]);
}

// All outputs of an item for one block of input channels and `units` units of output channels from `o` on.
template <int units, bool ones>
void event_outputs(const EventCall& c, const EventItem& item, const Events& events, const float* weight,
                   int64_t channels, int64_t width, int64_t o, bool first) {
  const float* const bias = c.weight + event_padded(c.O) * c.C * c.kernel_h * c.kernel_w + o;
  const int64_t present = smaller(units * kEventUnit, c.O - o), rows = rows_read(c, item.rows);
  Window window(c, events, channels);
  for (int64_t image = 0; image < item.images; ++image)
    for (int64_t y = 0; y < item.rows; ++y)
      for (int64_t x = 0; x < c.Wo; ++x) {
        window.gather<ones>(events, (image * rows + y * c.stride_h) * events.width + x * c.stride_w);
        float* const to = c.y + (((item.image + image) * c.Ho + item.row + y) * c.Wo + x) * c.O + o;
        if (present == units * kEventUnit) {
          event_sums<units, ones>(window, weight, width, first ? bias : to, to);
        } else {
          float part[units * kEventUnit] = {};
          if (!first) memcpy(part, to, present * sizeof(float));
          event_sums<units, ones>(window, weight, width, first ? bias : part, part);
          memcpy(to, part, present * sizeof(float));
        }
      }
}

template <bool ones>
void event_block(const EventCall& c, const EventItem& item, const Events& events, int64_t begin, int64_t channels) {
  const int64_t K = c.kernel_h * c.kernel_w, padded = event_padded(c.O);
  for (int64_t ob = 0; ob < padded; ob += kEventOutputs) {
    const int64_t width = smaller(kEventOutputs, padded - ob);
    const float* const weight = c.weight + ob * c.C * K + begin * K * width;
    for (int64_t o = 0; o < width;) {
      const int64_t units = smaller(kMostUnits, (width - o) / kEventUnit);
      const auto run = units == 1   ? event_outputs<1, ones>
                       : units == 2 ? event_outputs<2, ones>
                       : units == 3 ? event_outputs<smaller_of(3, kMostUnits), ones>
                                    : event_outputs<kMostUnits, ones>;
      run(c, item, events, weight + o, channels, width, ob + o, begin == 0);
      o += units * kEventUnit;
    }
  }
}

// False where memory ran out, and then nothing that was written counts.
bool event_convolve(const EventCall& c) {
  const int64_t block = event_inputs(c.kernel_h * c.kernel_w), width = c.W + 2 * c.padding_w;
  // Small images together, large ones in strips; at least four items a thread where there are so many rows.
  const int64_t bytes_of_place = Events::bytes_of_place(c), share = 4 * c.threads;
  int64_t rows = c.Ho, images = 1;
  while (rows > 1 && (rows_read(c, rows) * width * bytes_of_place > kEventScratchBytes ||
                      c.images * ((c.Ho + rows - 1) / rows) < share))
    rows = (rows + 1) / 2;
  if (rows == c.Ho)
    while (2 * images * share <= c.images &&
           2 * images * rows_read(c, rows) * width * bytes_of_place <= kEventScratchBytes)
      images *= 2;
  const int64_t strips = (c.Ho + rows - 1) / rows, groups = (c.images + images - 1) / images;
  [[maybe_unused]] const int threads =
      c.images * c.O * c.Ho * c.Wo < kSerialBelow ? 1 : int(smaller(c.threads, strips * groups));
  int allocated = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : allocated)
  {
    Events events(c, images * rows_read(c, rows) * width);
    allocated = events.allocated();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < strips * groups; ++i) {
      if (!events.allocated()) continue;
      EventItem item;
      item.image = i / strips * images;
      item.images = smaller(images, c.images - item.image);
      item.row = i % strips * rows;
      item.rows = smaller(rows, c.Ho - item.row);
      for (int64_t begin = 0; begin < c.C; begin += block) {
        const int64_t channels = smaller(block, c.C - begin);
        if (events.fill(c, item, begin, channels))
          event_block<true>(c, item, events, begin, channels);
        else
          event_block<false>(c, item, events, begin, channels);
      }
    }
  }
  return allocated;
}

}  // namespace
}  // namespace snnfast
