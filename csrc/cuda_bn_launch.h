// Launches the kernels of cuda_bn_kernels.cuh. Part of cuda.cu, whose helpers it uses.
#pragma once

#include "cuda_bn.h"
#include "cuda_bn_kernels.cuh"

namespace snnfast {
namespace {

// Enough blocks to fill any GPU a few times over, few enough that a thread's sums are over many rows.
constexpr int64_t kMostBlocks = 2048;

BatchNormGrid grid_of(const BatchNormCall& b, int W, int64_t rows, int groups, int64_t least_rows) {
  BatchNormGrid g;
  g.period = b.channels * b.inner;
  g.rows = rows;
  g.width = W;
  g.groups = groups;
  const int64_t across = g.period / W;
  g.columns = int(across < kThreads ? across : kThreads);
  g.lines = kThreads / g.columns;
  g.tiles = int((across + g.columns - 1) / g.columns);
  const int64_t turns = (rows + g.lines - 1) / g.lines;
  const int64_t wanted = (turns * g.tiles * groups + kMostBlocks - 1) / kMostBlocks;
  // A short walk costs as much in partial sums as in its rows, unless there are too few blocks anyway.
  const int64_t least = turns * g.tiles * groups < kMostBlocks / 8 * least_rows ? 1 : least_rows;
  const int64_t each = wanted < least ? least : wanted;
  g.rows_each = each * g.lines;
  g.chunks = int((rows + g.rows_each - 1) / g.rows_each);
  return g;
}
BatchNormGrid grid_of_neurons(const BatchNormCall& b, int W, bool sums) {
  return grid_of(b, W, b.call.N / (b.channels * b.inner), 1, sums ? 8 : 1);
}
// Of x as [groups, rows, period].
BatchNormGrid grid_of_rows(const BatchNormCall& b, int W) {
  return grid_of(b, W, b.call.T / b.groups * (b.call.N / (b.channels * b.inner)), int(b.groups), 32);
}

// Whether a thread can take W neighbours: they are one channel's or channels themselves, and lie on whole accesses.
template <class T>
bool takes(const BatchNormCall& b, int W) {
  Call c = b.call;
  c.s = const_cast<void*>(b.skip);  // as the others of its kind
  Call gradient = b.call;
  gradient.grad_x = b.grad_skip;
  return (b.inner == 1 ? b.channels % W == 0 : b.inner % W == 0) && wide_accesses<T>(b.call, W) &&
         wide_accesses<T>(c, W) && wide_accesses<T>(gradient, W);
}

// f(W) for the kernels that know no neuron.
template <class T, class F>
auto with_width(const BatchNormCall& b, F f) {
  if constexpr (sizeof(T) < 8)
    if (takes<T>(b, 4)) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, 1>());
}

// Six passes over 16-bit rows take less time than a second time the neuron's backward, not so over 32-bit ones.
template <class T>
bool keeps_gradient(const BatchNormCall& b) {
  return b.groups > 1 || (b.batch_statistics && sizeof(T) == 2);
}

// The workspace, in this order, each part on a whole access: what make_constants makes, the backward's slope and
// offset, partial sums, the decay's, and the states of the open backward.
struct Workspace {
  int64_t bytes = 0;
  int64_t take(int64_t count, int64_t size) {
    const int64_t at = bytes;
    bytes += (count * size + 255) / 256 * 256;
    return at;
  }
};
// Sets the job's pointers, relative to a null workspace too, and returns its size.
template <class T>
int64_t lay_out(BatchNormJob& job, BatchNormPass pass, bool learnable) {
  using R = typename StateOf<T>::type;
  Workspace space;
  char* const base = static_cast<char*>(job.b.workspace);
  Call& c = job.b.norm.call;
  const int64_t constants = job.b.norm.groups * job.b.norm.channels;
  const auto part = [&](int64_t count, int64_t size) { return base + space.take(count, size); };
  if (pass != kStatistics)
    for (void** to : {&job.scale, &job.shift, &job.centre}) *to = part(constants, sizeof(R));
  if (pass == kForward) return space.bytes;
  if (pass == kBackward)
    for (void** to : {&job.slope, &job.offset}) *to = part(constants, sizeof(R));
  BatchNormGrid sums = job.grid;
  if (job.b.norm.groups > 1) sums = with_width<T>(job.b.norm, [&](auto W) { return grid_of_rows(job.b.norm, W); });
  job.partial = reinterpret_cast<double*>(part(sums.partials(job.b.norm.inner), sizeof(double)));
  if (pass == kStatistics) return space.bytes;
  job.decay_partials = job.grid.blocks();
  c.grad_decay_partial = part(learnable ? job.decay_partials : 0, sizeof(double));
  const int64_t segments = (c.T + kSegment - 1) / kSegment;
  c.workspace = part(segments > 1 ? (segments - 1) * c.N : 0, sizeof(R));  // these neurons have one state
  return space.bytes;
}

template <class R>
cudaError_t launch(void (*kernel)(BatchNormJob, Params<R>), BatchNormJob job, int64_t blocks, void* stream) {
  Call without_decay = job.b.norm.call;
  without_decay.decay = nullptr;  // a device pointer: the kernel reads it
  Params<R> p = params_of<R>(without_decay);
  return launch_blocks(kernel, blocks, kThreads, job, p, stream);
}

// f(Kind()) for the call's neuron and dtype, of the neurons without parameters of their own.
template <class F>
auto with_simple_kind(const Call& c, F f) {
  switch (c.neuron) {
#define SNNFAST_CASE(id, Neuron)                                      \
  case id:                                                            \
    if constexpr (Neuron::kOwn == 0) return with_dtype<Neuron>(c, f); \
    break;
    SNNFAST_NEURONS(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
  return with_dtype<IF>(c, f);
}

// The bucket of T and the way of reading: four steps at once, the commonest number, or any; wide or not. float64 is
// there for checks.
template <class T, class Bucket, bool backward, bool kSkip_>
struct NormShape {
  static constexpr bool kSkip = kSkip_;
  static constexpr int kT = Bucket::kT;
  static constexpr int kAhead = kT != kOpen ? kT : backward ? 4 : 8;
  static constexpr int wide = kT == kOpen ? (backward && sizeof(T) == 4 ? 2 : 4) : backward ? 4 : kWidest<T>;
  static constexpr int W = Bucket::kWide ? wide : 1;
};
template <class T, bool backward, class F>
auto with_norm_shape(const BatchNormCall& b, F f) {
  if constexpr (sizeof(T) < 8) {
    using Exact = NormShape<T, Bucket<4, true>, backward, false>;
    using Connected = NormShape<T, Bucket<4, true>, backward, true>;
    using Open = NormShape<T, Bucket<kOpen, true>, backward, true>;
    if (b.call.T == 4 && b.groups == 1 && takes<T>(b, Exact::W)) return b.skip ? f(Connected()) : f(Exact());
    if (takes<T>(b, Open::W)) return f(Open());
  }
  return f(NormShape<T, Bucket<kOpen, false>, backward, true>());
}

template <ChannelWork work, class R>
cudaError_t launch_channels(const BatchNormJob& job, int64_t blocks, void* stream) {
  return launch(channel_kernel<work, R>, job, blocks, stream);
}
template <class R>
cudaError_t launch_constants(const BatchNormJob& job, void* stream) {
  return launch_channels<kMakeConstants, R>(job, (job.b.norm.groups * job.b.norm.channels + kThreads - 1) / kThreads,
                                            stream);
}

template <class F>
auto with_statistics_shape(const BatchNormCall& b, F f) {
  return with_dtype<IF>(
      b.call, [&](auto kind) { return with_width<typename decltype(kind)::T>(b, [&](auto W) { return f(kind, W); }); });
}

// What is left of a backward whose grad_x is the gradient of the normalised input.
template <class T, class R>
cudaError_t finish_from_kept(BatchNormJob job, bool learnable, void* stream) {
  const BatchNormCall& b = job.b.norm;
  return with_width<T>(b, [&](auto width) {
    constexpr int W = decltype(width)::value;
    cudaError_t error = cudaSuccess;
    const BatchNormGrid rows = grid_of_rows(b, W);
    if (b.groups > 1) {
      job.grid = rows;
      error = launch(sums_kernel<T, W, true>, job, rows.blocks(), stream);
    }
    if (error == cudaSuccess) error = launch_channels<kFinishBackward, R>(job, b.channels + learnable, stream);
    job.grid = rows;
    if (error == cudaSuccess) error = launch(input_gradient_kernel<T, W>, job, rows.blocks(), stream);
    return error;
  });
}

}  // namespace

#if SNNFAST_CUDA_PART != 2
std::string cuda_batch_norm_statistics(const BatchNorm& b, int device, void* stream) {
  return on_device(device, [&] {
    return with_statistics_shape(b.norm, [&](auto kind, auto W) {
      using T = typename decltype(kind)::T;
      using R = typename StateOf<T>::type;
      BatchNormJob job{b, grid_of_rows(b.norm, W)};
      lay_out<T>(job, kStatistics, false);
      const cudaError_t error = launch(sums_kernel<T, decltype(W)::value, false>, job, job.grid.blocks(), stream);
      if (error != cudaSuccess) return error;
      return launch_channels<kFinishStatistics, R>(job, b.norm.channels, stream);
    });
  });
}

std::string cuda_batch_norm_forward(const BatchNorm& b, int device, void* stream) {
  return on_device(device, [&] {
    return with_simple_kind(b.norm.call, [&](auto kind) {
      using Neuron = typename decltype(kind)::Neuron;
      using T = typename decltype(kind)::T;
      using R = typename StateOf<T>::type;
      return with_norm_shape<T, false>(b.norm, [&](auto shape) {
        using Shape = decltype(shape);
        BatchNormJob job{b, grid_of_neurons(b.norm, Shape::W, false)};
        lay_out<T>(job, kForward, false);
        const cudaError_t error = launch_constants<R>(job, stream);
        if (error != cudaSuccess) return error;
        return launch(batch_norm_forward_kernel<Neuron, T, Shape::kT, Shape::kAhead, Shape::W, Shape::kSkip>, job,
                      job.grid.blocks(), stream);
      });
    });
  });
}
#endif

#if SNNFAST_CUDA_PART != 1
std::string cuda_batch_norm_backward(const BatchNorm& b, int device, void* stream) {
  return on_device(device, [&] {
    return with_simple_kind(b.norm.call, [&](auto kind) {
      using Neuron = typename decltype(kind)::Neuron;
      using T = typename decltype(kind)::T;
      using R = typename StateOf<T>::type;
      return with_norm_shape<T, true>(b.norm, [&](auto shape) {
        using Shape = decltype(shape);
        constexpr auto sums =
            batch_norm_backward_kernel<Neuron, T, Shape::kT, Shape::kAhead, Shape::W, true, Shape::kSkip>;
        BatchNormJob job{b, grid_of_neurons(b.norm, Shape::W, true)};
        lay_out<T>(job, kBackward, Neuron::kLearnable);
        job.keeps_gradient = keeps_gradient<T>(b.norm);
        cudaError_t error = launch_constants<R>(job, stream);
        if (error == cudaSuccess) error = launch(sums, job, job.grid.blocks(), stream);
        if (error == cudaSuccess && job.keeps_gradient) return finish_from_kept<T, R>(job, Neuron::kLearnable, stream);
        if (error == cudaSuccess)
          error = launch_channels<kFinishBackward, R>(job, b.norm.channels + Neuron::kLearnable, stream);
        if constexpr (sizeof(T) > 2)
          if (error == cudaSuccess && b.norm.batch_statistics) {
            job.grid = grid_of_neurons(b.norm, Shape::W, false);
            job.b.norm.call.grad_state[0] = nullptr;  // has been written
            error =
                launch(batch_norm_backward_kernel<Neuron, T, Shape::kT, Shape::kAhead, Shape::W, false, Shape::kSkip>,
                       job, job.grid.blocks(), stream);
          }
        return error;
      });
    });
  });
}

int64_t cuda_batch_norm_workspace(const BatchNorm& b, BatchNormPass pass) {
  BatchNorm nowhere = b;
  nowhere.workspace = nullptr;
  if (pass == kStatistics)
    return with_statistics_shape(b.norm, [&](auto kind, auto W) {
      BatchNormJob job{nowhere, grid_of_rows(b.norm, W)};
      return lay_out<typename decltype(kind)::T>(job, pass, false);
    });
  return with_simple_kind(b.norm.call, [&](auto kind) {
    using T = typename decltype(kind)::T;
    return with_norm_shape<T, true>(b.norm, [&](auto shape) {
      BatchNormJob job{nowhere, grid_of_neurons(b.norm, decltype(shape)::W, true)};
      return lay_out<T>(job, pass, decltype(kind)::Neuron::kLearnable);
    });
  });
}
#endif

}  // namespace snnfast
