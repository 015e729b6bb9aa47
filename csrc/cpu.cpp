// The time loop on the CPU. Neurons are cut into blocks whose state stays in the first-level cache while the loop runs
// over time, so x is read once and s written once, in long runs, whatever T is. The backward keeps a tape of one block
// in the caches and walks it backwards; beyond kMaxSegment steps it re-runs segments from saved states, so its memory
// does not grow with T.
//
// Compiled once per instruction set with SNNFAST_CPU_SET naming it. Everything has internal linkage but the one table
// at the end, and nothing from the standard library is instantiated here (see portable.h).
#include "bn_channels.h"
#include "cpu_bits.h"
#include "cpu_constant_input.h"
#include "cpu_event_gradient.h"
#include "cpu_features.h"
#include "cpu_pool.h"

namespace snnfast {
namespace {

constexpr int64_t kForwardBlock = 2048;

// A large call of four steps, one loop over neurons with the state in a register: every row is one long stream. In the
// caches the rows of forward_block are as fast, and faster where a step is a long chain of dependent operations.
template <class Neuron, class T>
void stream_four_steps(const Call& c, int64_t begin, int64_t end) {
  using R = typename StateOf<T>::type;
  const T* const x = static_cast<const T*>(c.x) + begin;
  T* const s = static_cast<T*>(c.s) + begin;
  const R* const v0 = static_cast<const R*>(c.state[0]);
  R* const v = static_cast<R*>(c.final_state[0]) + begin;
  const int64_t N = c.N;
  const R v_init = R(c.v_init);
  constexpr int64_t further = kPrefetchBytes / 4 / int64_t(sizeof(T));
  with_known_reset<true>(params_of<R>(c), [&](const Params<R> p) __attribute__((always_inline)) {
    for_each_in_row<R, true>(s, end - begin, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      const V own[kMaxOwn] = {};
      V state[1] = {v0 ? load(v0 + begin + i, (V*)nullptr) : broadcast<V>(v_init)}, tape[1];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        __builtin_prefetch(x + t * N + i + further);
        store_spikes<true>(s + t * N + i, Neuron::step(load(x + t * N + i, (V*)nullptr), state, tape, own, p));
      }
      store<false>(v + i, state[0]);
    });
  });
  store_fence();
}

template <class Neuron, class T, bool stream>
void forward_block(const Call& c, int64_t begin, int64_t end) {
  using R = typename StateOf<T>::type;
  if constexpr (kServesOneStep<T> && kTakesConstantInput<Neuron>)
    if (c.flags & kConstantInput) {
      if (stream && (c.N * sizeof(T)) % kVectorBytes == 0) return forward_constant_input<Neuron, true>(c, begin, end);
      return forward_constant_input<Neuron, false>(c, begin, end);
    }
  if constexpr (stream && kFitsRegisters<Neuron, T>)
    if (c.T == 4 && !c.v_seq && (c.N * sizeof(T)) % kVectorBytes == 0)
      return stream_four_steps<Neuron, T>(c, begin, end);
  if constexpr (kServesOneStep<T> && !stream)
    if (c.T == 1 && !c.v_seq) return forward_one_step<Neuron>(c, begin, end);
  const Params<R> p = params_of<R>(c);
  const T* x = static_cast<const T*>(c.x);
  ForwardRow<Neuron, T, R> row{};
  constexpr bool scratch = stream || kSplits<T>;  // states that go to memory once, at the end
  R running[scratch ? Neuron::kStates : 1][scratch ? kForwardBlock : 1];
  R own[Neuron::kOwn ? Neuron::kOwn : 1][Neuron::kOwn ? kForwardBlock : 1];
  for (int k = 0; k < Neuron::kOwn; ++k) row.own[k] = own_row<T>(c, k, own[k], begin, end - begin);
  for (int k = 0; k < Neuron::kStates; ++k) {
    row.state[k] = scratch ? running[k] : static_cast<R*>(c.final_state[k]) + begin;
    fill_state<T>(row.state[k], c.state[k], begin, end - begin, initial_state(c, k));
  }
  for (int64_t t = 0; t < c.T; ++t) {
    row.x = x + t * c.N + begin;
    row.ahead = t + 1 < c.T ? row.x + c.N : x + end;
    row.s = static_cast<T*>(c.s) + t * c.N + begin;
    row.ahead_s = t + 1 < c.T ? row.s + c.N : static_cast<T*>(c.s) + end;
    row.v_seq = c.v_seq ? static_cast<R*>(c.v_seq) + t * c.N + begin : nullptr;
    if (row.v_seq)
      row.template run<stream, kPotentialRow>(end - begin, p);
    else
      row.template run<stream, kSpikeRow>(end - begin, p);
  }
  if constexpr (scratch)
    for (int k = 0; k < Neuron::kStates; ++k)
      copy_joined<T, stream>(static_cast<R*>(c.final_state[k]) + begin, running[k], end - begin);
  if (stream) store_fence();
}

int threads_for(const Call& c, int64_t blocks) {
  if (c.T * c.N < kSerialBelow) return 1;
  return int(smaller(c.threads, blocks));
}

template <class Neuron, class T, bool stream>
void forward_all(const Call& c) {
  const int64_t blocks = (c.N + kForwardBlock - 1) / kForwardBlock;
  [[maybe_unused]] const int threads = threads_for(c, blocks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      forward_block<Neuron, T, stream>(c, b * kForwardBlock, smaller((b + 1) * kForwardBlock, c.N));
  }
}

// False where memory ran out, and then nothing that was written counts.
template <class Neuron, class T, bool stream>
bool backward_all(const Call& c) {
  using R = typename StateOf<T>::type;
  const int64_t block = backward_block_size(c.T), blocks = backward_blocks(c.T, c.N);
  [[maybe_unused]] const int threads = threads_for(c, blocks);
  const bool constant = c.flags & kConstantInput;
  if constexpr (kServesOneStep<T> && !stream)
    if (constant || (c.T == 1 && !c.grad_v_seq)) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
      for (int64_t b = 0; b < blocks; ++b) {
        const FlushDenormals flush;
        const int64_t begin = b * block, end = smaller(begin + block, c.N);
        double sum = 0;
        if (!constant)
          sum = backward_one_step<Neuron>(c, begin, end);
        else if constexpr (kTakesConstantInput<Neuron>)
          sum = backward_constant_input<Neuron>(c, begin, end);
        if (Neuron::kLearnable) static_cast<double*>(c.grad_decay_partial)[b] = sum;
      }
      return true;
    }
  int allocated = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : allocated)
  {
    const FlushDenormals flush;
    const BackwardScratch<Neuron, R> memory(c.T, block);
    allocated = memory.allocated();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      if (memory.allocated()) backward_block<Neuron, T, stream>(c, b, b * block, smaller((b + 1) * block, c.N), memory);
  }
  return allocated;
}

// Streaming stores double the code: the usual dtypes have them, and the neurons without parameters of their own, which
// load less.
template <class Neuron, class T>
bool run(const Call& c, bool backward) {
  if constexpr (Neuron::kOwn > 0 || !kUsual<T>) {
    if (backward) return backward_all<Neuron, T, false>(c);
    forward_all<Neuron, T, false>(c);
    return true;
  }
  bool stream = c.stream_stores && !(backward && c.flags & kConstantInput);  // whose grad_x is a step of T
  if constexpr (kSplits<T>) {
    const uintptr_t rows = uintptr_t(backward ? c.grad_x : c.s) | uintptr_t(c.N * sizeof(T));
    const uintptr_t states = backward ? 0 : uintptr_t(c.final_state[0]);  // the one of these neurons
    stream = stream && (rows | states) % kVectorBytes == 0;
  }
  if (backward) return stream ? backward_all<Neuron, T, true>(c) : backward_all<Neuron, T, false>(c);
  stream ? forward_all<Neuron, T, true>(c) : forward_all<Neuron, T, false>(c);
  return true;
}

template <class Neuron>
bool run_dtype(const Call& c, bool backward) {
  switch (c.dtype) {
    case kFloat32:
      return run<Neuron, float>(c, backward);
    case kFloat64:
      return run<Neuron, double>(c, backward);
    case kBFloat16:
      return run<Neuron, BFloat16>(c, backward);
    case kFloat16:
      return run<Neuron, Float16>(c, backward);
  }
  return true;
}

bool run_neuron(const Call& c, bool backward) {
  switch (c.neuron) {
#define SNNFAST_CASE(id, Neuron) \
  case id:                       \
    return run_dtype<Neuron>(c, backward);
    SNNFAST_NEURONS(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
  return true;
}

// tau and a scale separately, so one binade of a, over all mantissas, stands for all of the usable range.
bool corrected_division_is_exact(float tau) {
  if (!kHasFusedMultiplyAdd || !(tau >= 1.0f && tau <= 1048576.0f)) return false;
  Call call{};
  call.tau = tau;
  const Params<float> p = params_of<float>(call);
  using V = VectorOf<float>::type;
  constexpr int lanes = sizeof(V) / sizeof(float);
  Int32Vector lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  for (int32_t mantissa = 0; mantissa < (1 << 23); mantissa += lanes) {
    const V a = (V)(0x3f800000 + mantissa + lane);
    const V difference = divide_corrected(a, p) - a / tau;
    for (int i = 0; i < lanes; ++i)
      if (difference[i] != 0.0f) return false;
  }
  return true;
}

}  // namespace

#define SNNFAST_NAME(set) SNNFAST_NAME_(set)
#define SNNFAST_NAME_(set) cpu_kernels_##set
#define SNNFAST_STRING(set) SNNFAST_STRING_(set)
#define SNNFAST_STRING_(set) #set
extern const CpuKernels SNNFAST_NAME(SNNFAST_CPU_SET) = {
    SNNFAST_STRING(SNNFAST_CPU_SET),
    [](const Call& c) { run_neuron(c, false); },
    [](const Call& c) { return run_neuron(c, true); },
    run_batch_norm,
    corrected_division_is_exact,
    pack_bits,
    unpack_bits,
    feature_loss,
    max_pool,
    count_events,
    pack_event_weights,
    event_convolve,
    event_weight_gradient,
};

}  // namespace snnfast
