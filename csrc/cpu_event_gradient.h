// The gradient of an event-driven convolution's weights, stride 1: for each input channel a list of its events, and for
// each place in the window the sum of the outputs' gradients that these events meet, 64 output channels in registers.
//
// Gradients lie in a copy with a border of zeros, so that every event has an output at every place. An item of work is
// a block of the weights over all images, so sums do not depend on the threads.
#pragma once

#include "cpu_events.h"

namespace snnfast {
namespace {

constexpr int kGradientInputs = 16;                         // input channels of an item
constexpr int64_t kGradientTileBytes = int64_t(384) << 10;  // of gradients that are read again and again

// The copy of the gradients: [block of 64 output channels][image][row][column][64].
struct GradientCopy {
  explicit GradientCopy(const EventCall& c)
      : border_h((c.kernel_h - 1) * c.dilation_h - c.padding_h),
        border_w((c.kernel_w - 1) * c.dilation_w - c.padding_w) {
    border_h = border_h < 0 ? 0 : border_h;
    border_w = border_w < 0 ? 0 : border_w;
    height = c.Ho + 2 * border_h;
    width = c.Wo + 2 * border_w;
  }
  int64_t border_h, border_w, height, width;
};

void copy_gradients(const EventCall& c, const GradientCopy& g, [[maybe_unused]] int threads) {
  const int64_t blocks = (c.O + kEventOutputs - 1) / kEventOutputs;
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t image = 0; image < c.images; ++image) {
      const int64_t first = block * kEventOutputs, n = smaller(kEventOutputs, c.O - first);
      float* const to = c.workspace + (block * c.images + image) * g.height * g.width * kEventOutputs;
      memset(to, 0, g.height * g.width * kEventOutputs * sizeof(float));
      for (int64_t y = 0; y < c.Ho; ++y)
        for (int64_t x = 0; x < c.Wo; ++x)
          memcpy(to + ((y + g.border_h) * g.width + x + g.border_w) * kEventOutputs,
                 c.grad_y + ((image * c.Ho + y) * c.Wo + x) * c.O + first, n * sizeof(float));
    }
}

// The events of some images by channel: where in these images' copied gradients the event meets the window's first
// place.
class ChannelEvents {
 public:
  explicit ChannelEvents(int64_t most) : most_(most) {
    memory_ = static_cast<char*>(malloc(kGradientInputs * most * (sizeof(float) + sizeof(uint32_t))));
    values_ = reinterpret_cast<float*>(memory_);
    places_ = reinterpret_cast<uint32_t*>(values_ + kGradientInputs * most);
  }
  ~ChannelEvents() { free(memory_); }
  ChannelEvents(const ChannelEvents&) = delete;
  ChannelEvents& operator=(const ChannelEvents&) = delete;

  bool allocated() const { return memory_; }
  const float* values(int64_t channel) const { return values_ + channel * most_; }
  const uint32_t* places(int64_t channel) const { return places_ + channel * most_; }

  void fill(const EventCall& c, const GradientCopy& g, int64_t image, int64_t images, int64_t first, int64_t n) {
    for (int64_t i = 0; i < kGradientInputs; ++i) counts[i] = 0;
    ones = true;
    for (int64_t k = 0; k < images; ++k)
      for (int64_t y = 0; y < c.H; ++y) {
        const int64_t at = (k * g.height + y + c.padding_h + g.border_h) * g.width + c.padding_w + g.border_w;
        for_each_event_of_row(c, image + k, y, first, n,
                              [&](int64_t i, int64_t x, float value) { add(i, at + x, value); });
      }
  }

  int64_t counts[kGradientInputs];
  bool ones = true;

 private:
  SNNFAST_FN void add(int64_t channel, int64_t place, float value) {
    const int64_t at = channel * most_ + counts[channel]++;
    places_[at] = uint32_t(place);
    values_[at] = value;
    ones &= value == 1.0f;
  }

  const int64_t most_;
  float* values_;
  uint32_t* places_;
  char* memory_;
};

// sum += the gradients at the events' places, `offset` further.
template <bool ones>
SNNFAST_FN void add_gradients(const float* gradients, int64_t offset, const uint32_t* places, const float* values,
                              int64_t n, float* sum) {
  using V = Float32Vector;
  constexpr int vectors = smaller_of(kEventOutputs / kEventFloats, 8), columns = vectors * kEventFloats;
  constexpr int chains = vectors < 8 ? 2 : 1;
  for (int64_t o = 0; o < kEventOutputs; o += columns) {
    const float* const from = gradients + offset * kEventOutputs + o;
    V total[chains][vectors] = {};  // of these events alone: partial sums round less than one over all images
    const auto add = [&](V(&to)[vectors], int64_t i) {
      const float* const row = from + int64_t(places[i]) * kEventOutputs;
      for (int v = 0; v < vectors; ++v) {
        const V g = load_bits<V>(row + v * kEventFloats);
        to[v] = ones ? to[v] + g : multiply_add(broadcast<V>(values[i]), g, to[v]);
      }
    };
    int64_t i = 0;
    for (; i + chains <= n; i += chains)
      for (int chain = 0; chain < chains; ++chain) add(total[chain], i + chain);
    if (i < n) add(total[0], i);
    for (int v = 0; v < vectors; ++v)
      store_bits<false>(
          sum + o + v * kEventFloats,
          load_bits<V>(sum + o + v * kEventFloats) + (chains == 2 ? total[0][v] + total[chains - 1][v] : total[0][v]));
  }
}

// The gradient [O, C, kernel_h, kernel_w], or with channels last [O, kernel_h, kernel_w, C]. False where memory ran
// out, and then nothing that was written counts.
bool event_weight_gradient(const EventCall& c) {
  const int64_t K = c.kernel_h * c.kernel_w;
  const int threads = c.images * c.O * c.Ho * c.Wo < kSerialBelow ? 1 : c.threads;
  const GradientCopy g(c);
  copy_gradients(c, g, threads);
  const int64_t places = g.height * g.width, fitting = kGradientTileBytes / (places * kEventOutputs * sizeof(float));
  const int64_t together = smaller(fitting < 1 ? 1 : fitting, c.images);
  const int64_t blocks = (c.O + kEventOutputs - 1) / kEventOutputs;
  const int64_t parts = (c.C + kGradientInputs - 1) / kGradientInputs;
  int allocated = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : allocated)
  {
    ChannelEvents events(together * c.H * c.W);
    float* const sums = static_cast<float*>(malloc(kGradientInputs * K * kEventOutputs * sizeof(float)));
    allocated = events.allocated() && sums;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < blocks * parts; ++item) {
      if (!events.allocated() || !sums) continue;
      const int64_t block = item / parts, first = item % parts * kGradientInputs;
      const int64_t n = smaller(kGradientInputs, c.C - first);
      memset(sums, 0, kGradientInputs * K * kEventOutputs * sizeof(float));
      for (int64_t image = 0; image < c.images; image += together) {
        events.fill(c, g, image, smaller(together, c.images - image), first, n);
        const float* const gradients = c.workspace + (block * c.images + image) * places * kEventOutputs;
        const auto add = events.ones ? add_gradients<true> : add_gradients<false>;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < K; ++k) {
            const int64_t offset = -(k / c.kernel_w * c.dilation_h * g.width + k % c.kernel_w * c.dilation_w);
            add(gradients, offset, events.places(i), events.values(i), events.counts[i],
                sums + (i * K + k) * kEventOutputs);
          }
      }
      const int64_t present = smaller(kEventOutputs, c.O - block * kEventOutputs);
      for (int64_t o = 0; o < present; ++o) {
        float* const to = c.grad_weight + (block * kEventOutputs + o) * c.C * K;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < K; ++k)
            to[c.weight_channels_last ? k * c.C + first + i : (first + i) * K + k] =
                sums[(i * K + k) * kEventOutputs + o];
      }
    }
    free(sums);
  }
  return allocated;
}

}  // namespace
}  // namespace snnfast
