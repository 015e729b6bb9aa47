// The loss of feature distillation for one pair of layers: the mean squared difference between the student's features,
// taken through a 1 x 1 convolution, and the teacher's, with its gradients, in one pass over both. A tile of 64 places
// of an image stays in the first-level cache between the three products of matrices.
#pragma once

#include <stdlib.h>

#include "cpu_rows.h"

namespace snnfast {
namespace {

constexpr int kFloats = kVectorBytes / int(sizeof(float));
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;  // with 4 rows of them: what the registers hold
constexpr int64_t kPlaces = 64;

int64_t padded_floats(int64_t n) { return (n + kFloats - 1) / kFloats * kFloats; }

// c [rows, columns] = a [rows, depth] * b [depth, columns], or c += it. The elements of a lie a_row and a_depth apart;
// the columns of b and c are whole vectors.
struct Product {
  const float* a;
  int64_t a_row, a_depth;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row, rows, columns, depth;
};

template <int rows, int vectors, bool add>
SNNFAST_FN void multiply_tile(const Product& m, int64_t row, int64_t column) {
  using V = Float32Vector;
  const float* a = m.a + row * m.a_row;
  const float* b = m.b + column;
  float* c = m.c + row * m.c_row + column;
  V sum[rows][vectors] = {};
  if (add)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vectors; ++j) sum[i][j] = load_bits<V>(c + i * m.c_row + j * kFloats);
  for (int64_t k = 0; k < m.depth; ++k) {
    V part[vectors];
    for (int j = 0; j < vectors; ++j) part[j] = load_bits<V>(b + k * m.b_row + j * kFloats);
    for (int i = 0; i < rows; ++i) {
      const V factor = broadcast<V>(a[i * m.a_row + k * m.a_depth]);
      for (int j = 0; j < vectors; ++j) sum[i][j] = multiply_add(factor, part[j], sum[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store_bits<false>(c + i * m.c_row + j * kFloats, sum[i][j]);
}
template <int vectors, bool add>
void multiply_columns(const Product& m, int64_t column) {
  int64_t row = 0;
  for (; row + 4 <= m.rows; row += 4) multiply_tile<4, vectors, add>(m, row, column);
  for (; row < m.rows; ++row) multiply_tile<1, vectors, add>(m, row, column);
}
template <bool add>
void multiply(const Product& m) {
  int64_t column = 0;
  for (; column + kTileVectors * kFloats <= m.columns; column += kTileVectors * kFloats)
    multiply_columns<kTileVectors, add>(m, column);
  for (; column < m.columns; column += kFloats) multiply_columns<1, add>(m, column);
}

// What a thread computes on one tile.
class FeatureScratch {
 public:
  explicit FeatureScratch(const FeatureCall& c) : turned_row(padded_floats(c.from)) {
    memory_ = static_cast<float*>(malloc((2 * c.from + c.to + turned_row) * kPlaces * sizeof(float) + 64));
    student = reinterpret_cast<float*>((uintptr_t(memory_) + 63) / 64 * 64);
    grad_student = student + c.from * kPlaces;
    difference = grad_student + c.from * kPlaces;
    turned = difference + c.to * kPlaces;
  }
  ~FeatureScratch() { free(memory_); }
  FeatureScratch(const FeatureScratch&) = delete;
  FeatureScratch& operator=(const FeatureScratch&) = delete;

  bool allocated() const { return memory_; }

  const int64_t turned_row;
  float *student, *grad_student, *difference, *turned;

 private:
  float* memory_;
};

// What a chunk of images adds to the parameters' gradients: [to, turned_row], and behind it a vector for each bias.
float* partial_gradients(const FeatureCall& c, int64_t chunk) {
  return c.partial + chunk * (padded_floats(c.from) + kFloats) * c.to;
}

// Asks for a row of the next image: what a loss reads was written long ago, in runs too short for the processor to see.
// Without it a pair takes 1.1 to 2 times as long.
SNNFAST_FN void prefetch_row(const float* row, int64_t places) {
  for (int64_t k = 0; k < places; k += 64 / int64_t(sizeof(float))) __builtin_prefetch(row + k);
}

// difference = what the convolution gave + bias - teacher for one channel; adds up its squares and itself.
SNNFAST_FN void subtract_teacher(const float* teacher, float bias, int64_t places, float* difference,
                                 Float32Vector& squares, Float32Vector& sum) {
  for (int64_t i = 0; i < places; ++i) difference[i] += bias - teacher[i];
  for (int64_t i = places; i < padded_floats(places); ++i) difference[i] = 0.0f;
  for (int64_t i = 0; i < places; i += kFloats) {
    const auto d = load_bits<Float32Vector>(difference + i);
    squares = multiply_add(d, d, squares);
    sum += d;
  }
}
SNNFAST_FN double sum_of_lanes(Float32Vector v) {
  double sum = 0;
  for (int i = 0; i < kFloats; ++i) sum += v[i];
  return sum;
}

double feature_tile(const FeatureCall& c, const FeatureScratch& s, float* grad_weight, int64_t image, int64_t place) {
  const int64_t places = smaller(kPlaces, c.places - place), columns = padded_floats(places);
  const float* const weight = static_cast<const float*>(c.weight);
  const float* const bias = static_cast<const float*>(c.bias);
  const float one_step = 1.0f / float(c.T);
  const auto row = [&](int64_t channels, int64_t channel) { return (image * channels + channel) * c.places + place; };
  const float* const student = static_cast<const float*>(c.student);
  for (int64_t i = 0; i < c.from; ++i) {
    float* const mean = s.student + i * kPlaces;
    const float* const at = student + row(c.from, i);
    for (int64_t t = 0; t < c.T; ++t) {
      const float* const step = at + t * c.images * c.from * c.places;
      prefetch_row(step + c.from * c.places, places);
      for (int64_t k = 0; k < places; ++k) mean[k] = t ? mean[k] + step[k] : step[k];
    }
    for (int64_t k = 0; k < places; ++k) mean[k] *= one_step;
    memset(mean + places, 0, (columns - places) * sizeof(float));
    if (c.mean) memcpy(static_cast<float*>(c.mean) + row(c.from, i), mean, places * sizeof(float));
  }
  multiply<false>({weight, c.from, 1, s.student, kPlaces, s.difference, kPlaces, c.to, columns, c.from});
  float* const grad_bias = grad_weight + c.to * s.turned_row;
  double squares = 0;
  Float32Vector of_channels{};  // eight of them, for adding lanes up takes longer than a channel
  for (int64_t o = 0; o < c.to; ++o) {
    Float32Vector sum = load_bits<Float32Vector>(grad_bias + o * kFloats);
    const float* const teacher = static_cast<const float*>(c.teacher) + row(c.to, o);
    prefetch_row(teacher + c.to * c.places, places);
    subtract_teacher(teacher, bias[o], places, s.difference + o * kPlaces, of_channels, sum);
    if (o % 8 == 7 || o + 1 == c.to) {
      squares += sum_of_lanes(of_channels);
      of_channels = Float32Vector{};
    }
    store_bits<false>(grad_bias + o * kFloats, sum);
  }
  if (!c.grad_weight) return squares;

  multiply<false>({weight, 1, c.from, s.difference, kPlaces, s.grad_student, kPlaces, c.from, columns, c.to});
  const float scale = one_step * float(2.0 / double(c.images * c.to * c.places));
  for (int64_t i = 0; i < c.from; ++i) {
    float* const to = static_cast<float*>(c.grad_student) + row(c.from, i);
    for (int64_t k = 0; k < places; ++k) to[k] = scale * s.grad_student[i * kPlaces + k];
  }
  for (int64_t i = 0; i < s.turned_row; ++i)
    for (int64_t k = 0; k < places; ++k)
      s.turned[k * s.turned_row + i] = i < c.from ? s.student[i * kPlaces + k] : 0.0f;
  multiply<true>(
      {s.difference, kPlaces, 1, s.turned, s.turned_row, grad_weight, s.turned_row, c.to, s.turned_row, places});
  return squares;
}

// False where memory ran out, and then nothing that was written counts.
bool feature_loss(const FeatureCall& c) {
  const int64_t chunks = smaller(c.images, kFeatureChunks), row = padded_floats(c.from);
  double squares[kFeatureChunks];
  [[maybe_unused]] const int threads = c.images * c.to * c.places < kSerialBelow ? 1 : int(smaller(c.threads, chunks));
  int allocated = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : allocated)
  {
    const FeatureScratch s(c);
    allocated = s.allocated();
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (!s.allocated()) continue;
      float* const grads = partial_gradients(c, chunk);
      memset(grads, 0, (row + kFloats) * c.to * sizeof(float));
      double sum = 0;
      for (int64_t image = chunk * c.images / chunks; image < (chunk + 1) * c.images / chunks; ++image)
        for (int64_t place = 0; place < c.places; place += kPlaces) sum += feature_tile(c, s, grads, image, place);
      squares[chunk] = sum;
    }
  }
  if (!allocated) return false;

  const double elements = double(c.images * c.to * c.places);
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += squares[chunk];
  *static_cast<float*>(c.loss) = float(total / elements);
  if (!c.grad_weight) return true;

  const float scale = float(2.0 / elements);
  for (int64_t o = 0; o < c.to; ++o) {
    float* const grad = static_cast<float*>(c.grad_weight) + o * c.from;
    float of_bias = 0;
    for (int64_t i = 0; i < c.from; ++i) grad[i] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* const part = partial_gradients(c, chunk);
      for (int64_t i = 0; i < c.from; ++i) grad[i] += part[o * row + i];
      of_bias += float(sum_of_lanes(load_bits<Float32Vector>(part + c.to * row + o * kFloats)));
    }
    for (int64_t i = 0; i < c.from; ++i) grad[i] *= scale;
    static_cast<float*>(c.grad_bias)[o] = scale * of_bias;
  }
  return true;
}

}  // namespace
}  // namespace snnfast
