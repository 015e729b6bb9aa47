// Batch norm and neuron in one on the GPU: the kernels of cuda_kernels.cuh on rows of x that are normalised as they
// come in, x * scale + shift, each operation rounded once in the state's type. Every pass has the same bits of them.
//
// A step of x is [rows, channels * inner]. A block stays in its columns and goes down some of the rows, so a thread's W
// neighbours keep their channels and their sums stay in registers: in float64, from float32 sums over the steps of one
// neuron in the backward. Where inner is 1 (channels-last) neighbours are channels; else all W are one channel's. A
// block leaves a partial sum for each of its channels, and one block per channel adds them up in order, so results
// depend on nothing but the shape.
//
// The backward reads twice, once for the sums and once for grad_x. What it needs of the first reading in the second is
// the gradient of the normalised input. It is kept in grad_x where the neuron's arithmetic takes longer than the memory
// that this costs, or would be done for each step's statistics anew: 6 passes over [T, N]. Else it is computed
// again: 5.
#pragma once

#include <type_traits>

#include "bn_formulas.h"
#include "cuda_bn.h"
#include "cuda_kernels.cuh"

namespace snnfast {
namespace {

// How a kernel's blocks divide [rows, period], which is a step of x, or all of it for the statistics.
struct BatchNormGrid {
  int64_t rows;       // of one group
  int64_t period;     // channels * inner
  int64_t rows_each;  // per block
  int width;          // neurons of a thread
  int columns;        // threads of a block beside each other
  int lines;          // rows that a block works on at a time
  int tiles;          // blocks beside each other
  int chunks;         // blocks above each other
  int groups;

  SNNFAST_FN int64_t blocks() const { return int64_t(tiles) * chunks * groups; }
  // Partial sums of a chunk: for each column if columns are channels, else for each thread, of which those that are
  // the first of their channel in their block write one.
  SNNFAST_FN int64_t entries(int64_t inner) const { return inner == 1 ? period : period / width; }
  SNNFAST_FN int64_t partials(int64_t inner) const { return 2 * groups * chunks * entries(inner); }
};

struct BatchNormJob {
  BatchNorm b;
  BatchNormGrid grid;
  // In the workspace: per group and channel, in the state's type, and the partial sums.
  void *scale, *shift, *centre, *slope, *offset;
  double* partial;
  int64_t decay_partials;
  bool keeps_gradient;  // backward: of the normalised input, in grad_x
};

template <int W>
struct Place {
  int64_t column, row, end;
  int chunk, group;
  bool active;
  SNNFAST_DEVICE explicit Place(const BatchNormGrid& g) {
    const int line = threadIdx.x / g.columns, across = threadIdx.x % g.columns;
    const int down = blockIdx.x / g.tiles;
    column = (int64_t(blockIdx.x % g.tiles) * g.columns + across) * W;
    chunk = down % g.chunks;
    group = down / g.chunks;
    row = chunk * g.rows_each + line;
    end = chunk * g.rows_each + g.rows_each;
    end = end < g.rows ? end : g.rows;
    active = line < g.lines && column < g.period;
  }
};

// The constants of a thread's neurons, from its first channel's.
template <int W, class R>
SNNFAST_DEVICE void load_constants(const void* constants, int64_t channel, int64_t inner, R (&to)[W]) {
  const R* from = static_cast<const R*>(constants) + channel;
  if (inner == 1) {
    unpack(load<W>(from), to);
  } else {
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) to[w] = *from;
  }
}

// ---- sums ----
// Two sums for each neuron of the block's threads, in shared memory: registers are for the neuron.
template <int W>
struct BlockSums {
  double of[2][W][kThreads];

  SNNFAST_DEVICE void clear() {
    SNNFAST_UNROLL
    for (int k = 0; k < 2; ++k) {
      SNNFAST_UNROLL
      for (int w = 0; w < W; ++w) of[k][w][threadIdx.x] = 0;
    }
  }
  template <class V>
  SNNFAST_DEVICE void add(const V (&sums)[2][W]) {
    SNNFAST_UNROLL
    for (int k = 0; k < 2; ++k) {
      SNNFAST_UNROLL
      for (int w = 0; w < W; ++w) of[k][w][threadIdx.x] += double(sums[k][w]);
    }
  }

  // Writes the block's partial sums; all its threads come here.
  SNNFAST_DEVICE void fold(const BatchNormJob& job, const Place<W>& at, int group) {
    const BatchNormGrid& g = job.grid;
    const int64_t inner = job.b.norm.inner;
    double* to = job.partial + 2 * (int64_t(group) * g.chunks + at.chunk) * g.entries(inner);
    if (inner == 1)
      fold_columns(g, to + 2 * (at.column - threadIdx.x % g.columns * W));
    else
      fold_runs(g, at, inner, to + 2 * (at.column / W));
  }

 private:
  SNNFAST_DEVICE void fold_columns(const BatchNormGrid& g, double* to) {
    __syncthreads();
    const int64_t start = int64_t(blockIdx.x % g.tiles) * g.columns * W;
    for (int e = threadIdx.x; e < g.columns * W; e += kThreads) {
      const int across = e % g.columns, w = e / g.columns;
      if (start + across * W >= g.period) continue;
      for (int k = 0; k < 2; ++k) {
        double sum = 0;
        for (int line = 0; line < g.lines; ++line) sum += of[k][w][line * g.columns + across];
        to[2 * (across * W + w) + k] = sum;
      }
    }
  }
  // Threads side by side with one channel add up in pairs, pairs of pairs, and so on.
  SNNFAST_DEVICE void fold_runs(const BatchNormGrid& g, const Place<W>& at, int64_t inner, double* to) {
    const int thread = threadIdx.x, across = thread % g.columns;
    const bool upper = at.active && thread < g.columns;
    const int64_t channel = at.column / inner, before = at.column - channel * inner, after = inner - before;
    const int position = int(before / W < across ? before / W : across);
    int64_t right = after / W - 1;  // neighbours on that side
    right = right < g.columns - 1 - across ? right : g.columns - 1 - across;
    for (int k = 0; k < 2; ++k) {
      double sum = 0;
      for (int w = 0; w < W; ++w) sum += of[k][w][thread];
      of[k][0][thread] = sum;
    }
    __syncthreads();
    for (int k = 0; k < 2; ++k)
      for (int line = 1; upper && line < g.lines; ++line) of[k][0][thread] += of[k][0][line * g.columns + thread];
    for (int offset = 1; offset < g.columns; offset *= 2) {
      __syncthreads();
      if (upper && position % (2 * offset) == 0 && right >= offset)
        for (int k = 0; k < 2; ++k) of[k][0][thread] += of[k][0][thread + offset];
    }
    if (upper && position == 0)
      for (int k = 0; k < 2; ++k) to[k] = of[k][0][thread];
  }
};

// The sums of a channel, in thread 0, from the partial ones.
__device__ inline void add_partials(const BatchNormJob& job, int group, int64_t channel, double (&sums)[2]) {
  const BatchNormGrid& g = job.grid;
  const int64_t inner = job.b.norm.inner, entries = g.entries(inner);
  int64_t first = channel, pieces = 1;
  if (inner > 1) {
    first = channel * inner / g.width;
    const int64_t last = ((channel + 1) * inner - 1) / g.width;
    pieces = last / g.columns - first / g.columns + 1;
  }
  double mine[2] = {};
  for (int64_t i = threadIdx.x; i < g.chunks * pieces; i += kThreads) {
    const int64_t piece = i % pieces, chunk = i / pieces;
    const int64_t entry = piece == 0 ? first : (first / g.columns + piece) * g.columns;
    const double* from = job.partial + 2 * ((group * g.chunks + chunk) * entries + entry);
    for (int k = 0; k < 2; ++k) mine[k] += from[k];
  }
  for (int k = 0; k < 2; ++k) {
    sums[k] = block_sum(mine[k]);
    __syncthreads();  // block_sum's memory is free again
  }
}

// ---- per channel ----
SNNFAST_DEVICE double element(const void* from, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat64:
      return static_cast<const double*>(from)[i];
    case kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(from)[i]);
    case kFloat16:
      return widen(static_cast<const __half*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}
// The element of x that the sums of a channel are relative to: of its first row.
SNNFAST_DEVICE double first_of(const BatchNormJob& job, int group, int64_t channel) {
  return element(job.b.norm.call.x, job.b.norm.call.dtype,
                 group * job.grid.rows * job.grid.period + channel * job.b.norm.inner);
}

SNNFAST_DEVICE void set_element(void* to, int dtype, int64_t i, double value) {
  switch (dtype) {
    case kFloat64:
      static_cast<double*>(to)[i] = value;
      break;
    case kBFloat16:
      static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(float(value));
      break;
    case kFloat16:
      static_cast<__half*>(to)[i] = __float2half_rn(float(value));
      break;
    default:
      static_cast<float*>(to)[i] = float(value);
  }
}
SNNFAST_DEVICE void move_element(void* to, int dtype, int64_t i, double towards, double momentum) {
  set_element(to, dtype, i, (1.0 - momentum) * element(to, dtype, i) + momentum * towards);
}

// A block for each channel.
__device__ inline void finish_statistics(const BatchNormJob& job) {
  const BatchNorm& b = job.b;
  const int64_t channels = b.norm.channels, channel = blockIdx.x;
  const double count = double(job.grid.rows) * double(b.norm.inner);
  for (int group = 0; group < int(b.norm.groups); ++group) {
    double sums[2];
    add_partials(job, group, channel, sums);
    if (threadIdx.x != 0) continue;
    const ChannelMoments found = channel_moments(first_of(job, group, channel), sums[0], sums[1], count);
    b.mean[group * channels + channel] = found.mean;
    b.var[group * channels + channel] = found.var;
    if (!b.running_mean) continue;
    move_element(b.running_mean, b.running_dtype, channel, found.mean, b.momentum);
    move_element(b.running_var, b.running_dtype, channel, unbiased(found.var, count), b.momentum);
  }
}

// A thread for each group and channel.
template <class R>
SNNFAST_DEVICE void make_constants(const BatchNormJob& job) {
  const BatchNorm& b = job.b;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= b.norm.groups * b.norm.channels) return;
  const int64_t channel = i % b.norm.channels;
  const double weight = b.weight ? element(b.weight, b.weight_dtype, channel) : 1.0;
  const double bias = b.bias ? element(b.bias, b.bias_dtype, channel) : 0.0;
  const ChannelConstants<R> found = channel_constants<R>(b.mean[i], b.var[i], b.eps, weight, bias);
  static_cast<R*>(job.scale)[i] = found.scale;
  static_cast<R*>(job.shift)[i] = found.shift;
  static_cast<R*>(job.centre)[i] = found.centre;
}

// A block for each channel, and one for the decay: gradients of the norm's parameters and, for the second reading,
// what grad_x takes of x - centre and of nothing.
template <class R>
__device__ inline void finish_backward(const BatchNormJob& job) {
  const BatchNorm& b = job.b;
  const int64_t channel = blockIdx.x;
  if (channel == b.norm.channels) {
    double mine = 0;
    for (int64_t i = threadIdx.x; i < job.decay_partials; i += kThreads)
      mine += static_cast<const double*>(b.norm.call.grad_decay_partial)[i];
    const double sum = block_sum(mine);
    if (threadIdx.x == 0) *static_cast<R*>(b.grad_decay) = R(sum);
    return;
  }
  double grad_weight = 0, grad_bias = 0;
  for (int group = 0; group < int(b.norm.groups); ++group) {
    double sums[2];
    add_partials(job, group, channel, sums);
    const int64_t i = group * b.norm.channels + channel;
    const double count = double(b.norm.call.T / b.norm.groups) * double(b.norm.call.N / b.norm.channels);
    const ChannelGradients<R> found =
        channel_gradients<R>(b.mean[i], b.var[i], b.eps, static_cast<const R*>(job.scale)[i],
                             static_cast<const R*>(job.centre)[i], sums[0], sums[1], count);
    grad_weight += found.weight;
    grad_bias += found.bias;
    if (threadIdx.x != 0) continue;
    static_cast<R*>(job.slope)[i] = b.norm.batch_statistics ? found.slope : R(0);
    static_cast<R*>(job.offset)[i] = b.norm.batch_statistics ? found.offset : R(0);
  }
  if (threadIdx.x != 0) return;
  static_cast<R*>(b.grad_weight)[channel] = R(grad_weight);
  static_cast<R*>(b.grad_bias)[channel] = R(grad_bias);
}

enum ChannelWork { kFinishStatistics, kMakeConstants, kFinishBackward };
template <ChannelWork work, class R>
__global__ void __launch_bounds__(kThreads, 1) channel_kernel(const BatchNormJob job, const Params<R>) {
  if constexpr (work == kFinishStatistics) finish_statistics(job);
  if constexpr (work == kMakeConstants) make_constants<R>(job);
  if constexpr (work == kFinishBackward) finish_backward<R>(job);
}

// ---- statistics, and what needs no neuron of the backward ----
struct NoRows {
  template <class... Arguments>
  SNNFAST_DEVICE explicit NoRows(Arguments...) {}
};

// Time is more rows here: x and the gradient of its normalised values, which grad_x holds, are [groups, rows, period].
// Calls f(offset, x, gradient) for each of a thread's rows.
template <class T, int W, bool kGradient, class F>
SNNFAST_DEVICE void for_each_row(const BatchNormJob& job, const Place<W>& at, F f) {
  using R = typename StateOf<T>::type;
  constexpr int kAhead = 8;
  const BatchNormGrid& g = job.grid;
  if (!at.active || at.row >= at.end) return;
  const int64_t count = (at.end - at.row + g.lines - 1) / g.lines, stride = g.lines * g.period;
  int64_t offset = (at.group * g.rows + at.row) * g.period + at.column;
  Rows<T, W, kAhead, false> x(static_cast<const T*>(job.b.norm.call.x) + offset, stride, count);
  std::conditional_t<kGradient, Rows<T, W, kAhead, false>, NoRows> gradient(
      static_cast<const T*>(job.b.norm.call.grad_x) + offset, stride, count);
  for (int64_t base = 0; base < count; base += kAhead) {
    SNNFAST_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= count) break;
      R x_now[W], gradient_now[W];
      x.take(i, x_now);
      if constexpr (kGradient) gradient.take(i, gradient_now);
      f(offset, x_now, gradient_now);
      offset += stride;
    }
  }
}

// The sums of x - first and of its square, or of the gradient and of its product with x - centre.
template <class T, int W, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1)
    sums_kernel(const BatchNormJob job, const Params<typename StateOf<T>::type>) {
  using R = typename StateOf<T>::type;
  const Place<W> at(job.grid);
  double sums[2][W] = {}, from[W] = {};
  SNNFAST_UNROLL
  for (int w = 0; w < W && at.active; ++w) {
    const int64_t channel = (at.column + w) / job.b.norm.inner;
    from[w] = kGradient ? double(static_cast<const R*>(job.centre)[at.group * job.b.norm.channels + channel])
                        : first_of(job, at.group, channel);
  }
  for_each_row<T, W, kGradient>(job, at, [&](int64_t, const R(&x)[W], const R(&gradient)[W]) {
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) {
      const double away = double(x[w]) - from[w], value = kGradient ? double(gradient[w]) : away;
      sums[0][w] += value;
      sums[1][w] += value * away;
    }
  });
  __shared__ BlockSums<W> block;
  block.clear();
  block.add(sums);
  block.fold(job, at, at.group);
}

template <class T, int W, class R>
SNNFAST_DEVICE void store_input_gradient(T* to, const R (&gradient)[W], const R (&x)[W], const R (&by)[W],
                                         const R (&minus)[W], const R (&slope)[W], const R (&offset)[W]) {
  R out[W];
  SNNFAST_UNROLL
  for (int w = 0; w < W; ++w)
    out[w] = multiply_add(gradient[w], by[w], multiply_add(x[w] - minus[w], slope[w], offset[w]));
  store(to, out);
}

// grad_x from the gradient of the normalised input, in place.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, 1)
    input_gradient_kernel(const BatchNormJob job, const Params<typename StateOf<T>::type>) {
  using R = typename StateOf<T>::type;
  const Place<W> at(job.grid);
  if (!at.active) return;
  R by[W], minus[W], slope[W], offset[W];
  const int64_t inner = job.b.norm.inner, first = at.group * job.b.norm.channels + at.column / inner;
  load_constants(job.scale, first, inner, by);
  load_constants(job.centre, first, inner, minus);
  load_constants(job.slope, first, inner, slope);
  load_constants(job.offset, first, inner, offset);
  T* const grad_x = static_cast<T*>(job.b.norm.call.grad_x);
  for_each_row<T, W, true>(job, at, [&](int64_t i, const R(&x)[W], const R(&gradient)[W]) {
    store_input_gradient(grad_x + i, gradient, x, by, minus, slope, offset);
  });
}

// ---- rows of x as the neuron gets them ----

// Normalised, and with what a residual connection adds to the charge. kSkip kernels know residual connections; of the
// exact ones, those that know them always have one.
template <class T, int W, int kAhead, bool kExact, bool kSkip>
struct NormalisedRows : Rows<T, W, kAhead, kExact> {
  using R = typename StateOf<T>::type;
  using Base = Rows<T, W, kAhead, kExact>;
  static constexpr bool kConnects = kSkip;
  const BatchNormJob& job;
  int64_t constants;  // where those of the next row are: of its step, or of all
  bool skips;         // whether the rows of the connection are read along
  std::conditional_t<kSkip, Base, NoRows> skip;
  R scale[W], shift[W], skip_now[W];

  SNNFAST_DEVICE NormalisedRows(const BatchNormJob& job_, int64_t channel, int64_t n, int64_t t, int64_t count,
                                bool skips_)
      : Base(static_cast<const T*>(job_.b.norm.call.x) + t * job_.b.norm.call.N + n, job_.b.norm.call.N, count),
        job(job_),
        constants(channel + (job_.b.norm.groups > 1 ? t * job_.b.norm.channels : 0)),
        skips(kSkip && (kExact || skips_)),
        skip(static_cast<const T*>(job_.b.norm.skip) + t * job_.b.norm.call.N + n, job_.b.norm.call.N,
             skips ? count : 0) {
    load_step();
  }
  SNNFAST_DEVICE void load_step() {
    load_constants(job.scale, constants, job.b.norm.inner, scale);
    load_constants(job.shift, constants, job.b.norm.inner, shift);
  }
  SNNFAST_DEVICE void take(int i, R (&row)[W]) {
    Base::take(i, row);
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) {
      const R scaled = row[w] * scale[w];
      row[w] = scaled + shift[w];
    }
    if constexpr (kSkip)
      if (skips) {
        skip.take(i, skip_now);
        SNNFAST_UNROLL
        for (int w = 0; w < W; ++w) row[w] = job.b.norm.connect == kCharge ? row[w] + skip_now[w] : row[w];
      }
    if (!kExact && job.b.norm.groups > 1) {
      constants += job.b.norm.channels;
      if (constants < job.b.norm.groups * job.b.norm.channels) load_step();
    }
  }
  // What comes out of the spikes of the last row.
  SNNFAST_DEVICE void meet(const R (&s)[W], R (&out)[W]) const {
    const int connect = job.b.norm.connect;
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) {
      out[w] = s[w];
      if (connect == kAdd) out[w] = s[w] + skip_now[w];
      if (connect == kAnd) out[w] = s[w] * skip_now[w];
      if (connect == kIand) out[w] = (R(1) - s[w]) * skip_now[w];
    }
  }
};

// ---- forward ----
template <class Neuron, class T, int kT, int kAhead, int W, bool kSkip>
__global__ void __launch_bounds__(kThreads, 1)
    batch_norm_forward_kernel(const BatchNormJob job, const Params<typename StateOf<T>::type> params) {
  const Place<W> at(job.grid);
  if (!at.active) return;
  const Call& c = job.b.norm.call;
  const auto p = with_decay<Neuron>(params, c);
  const int64_t channel = at.column / job.b.norm.inner;
  for (int64_t row = at.row; row < at.end; row += job.grid.lines) {
    const int64_t n = row * job.grid.period + at.column;
    NormalisedRows<T, W, kAhead, kT != kOpen, kSkip> x(job, channel, n, 0, c.T, job.b.norm.connect != kNoSkip);
    forward_neurons<Neuron, T, W>(c, p, n, x);
  }
}

// ---- backward ----
// Takes the gradients of the normalised rows: into the sums of a thread's neurons, into grad_x, or both. Where every
// step has statistics of its own it has sums of its own too, which are made of the rows that are kept.
template <class T, int kT, int W, bool kSums, bool kSkip>
struct NormGradients {
  using R = typename StateOf<T>::type;
  static constexpr bool kWantsInput = true;
  static constexpr bool kPotentials = false;
  static constexpr bool kConnects = kSkip;
  const BatchNormJob& job;
  int64_t channel, n;
  R by[W], minus[W], slope[W], offset[W];
  R sums[2][W];

  SNNFAST_DEVICE NormGradients(const BatchNormJob& job_, int64_t channel_, int64_t n_)
      : job(job_), channel(channel_), n(n_), sums{} {
    if (kT == kOpen) load_channels();
  }
  SNNFAST_DEVICE void load_channels() {
    const int64_t inner = job.b.norm.inner;
    load_constants(job.centre, channel, inner, minus);
    if (writes()) load_constants(job.scale, channel, inner, by);
    if constexpr (!kSums) {
      load_constants(job.slope, channel, inner, slope);
      load_constants(job.offset, channel, inner, offset);
    }
  }
  SNNFAST_DEVICE bool writes() const { return !kSums || job.keeps_gradient || !job.b.norm.batch_statistics; }
  SNNFAST_DEVICE void write(void* to, int64_t t, const R (&row)[W]) const {
    store(static_cast<T*>(to) + t * job.b.norm.call.N + n, row);
  }
  SNNFAST_DEVICE const T* skip_to_meet() const {
    return job.b.norm.connect >= kAnd ? static_cast<const T*>(job.b.norm.skip) + n : nullptr;
  }
  // From the gradient of what comes out of spikes and skip: those of both.
  template <class Neuron>
  SNNFAST_DEVICE void connect(int64_t t, const R (&skip)[W], const R (&tape)[W][Neuron::kTape],
                              const OwnParameters<Neuron, R, W>& own, const Params<R>& p, R (&grad_s)[W]) {
    if (job.b.norm.connect < kAnd) return;
    const bool and_not = job.b.norm.connect == kIand;
    R grad_skip[W];
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) {
      const R s = Neuron::fire(tape[w][0], own.values[w], p), through = grad_s[w] * skip[w];
      grad_skip[w] = grad_s[w] * (and_not ? R(1) - s : s);
      grad_s[w] = and_not ? -through : through;
    }
    if (writes()) write(job.b.norm.grad_skip, t, grad_skip);
  }
  SNNFAST_DEVICE void put(int64_t t, const R (&grad)[W], const R (&x)[W]) {
    if (kT != kOpen && t == kT - 1) load_channels();  // late: registers
    if constexpr (kSums) {
      SNNFAST_UNROLL
      for (int w = 0; w < W; ++w) {
        sums[0][w] += grad[w];
        sums[1][w] = multiply_add(grad[w], x[w] - minus[w], sums[1][w]);
      }
    }
    if (!writes()) return;
    if (kSkip && job.b.norm.connect == kCharge) write(job.b.norm.grad_skip, t, grad);
    if constexpr (kSums) {
      R out[W];
      SNNFAST_UNROLL
      for (int w = 0; w < W; ++w) out[w] = job.keeps_gradient ? grad[w] : grad[w] * by[w];
      write(job.b.norm.call.grad_x, t, out);
    } else {
      store_input_gradient(static_cast<T*>(job.b.norm.call.grad_x) + t * job.b.norm.call.N + n, grad, x, by, minus,
                           slope, offset);
    }
  }
};

// Blocks that a multiprocessor holds at a time: as many as leave registers enough not to spill.
template <class Neuron, class T, int kT, bool kSums, bool kSkip>
constexpr int kBackwardBlocks =
    sizeof(T) == 8
        ? 2
        : (kT == kOpen || (kSums && kSkip) ? 3 : 4) - (kSums && Neuron::kLearnable && (kT == kOpen || !kSkip));

template <class Neuron, class T, int kT, int kAhead, int W, bool kSums, bool kSkip>
__global__ void __launch_bounds__(kThreads, (kBackwardBlocks<Neuron, T, kT, kSums, kSkip>))
    batch_norm_backward_kernel(const BatchNormJob job, const Params<typename StateOf<T>::type> params) {
  using R = typename StateOf<T>::type;
  constexpr bool kExact = kT != kOpen;
  const Place<W> at(job.grid);
  const Call& c = job.b.norm.call;
  double grad_decay = 0;
  __shared__ BlockSums<kSums ? W : 1> block;
  if constexpr (kSums) block.clear();
  if (at.active) {
    const Params<R> p = with_decay<Neuron>(params, c);
    const int64_t channel = at.column / job.b.norm.inner;
    for (int64_t row = at.row; row < at.end; row += job.grid.lines) {
      const int64_t n = row * job.grid.period + at.column;
      const auto rows = [&](int64_t t, int64_t count) {
        return NormalisedRows<T, W, kAhead, kExact, kSkip>(job, channel, n, t, count, job.b.norm.connect == kCharge);
      };
      NormGradients<T, kT, W, kSums, kSkip> sink(job, channel, n);
      if constexpr (kExact) {
        auto x = rows(0, kT);
        grad_decay += backward_exact<Neuron, T, kT, W>(c, p, n, x, sink);
      } else {
        __shared__ SharedTape<Neuron, R, W> tape;
        grad_decay += backward_open<Neuron, T, kAhead, W>(c, p, n, tape, rows, kSums, sink);
      }
      if constexpr (kSums) block.add(sink.sums);
    }
  }
  if constexpr (kSums) {
    if (job.b.norm.groups == 1) block.fold(job, at, 0);
    if constexpr (Neuron::kLearnable) {
      const double sum = block_sum(grad_decay);
      if (threadIdx.x == 0) static_cast<double*>(c.grad_decay_partial)[blockIdx.x] = sum;
    }
  }
}

}  // namespace
}  // namespace snnfast
