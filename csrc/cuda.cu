// Launches the kernels of cuda_kernels.cuh: chooses the bucket of T, the neurons per thread and the grid. Nothing here
// allocates or synchronises, so every call can be captured in a CUDA graph.
//
// SNNFAST_CUDA_PART splits the build in two that compile side by side: 1 is the forward and everything else, 2 the
// backward.
#define SNNFAST_GPU  // of neurons.h
#include "cuda.h"

#include "cuda_bits.cuh"
#include "cuda_kernels.cuh"

namespace snnfast {
namespace {

template <int kT_, bool kWide_>
struct Bucket {
  static constexpr int kT = kT_;
  static constexpr bool kWide = kWide_;
};

// The bucket of a call. float64 is there for checks and takes the open one; so does what cannot be read in wide
// accesses, the forward of 16 steps, which needs no tape, and every neuron with parameters of its own: there are many,
// and their calls come from other libraries' models.
template <class Neuron, class T, bool backward, class F>
auto with_bucket(const Call& c, bool wide, F f) {
  if (!wide) return f(Bucket<kOpen, false>());
  if constexpr (Neuron::kOwn > 0) {
    return f(Bucket<kOpen, (sizeof(T) < 8)>());
  } else if constexpr (sizeof(T) < 8) {
    switch (c.T) {
      case 1:
        return f(Bucket<1, true>());
      case 2:
        return f(Bucket<2, true>());
      case 4:
        return f(Bucket<4, true>());
      case 8:
        return f(Bucket<8, true>());
      case 16:
        return f(Bucket<(backward ? 16 : kOpen), true>());
    }
  }
  return f(Bucket<kOpen, true>());
}

// What a thread does at once, by the registers that it takes: neurons (W) times rows in flight (kAhead).
constexpr int smaller(int a, int b) { return a < b ? a : b; }
template <class T>
constexpr int kWidest = 16 / int(sizeof(T));

template <class Neuron, class T, class Bucket>
struct ForwardShape {
  static constexpr int kAhead = Bucket::kT != kOpen ? Bucket::kT : Neuron::kOwn > 0 ? 4 : 8;
  static constexpr int W = !Bucket::kWide ? 1 : kAhead <= 4 ? kWidest<T> : smaller(kWidest<T>, 4);
};
template <class Neuron, class T, class Bucket>
struct BackwardShape {
  static constexpr int kAhead = Bucket::kT != kOpen ? Bucket::kT : Neuron::kOwn > 0 ? 2 : 4;
  static constexpr int bytes_per_neuron = kAhead * int(Neuron::kTape * sizeof(typename StateOf<T>::type) + sizeof(T));
  // The open backward's tape lies in shared memory, of which a block may have 48 KiB.
  static constexpr int tape_bytes = Neuron::kTape * int(sizeof(typename StateOf<T>::type));
  static constexpr int open = smaller(kWidest<T>, tape_bytes > 16 ? 1 : 16 / tape_bytes);
  static constexpr int most = Bucket::kT == kOpen ? open : Bucket::kT <= 4 ? kWidest<T> : smaller(kWidest<T>, 4);
  static constexpr bool kFits = most * bytes_per_neuron <= 384;
  static constexpr int W = !Bucket::kWide ? 1 : kFits || most <= 2 ? most : most / 2;
};

template <class Neuron_, class T_>
struct Kind {
  using Neuron = Neuron_;
  using T = T_;
};
// f(Kind()) for the call's neuron and dtype.
template <class Neuron, class F>
auto with_dtype(const Call& c, F f) {
  switch (c.dtype) {
    case kFloat64:
      return f(Kind<Neuron, double>());
    case kBFloat16:
      return f(Kind<Neuron, __nv_bfloat16>());
    case kFloat16:
      return f(Kind<Neuron, __half>());
    default:
      return f(Kind<Neuron, float>());
  }
}
template <class F>
auto with_kind(const Call& c, F f) {
  switch (c.neuron) {
#define SNNFAST_CASE(id, Neuron) \
  case id:                       \
    return with_dtype<Neuron>(c, f);
    SNNFAST_NEURONS(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
  return with_dtype<IF>(c, f);
}

// Whether all rows of all tensors may be read and written W neurons at a time: every pointer on a whole access and
// every row a whole number of them.
template <class T>
bool wide_accesses(const Call& c, int W) {
  using R = typename StateOf<T>::type;
  const auto whole = [&](const void* pointer, size_t size) {
    const size_t bytes = size * W;
    return uintptr_t(pointer) % (bytes < 16 ? bytes : 16) == 0;
  };
  bool aligned = c.N % W == 0;
  for (const void* pointer : {c.x, c.grad_s, (const void*)c.s, (const void*)c.grad_x})
    aligned = aligned && whole(pointer, sizeof(T));
  for (const void* pointer : {c.grad_v_seq, (const void*)c.v_seq, (const void*)c.workspace})
    aligned = aligned && whole(pointer, sizeof(R));
  for (int k = 0; k < kMaxOwn; ++k)
    for (const void* pointer : {c.own_each >> k & 1 ? c.own[k] : nullptr, (const void*)c.grad_own[k]})
      aligned = aligned && whole(pointer, sizeof(R));
  for (int k = 0; k < kMaxStates; ++k)
    for (const void* pointer :
         {c.state[k], c.grad_final_state[k], (const void*)c.final_state[k], (const void*)c.grad_state[k]})
      aligned = aligned && whole(pointer, sizeof(R));
  return aligned;
}

std::string text(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here; the next call shall not report it again
  return cudaGetErrorString(error);
}

// Runs f on a device and leaves the thread's device as it was.
template <class F>
std::string on_device(int device, F f) {
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = f();
  if (previous != device) {
    const cudaError_t restored = cudaSetDevice(previous);
    if (error == cudaSuccess) error = restored;
  }
  return text(error);
}

// One thread for every W neurons.
template <class R>
cudaError_t launch(void (*kernel)(Call, Params<R>), Call c, int W, void* stream) {
  const int64_t neurons = int64_t(kThreads) * W, blocks = (c.N + neurons - 1) / neurons;
  Call without_decay = c;
  without_decay.decay = nullptr;  // a device pointer: the kernel reads it
  Params<R> p = params_of<R>(without_decay);
  return launch_blocks(kernel, blocks, kThreads, c, p, stream);
}

}  // namespace

#if SNNFAST_CUDA_PART != 2
std::string cuda_forward(const Call& call, int device, void* stream) {
  if (call.N == 0) return "";
  return on_device(device, [&] {
    return with_kind(call, [&](auto kind) {
      using Neuron = typename decltype(kind)::Neuron;
      using T = typename decltype(kind)::T;
      return with_bucket<Neuron, T, false>(call, wide_accesses<T>(call, kWidest<T>), [&](auto b) {
        using Shape = ForwardShape<Neuron, T, decltype(b)>;
        return launch(forward_kernel<Neuron, T, b.kT, Shape::kAhead, Shape::W>, call, Shape::W, stream);
      });
    });
  });
}

std::string cuda_pack_bits(const BitsCall& call, int device, void* stream) {
  return on_device(device, [&] { return launch_bits(call, true, stream); });
}

std::string cuda_unpack_bits(const BitsCall& call, int device, void* stream) {
  return on_device(device, [&] { return launch_bits(call, false, stream); });
}

std::string cuda_probe(int device) {
  return on_device(device, [] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, forward_kernel<IF, float, 1, 1, kWidest<float>>);
  });
}

int64_t cuda_backward_workspace(const Call& call) {
  const int64_t segments = (call.T + kSegment - 1) / kSegment;
  if (segments <= 1) return 0;
  return with_kind(call, [&](auto kind) {
    using Kind = decltype(kind);
    return (segments - 1) * call.N * Kind::Neuron::kStates * int64_t(sizeof(typename StateOf<typename Kind::T>::type));
  });
}

int64_t cuda_decay_partials(const Call& call) {
  return with_kind(call, [&](auto kind) { return decltype(kind)::Neuron::kLearnable ? decay_partials(call.N) : 0; });
}

const char* cuda_architectures() { return SNNFAST_CUDA_ARCH_LIST; }
#endif

#if SNNFAST_CUDA_PART != 1
std::string cuda_backward(const Call& call, int device, void* stream) {
  if (call.N == 0) return "";
  return on_device(device, [&] {
    return with_kind(call, [&](auto kind) {
      using Neuron = typename decltype(kind)::Neuron;
      using T = typename decltype(kind)::T;
      return with_bucket<Neuron, T, true>(call, wide_accesses<T>(call, kWidest<T>), [&](auto b) {
        using Shape = BackwardShape<Neuron, T, decltype(b)>;
        return launch(backward_kernel<Neuron, T, b.kT, Shape::kAhead, Shape::W>, call, Shape::W, stream);
      });
    });
  });
}
#endif

}  // namespace snnfast

#include "cuda_bn_launch.h"
