// Every CPU kernel of the baseline on the same random numbers, whatever processor this is compiled for: forward results
// as hashes, for they must have the same bits everywhere, and gradients as values. See check.py.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "cpu.h"

// The emulator's system calls for memory are not to be relied on: all of it comes from here, and each case starts anew.
alignas(64) static char arena[64 << 20];
static size_t used = 0;
extern "C" {
void* malloc(size_t n) {
  used = (used + 63) & ~size_t(63);
  void* const p = arena + used;
  used += n;
  if (used > sizeof arena) __builtin_trap();
  return p;
}
void free(void*) {}
void* calloc(size_t a, size_t b) { return memset(malloc(a * b), 0, a * b); }
void* realloc(void* old, size_t n) { return old ? memcpy(malloc(n), old, n) : malloc(n); }
}
void* operator new(size_t n) { return malloc(n); }
void operator delete(void*) noexcept {}
void operator delete(void*, size_t) noexcept {}

using namespace snnfast;

static FILE *text, *binary;
static const CpuKernels& kernels = cpu_kernels_baseline;
static int cases = 0;
static uint64_t seed = 1;

static double uniform(double low = 0, double high = 1) {
  seed = seed * 6364136223846793005ull + 1442695040888963407ull;
  return low + (high - low) * (double(seed >> 11) / 9007199254740992.0);
}

static int bytes_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
static int state_of(int dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

struct Array {
  Array(int dtype, int64_t n) : dtype(dtype), n(n), memory(n * bytes_of(dtype), 0x55) {}
  void* data() { return memory.data(); }
  float* floats() { return reinterpret_cast<float*>(memory.data()); }
  void set(int64_t i, double value) {
    const float single = float(value);
    uint32_t u;
    memcpy(&u, &single, 4);
    const int exponent = int(u >> 23 & 255) - 112;
    const uint16_t half = exponent <= 0 ? 0 : uint16_t((u >> 16 & 0x8000) | exponent << 10 | (u >> 13 & 0x3ff));
    const uint16_t narrow = dtype == kBFloat16 ? uint16_t(u >> 16) : half;
    if (dtype == kFloat64) memcpy(data(i), &value, 8);
    if (dtype == kFloat32) memcpy(data(i), &single, 4);
    if (bytes_of(dtype) == 2) memcpy(data(i), &narrow, 2);
  }
  void* data(int64_t i) { return memory.data() + i * bytes_of(dtype); }

  int dtype;
  int64_t n;
  std::vector<char> memory;
};

static Array constant(int dtype, int64_t n, double value) {
  Array a(dtype, n);
  for (int64_t i = 0; i < n; ++i) a.set(i, value);
  return a;
}
// Some numbers are 0, and some denormal.
static Array random_of(int dtype, int64_t n, double low, double high) {
  Array a(dtype, n);
  for (int64_t i = 0; i < n; ++i) {
    const double value = uniform(low, high), kind = uniform();
    a.set(i, low > 0 ? value : kind < 0.1 ? 0 : kind < 0.11 ? value * 1e-39 : value);
  }
  return a;
}

static void same_bits(const char* what, Array& a) {
  uint64_t hash = 1469598103934665603ull;
  for (const char c : a.memory) hash = (hash ^ (unsigned char)c) * 1099511628211ull;
  fprintf(text, "bits %s %d %016llx\n", what, cases, (unsigned long long)hash);
}
static void close_values(const char* what, Array& a) {
  fprintf(text, "values %s %d %d %lld\n", what, cases, a.dtype, (long long)a.n);
  fwrite(a.data(), bytes_of(a.dtype), a.n, binary);
}
static void holds(const char* what, bool truth) { fprintf(text, "bits %s %d %d\n", what, cases, truth); }

static void neuron_alone(int neuron, int dtype, int flags, int64_t T, int64_t N) {
  static const int states[] = {1, 1, 1, 1, 1, 2, 1, 1, 2, 2}, owns[] = {0, 0, 0, 2, 2, 3, 2, 2, 3, 3};
  const int state = state_of(dtype), id = cases;
  const bool two = states[neuron] > 1;
  if (neuron != 3) flags &= ~(kMultiSpike | kClipped);
  if (neuron < 6) flags &= ~kNoReset;
  if (neuron >= 4) flags |= kStrict;
  Call c = {};
  c.T = T, c.N = N, c.neuron = neuron, c.surrogate = id % 8, c.flags = flags | kStoreVSeq, c.dtype = dtype;
  c.threads = 1, c.stream_stores = id % 3 == 0, c.tau = id % 3 == 0 ? 2.0 : id % 3 == 1 ? 3.0 : 2.3f;
  const bool corrects = state == kFloat32 && kernels.corrected_division_is_exact(float(c.tau));
  c.division = c.tau == 2 ? kMultiply : corrects ? kCorrected : kDivide;
  c.threshold = 0.7, c.v_reset = flags & kSoftReset || id % 2 ? 0 : -0.1, c.alpha = 2, c.gain = 1.3;
  c.v_leak = -0.15, c.v_init = 0.05;
  Array x = random_of(dtype, T * N, -1, 2), v0 = random_of(state, N, -0.5, 0.6), i0 = random_of(state, N, -0.5, 0.6);
  Array own[] = {random_of(state, N, 0.3, 1), random_of(state, N, 0.3, 0.95), random_of(state, N, 0.3, 0.95)};
  Array decay = constant(state, 1, 0.4), s(dtype, T * N), v(state, N), i(state, N), v_seq(state, T * N);
  c.x = x.data(), c.s = s.data(), c.final_state[0] = v.data(), c.v_seq = v_seq.data();
  if (id % 4) c.state[0] = v0.data();
  if (two && id % 4) c.state[1] = i0.data();
  if (two) c.final_state[1] = i.data();
  if (neuron == 2) c.decay = decay.data();
  for (int k = 0; k < owns[neuron]; ++k) c.own[k] = own[k].data();
  c.own_each = id % (1 << owns[neuron]);
  kernels.forward(c);
  same_bits("s", s), same_bits("v", v), same_bits("v_seq", v_seq);
  if (two) same_bits("i", i);

  Array grad_s = random_of(dtype, T * N, -1, 1), grad_v = random_of(state, N, -1, 1);
  Array grad_i = random_of(state, N, -1, 1), grad_v_seq = random_of(state, T * N, -1, 1), grad_x(dtype, T * N);
  Array grad_v0(state, N), grad_i0(state, N), grad_own[] = {Array(state, N), Array(state, N), Array(state, N)};
  Array grad_decay = constant(kFloat64, backward_blocks(T, N), 0);
  c.grad_s = grad_s.data(), c.grad_x = grad_x.data(), c.grad_state[0] = grad_v0.data();
  if (id % 2) c.grad_final_state[0] = grad_v.data();
  if (id % 5) c.grad_v_seq = grad_v_seq.data();
  if (two) c.grad_final_state[1] = grad_i.data(), c.grad_state[1] = grad_i0.data();
  for (int k = 0; k < owns[neuron]; ++k) c.grad_own[k] = grad_own[k].data();
  if (neuron == 2) c.grad_decay_partial = grad_decay.data();
  holds("memory", kernels.backward(c));
  close_values("grad_x", grad_x), close_values("grad_v0", grad_v0);
  if (two) close_values("grad_i0", grad_i0);
  for (int k = 0; k < owns[neuron]; ++k) close_values("grad_own", grad_own[k]);
  double total = 0;
  memcpy(&total, grad_decay.data(), sizeof total);
  Array rounded = constant(state, 1, total);
  if (neuron == 2) close_values("grad_decay", rounded);
}

static void norm_and_neuron(int neuron, int dtype, int connect, int64_t inner) {
  const int64_t T = 4, C = 6, N = 3 * C * inner;
  const int state = state_of(dtype);
  BatchNorm b = {};
  Call& c = b.norm.call;
  c.T = T, c.N = N, c.neuron = neuron, c.surrogate = 1, c.flags = kDecayInput, c.dtype = dtype, c.threads = 1;
  c.division = kMultiply, c.threshold = 0.7, c.tau = 2, c.alpha = 2, c.gain = 1;
  Array x = random_of(dtype, T * N, -1, 2), skip = random_of(dtype, T * N, 0, 1), s(dtype, T * N), v(state, N);
  Array decay = constant(state, 1, 0.4), weight = random_of(kFloat32, C, 0.5, 1), bias = random_of(kFloat32, C, -1, 1);
  Array mean(kFloat64, C), var(kFloat64, C);
  b.norm.channels = C, b.norm.inner = inner, b.norm.groups = 1, b.norm.batch_statistics = true;
  b.norm.connect = connect, b.mean = reinterpret_cast<double*>(mean.data());
  b.var = reinterpret_cast<double*>(var.data()), b.weight = weight.data(), b.bias = bias.data(), b.eps = 1e-5;
  c.x = x.data(), c.s = s.data(), c.final_state[0] = v.data();
  if (neuron == 2) c.decay = decay.data();
  if (connect) b.norm.skip = skip.data();
  holds("memory", kernels.batch_norm(b, kStatistics) && kernels.batch_norm(b, kForward));
  close_values("mean", mean), close_values("var", var), close_values("s", s), close_values("v", v);

  Array grad_s = random_of(dtype, T * N, -1, 1), grad_x(dtype, T * N), grad_skip(dtype, T * N), grad_v0(state, N);
  Array grad_weight(state, C), grad_bias(state, C), grad_decay(state, 1);
  c.grad_s = grad_s.data(), c.grad_x = grad_x.data(), c.grad_state[0] = grad_v0.data();
  b.grad_weight = grad_weight.data(), b.grad_bias = grad_bias.data();
  if (neuron == 2) b.grad_decay = grad_decay.data();
  if (connect && connect != kAdd) b.norm.grad_skip = grad_skip.data();
  holds("memory", kernels.batch_norm(b, kBackward));
  close_values("grad_x", grad_x), close_values("grad_weight", grad_weight), close_values("grad_bias", grad_bias);
  if (b.norm.grad_skip) close_values("grad_skip", grad_skip);
}

static void bits(int dtype, int64_t n) {
  Array spikes(dtype, n), back(dtype, n), packed = constant(kFloat32, (n + 63) / 64 * 2, 0);
  for (int64_t i = 0; i < n; ++i) spikes.set(i, uniform() < 0.2);
  BitsCall c = {};
  c.n = n, c.element_bytes = bytes_of(dtype), c.elements = spikes.data(), c.bits = packed.data(), c.threads = 1;
  holds("two values", kernels.pack_bits(c, &c.one));
  same_bits("packed", packed);
  c.elements = back.data();
  kernels.unpack_bits(c);
  holds("unpacked", back.memory == spikes.memory);
}

static void pooling(int dtype, int64_t channels) {
  PoolCall c = {};
  c.dtype = dtype, c.planes = 3, c.H = 9, c.W = 12, c.C = channels, c.threads = 1;
  const int64_t in = 3 * 9 * 12 * channels, out = 3 * 4 * 6 * channels;
  Array x = random_of(dtype, in, -1, 1), y(dtype, out), chosen(kFloat16, out), grad_y = random_of(dtype, out, -1, 1);
  Array grad_x(dtype, in);
  c.x = x.data(), c.y = y.data(), c.chosen = chosen.data(), c.grad_y = grad_y.data(), c.grad_x = grad_x.data();
  kernels.max_pool(c, false), kernels.max_pool(c, true);
  same_bits("pooled", y), same_bits("pooling's grad_x", grad_x);
}

static void event_convolution(bool channels_last, bool ones) {
  EventCall c = {};
  c.images = 2, c.C = 19, c.H = c.W = c.Ho = c.Wo = 9, c.O = 70, c.kernel_h = c.kernel_w = 3, c.threads = 1;
  c.stride_h = c.stride_w = c.padding_h = c.padding_w = c.dilation_h = c.dilation_w = 1;
  c.channels_last = channels_last;
  const int64_t in = 2 * 19 * 81, out = 2 * 70 * 81, weights = 70 * 19 * 9;
  Array x(kFloat32, in), weight = random_of(kFloat32, weights, -1, 1), bias = random_of(kFloat32, 70, -1, 1);
  Array packed(kFloat32, event_packed_floats(c)), y(kFloat32, out), grad_y = random_of(kFloat32, out, -1, 1);
  Array workspace(kFloat32, event_workspace_floats(c)), grad_weight(kFloat32, weights);
  for (int64_t i = 0; i < in; ++i) x.set(i, uniform() < 0.1 ? ones ? 1 : uniform() : 0);
  kernels.pack_event_weights(c, weight.floats(), bias.floats(), packed.floats());
  c.x = x.floats(), c.weight = packed.floats(), c.y = y.floats(), c.workspace = workspace.floats();
  c.grad_y = grad_y.floats(), c.grad_weight = grad_weight.floats();
  fprintf(text, "bits events %d %lld\n", cases, (long long)kernels.count_events(c.x, in, 1));
  holds("memory", kernels.event_convolve(c) && kernels.event_weight_gradient(c));
  close_values("y", y), close_values("grad_weight", grad_weight);
}

static void feature_loss(bool gradients) {
  FeatureCall c = {};
  c.T = 4, c.images = 3, c.from = 5, c.to = 19, c.places = 49, c.threads = 1;
  Array student = random_of(kFloat32, 4 * 3 * 5 * 49, -1, 1), teacher = random_of(kFloat32, 3 * 19 * 49, -1, 1);
  Array weight = random_of(kFloat32, 19 * 5, -1, 1), bias = random_of(kFloat32, 19, -1, 1), loss(kFloat32, 1);
  Array mean(kFloat32, 3 * 5 * 49), grad_student(kFloat32, 3 * 5 * 49), grad_weight(kFloat32, 19 * 5);
  Array grad_bias(kFloat32, 19), partial(kFloat32, feature_partial_floats(c));
  c.student = student.data(), c.teacher = teacher.data(), c.weight = weight.data(), c.bias = bias.data();
  c.loss = loss.data(), c.partial = partial.floats();
  if (gradients) {
    c.mean = mean.data(), c.grad_student = grad_student.data();
    c.grad_weight = grad_weight.data(), c.grad_bias = grad_bias.data();
  }
  holds("memory", kernels.feature_loss(c));
  close_values("loss", loss);
  if (gradients) close_values("grad_student", grad_student), close_values("grad_weight", grad_weight);
}

int main(int, char** argv) {
  text = fopen(argv[1], "w"), binary = fopen(argv[2], "wb");
  setvbuf(text, nullptr, _IOFBF, 1 << 16), setvbuf(binary, nullptr, _IOFBF, 1 << 16);
  const size_t start = used;
  const auto run = [&](auto&& one) {
    used = start;
    one();
    ++cases;
  };
  const int flag_sets[] = {kDecayInput,
                           kSoftReset,
                           kStrict | kSoftReset | kDecayInput,
                           kDetachReset | kDecayInput,
                           kMultiSpike | kSoftReset,
                           kNoReset | kStrict,
                           kClipped | kSoftReset | kDecayInput};
  const int64_t shapes[][2] = {{1, 533}, {4, 300}, {7, 37}, {40, 130}};
  for (int neuron = 0; neuron < 10; ++neuron)
    for (int dtype = 0; dtype < 4; ++dtype)
      for (const int flags : flag_sets)
        for (const auto& shape : shapes) run([&] { neuron_alone(neuron, dtype, flags, shape[0], shape[1]); });
  for (int neuron = 0; neuron < 3; ++neuron)
    for (int dtype = 0; dtype < 4; ++dtype)
      for (int connect = kNoSkip; connect <= kIand; ++connect)
        for (const int64_t inner : {1, 49}) run([&] { norm_and_neuron(neuron, dtype, connect, inner); });
  for (const int dtype : {kFloat32, kFloat64, kBFloat16, kFloat16}) {
    for (const int64_t n : {64, 1031, 5000}) run([&] { bits(dtype, n); });
    for (const int64_t channels : {1, 5, 32}) run([&] { pooling(dtype, channels); });
  }
  for (const bool a : {false, true}) {
    for (const bool b : {false, true}) run([&] { event_convolution(a, b); });
    run([&] { feature_loss(a); });
  }
  fclose(text), fclose(binary);
  printf("%d cases\n", cases);
}
