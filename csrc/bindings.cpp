// snnfast._C: raw pointers, sizes and ids in, kernels out. No torch header, so one build serves every torch. The
// arguments come from snnfast/backends/native.py alone, which has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"
#ifdef SNNFAST_CUDA
#include "cuda.h"
#include "cuda_bn.h"
#endif

namespace py = pybind11;

namespace snnfast {
namespace {

int64_t element_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// ---- one neuron's constants, made once and kept by the caller ----
struct Config {
  Call call{};
  Config(int neuron, int surrogate, int flags, int division, double threshold, double v_reset, double tau, double alpha,
         double gain, double v_leak, double v_init) {
    call.neuron = neuron;
    call.surrogate = surrogate;
    call.flags = flags;
    call.division = division;
    call.threshold = threshold;
    call.v_reset = v_reset;
    call.tau = tau;
    call.alpha = alpha;
    call.gain = gain;
    call.v_leak = v_leak;
    call.v_init = v_init;
  }
};

// The arguments of every call, in native.py's order: sizes, inputs (dynamics.Inputs), and then the outputs, or the
// outputs' gradients and the inputs'.
#define SNNFAST_INPUTS                                                                                            \
  int dtype, int64_t T, int64_t N, uintptr_t x, uintptr_t v0, uintptr_t i0, uintptr_t decay, uintptr_t threshold, \
      uintptr_t beta, uintptr_t current_decay, int own_each
#define SNNFAST_INPUT_NAMES dtype, T, N, x, v0, i0, decay, threshold, beta, current_decay, own_each
#define SNNFAST_OUTPUTS uintptr_t s, uintptr_t v, uintptr_t i, uintptr_t v_seq
#define SNNFAST_OUTPUT_NAMES s, v, i, v_seq
#define SNNFAST_GRADIENTS                                                                                          \
  uintptr_t grad_s, uintptr_t grad_v, uintptr_t grad_i, uintptr_t grad_v_seq, uintptr_t grad_x, uintptr_t grad_v0, \
      uintptr_t grad_i0, uintptr_t grad_threshold, uintptr_t grad_beta, uintptr_t grad_current_decay
#define SNNFAST_GRADIENT_NAMES \
  grad_s, grad_v, grad_i, grad_v_seq, grad_x, grad_v0, grad_i0, grad_threshold, grad_beta, grad_current_decay

Call forward_call(const Config& config, SNNFAST_INPUTS, SNNFAST_OUTPUTS) {
  Call call = config.call;
  call.dtype = dtype;
  call.T = T;
  call.N = N;
  call.x = pointer(x);
  call.state[0] = pointer(v0);
  call.state[1] = pointer(i0);
  call.decay = pointer(decay);
  call.own[kThreshold] = pointer(threshold);
  call.own[kBeta] = pointer(beta);
  call.own[kCurrentDecay] = pointer(current_decay);
  call.own_each = own_each;
  call.s = pointer(s);
  call.final_state[0] = pointer(v);
  call.final_state[1] = pointer(i);
  call.v_seq = pointer(v_seq);
  return call;
}

Call backward_call(const Config& config, SNNFAST_INPUTS, SNNFAST_GRADIENTS) {
  Call call = forward_call(config, SNNFAST_INPUT_NAMES, 0, 0, 0, 0);
  call.grad_s = pointer(grad_s);
  call.grad_final_state[0] = pointer(grad_v);
  call.grad_final_state[1] = pointer(grad_i);
  call.grad_v_seq = pointer(grad_v_seq);
  call.grad_x = pointer(grad_x);
  call.grad_state[0] = pointer(grad_v0);
  call.grad_state[1] = pointer(grad_i0);
  call.grad_own[kThreshold] = pointer(grad_threshold);
  call.grad_own[kBeta] = pointer(grad_beta);
  call.grad_own[kCurrentDecay] = pointer(grad_current_decay);
  return call;
}

void prepare_cpu_output(Call& call, int threads, void* output) {
  const bool one_step = call.flags & kConstantInput && output == call.grad_x;
  const int64_t bytes = (one_step ? 1 : call.T) * call.N * element_size(call.dtype);
  call.threads = threads;
  call.stream_stores = bytes >= stream_stores_from;
  if (output && bytes >= int64_t(4) << 20) advise_huge_pages(output, bytes);
}

void cpu_forward(const Config& config, int threads, SNNFAST_INPUTS, SNNFAST_OUTPUTS) {
  py::gil_scoped_release release;
  Call call = forward_call(config, SNNFAST_INPUT_NAMES, SNNFAST_OUTPUT_NAMES);
  prepare_cpu_output(call, threads, call.s);
  advise_huge_pages(call.final_state[0], call.N * (dtype == kFloat64 ? 8 : 4));
  kernels->forward(call);
}

// Returns the gradient of the decay, 0 for a neuron without one.
double cpu_backward(const Config& config, int threads, SNNFAST_INPUTS, SNNFAST_GRADIENTS) {
  py::gil_scoped_release release;
  Call call = backward_call(config, SNNFAST_INPUT_NAMES, SNNFAST_GRADIENT_NAMES);
  prepare_cpu_output(call, threads, call.grad_x);
  std::vector<double> partial(call.decay ? backward_blocks(T, N) : 0);
  call.grad_decay_partial = partial.data();
  if (!kernels->backward(call)) throw std::bad_alloc();
  double sum = 0;
  for (double part : partial) sum += part;
  return sum;
}

// The arguments of every pass with batch norm: the neuron's, where the channels lie, the norm's, and the passes'
// tensors in the order of native_batch_norm.py.
#define SNNFAST_NORM                                                                                                 \
  const Config &config, int pass, int dtype, int64_t T, int64_t N, uintptr_t x, uintptr_t v0, uintptr_t decay,       \
      int64_t channels, int64_t inner, int64_t groups, bool batch_statistics, uintptr_t mean, uintptr_t var,         \
      uintptr_t running_mean, uintptr_t running_var, int running_dtype, double momentum, uintptr_t weight,           \
      int weight_dtype, uintptr_t bias, int bias_dtype, double eps, int connect, uintptr_t skip, uintptr_t s,        \
      uintptr_t v, uintptr_t grad_s, uintptr_t grad_v, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, \
      uintptr_t grad_v0, uintptr_t grad_decay, uintptr_t grad_skip
#define SNNFAST_NORM_NAMES                                                                                            \
  config, pass, dtype, T, N, x, v0, decay, channels, inner, groups, batch_statistics, mean, var, running_mean,        \
      running_var, running_dtype, momentum, weight, weight_dtype, bias, bias_dtype, eps, connect, skip, s, v, grad_s, \
      grad_v, grad_x, grad_weight, grad_bias, grad_v0, grad_decay, grad_skip

BatchNorm norm_of(SNNFAST_NORM) {
  (void)pass;
  BatchNorm b{};
  b.norm.call = backward_call(config, dtype, T, N, x, v0, 0, decay, 0, 0, 0, 0, grad_s, grad_v, 0, 0, grad_x, grad_v0,
                              0, 0, 0, 0);
  b.norm.call.s = pointer(s);
  b.norm.call.final_state[0] = pointer(v);
  b.norm.channels = channels;
  b.norm.inner = inner;
  b.norm.groups = groups;
  b.norm.batch_statistics = batch_statistics;
  b.norm.connect = connect;
  b.norm.skip = pointer(skip);
  b.norm.grad_skip = pointer(grad_skip);
  b.mean = static_cast<double*>(pointer(mean));
  b.var = static_cast<double*>(pointer(var));
  b.running_mean = pointer(running_mean);
  b.running_var = pointer(running_var);
  b.running_dtype = running_dtype;
  b.momentum = momentum;
  b.weight = pointer(weight);
  b.bias = pointer(bias);
  b.weight_dtype = weight_dtype;
  b.bias_dtype = bias_dtype;
  b.eps = eps;
  b.grad_weight = pointer(grad_weight);
  b.grad_bias = pointer(grad_bias);
  b.grad_decay = pointer(grad_decay);
  return b;
}

void cpu_batch_norm(int threads, SNNFAST_NORM) {
  py::gil_scoped_release release;
  BatchNorm b = norm_of(SNNFAST_NORM_NAMES);
  prepare_cpu_output(b.norm.call, threads, pass == kForward ? b.norm.call.s : b.norm.call.grad_x);
  if (!kernels->batch_norm(b, BatchNormPass(pass))) throw std::bad_alloc();
}

// ---- tensors of two values as bits ----
BitsCall bits_call(int element_bytes, int64_t n, uintptr_t elements, uintptr_t bits, uint64_t one) {
  BitsCall call{};
  call.n = n;
  call.element_bytes = element_bytes;
  call.elements = pointer(elements);
  call.bits = pointer(bits);
  call.one = one;
  return call;
}

// Returns the value that is not 0, as its bits, or None where there are several.
py::object cpu_pack_bits(int threads, int element_bytes, int64_t n, uintptr_t elements, uintptr_t bits) {
  uint64_t one = 0;
  bool packed;
  {
    py::gil_scoped_release release;
    BitsCall call = bits_call(element_bytes, n, elements, bits, 0);
    call.threads = threads;
    packed = kernels->pack_bits(call, &one);
  }
  return packed ? py::object(py::int_(one)) : py::object(py::none());
}

void cpu_unpack_bits(int threads, int element_bytes, int64_t n, uintptr_t elements, uintptr_t bits, uint64_t one) {
  py::gil_scoped_release release;
  BitsCall call = bits_call(element_bytes, n, elements, bits, one);
  call.threads = threads;
  if (n * element_bytes >= int64_t(4) << 20) advise_huge_pages(call.elements, n * element_bytes);
  kernels->unpack_bits(call);
}

// ---- the loss of feature distillation ----
void cpu_feature_loss(int threads, int64_t T, int64_t images, int64_t from, int64_t to, int64_t places,
                      uintptr_t student, uintptr_t teacher, uintptr_t weight, uintptr_t bias, uintptr_t loss,
                      uintptr_t mean, uintptr_t grad_student, uintptr_t grad_weight, uintptr_t grad_bias) {
  py::gil_scoped_release release;
  FeatureCall call{};
  call.T = T;
  call.images = images;
  call.from = from;
  call.to = to;
  call.places = places;
  call.student = pointer(student);
  call.teacher = pointer(teacher);
  call.weight = pointer(weight);
  call.bias = pointer(bias);
  call.loss = pointer(loss);
  call.mean = pointer(mean);
  call.grad_student = pointer(grad_student);
  call.grad_weight = pointer(grad_weight);
  call.grad_bias = pointer(grad_bias);
  call.threads = threads;
  const std::unique_ptr<float[]> partial(new float[feature_partial_floats(call)]);
  call.partial = partial.get();
  if (!kernels->feature_loss(call)) throw std::bad_alloc();
}

// ---- max-pooling ----
PoolCall pool_call(int threads, int dtype, int64_t planes, int64_t H, int64_t W, int64_t C, uintptr_t chosen) {
  PoolCall call{};
  call.threads = threads;
  call.dtype = dtype;
  call.planes = planes;
  call.H = H;
  call.W = W;
  call.C = C;
  call.chosen = pointer(chosen);
  return call;
}

void run_pool(const PoolCall& call, void* output, int64_t elements, bool backward) {
  const int64_t bytes = elements * element_size(call.dtype);
  if (bytes >= int64_t(4) << 20) advise_huge_pages(output, bytes);
  kernels->max_pool(call, backward);
}

void cpu_max_pool(int threads, int dtype, int64_t planes, int64_t H, int64_t W, int64_t C, uintptr_t x, uintptr_t y,
                  uintptr_t chosen) {
  py::gil_scoped_release release;
  PoolCall call = pool_call(threads, dtype, planes, H, W, C, chosen);
  call.x = pointer(x);
  call.y = pointer(y);
  run_pool(call, call.y, planes * (H / 2) * (W / 2) * C, false);
}

void cpu_max_pool_backward(int threads, int dtype, int64_t planes, int64_t H, int64_t W, int64_t C, uintptr_t grad_y,
                           uintptr_t chosen, uintptr_t grad_x) {
  py::gil_scoped_release release;
  PoolCall call = pool_call(threads, dtype, planes, H, W, C, chosen);
  call.grad_y = pointer(grad_y);
  call.grad_x = pointer(grad_x);
  run_pool(call, call.grad_x, planes * H * W * C, true);
}

// ---- event-driven convolution ----
// `sizes` are EventCall's numbers in their order.
EventCall event_call(int threads, const std::array<int64_t, 15>& sizes) {
  EventCall call{};
  call.threads = threads;
  int64_t* const to[] = {&call.images,   &call.C,         &call.H,         &call.W,          &call.O,
                         &call.Ho,       &call.Wo,        &call.kernel_h,  &call.kernel_w,   &call.stride_h,
                         &call.stride_w, &call.padding_h, &call.padding_w, &call.dilation_h, &call.dilation_w};
  for (size_t i = 0; i < sizes.size(); ++i) *to[i] = sizes[i];
  return call;
}

int64_t cpu_count_events(int threads, int64_t n, uintptr_t x) {
  py::gil_scoped_release release;
  return kernels->count_events(static_cast<const float*>(pointer(x)), n, threads);
}

void cpu_pack_event_weights(int threads, const std::array<int64_t, 15>& sizes, bool channels_last, uintptr_t weight,
                            uintptr_t bias, uintptr_t packed) {
  py::gil_scoped_release release;
  EventCall call = event_call(threads, sizes);
  call.weight_channels_last = channels_last;
  kernels->pack_event_weights(call, static_cast<const float*>(pointer(weight)),
                              static_cast<const float*>(pointer(bias)), static_cast<float*>(pointer(packed)));
}

void cpu_event_convolve(int threads, const std::array<int64_t, 15>& sizes, bool channels_last, uintptr_t x,
                        uintptr_t packed, uintptr_t y) {
  py::gil_scoped_release release;
  EventCall call = event_call(threads, sizes);
  call.channels_last = channels_last;
  call.x = static_cast<const float*>(pointer(x));
  call.weight = static_cast<const float*>(pointer(packed));
  call.y = static_cast<float*>(pointer(y));
  const int64_t bytes = call.images * call.O * call.Ho * call.Wo * int64_t(sizeof(float));
  if (bytes >= int64_t(4) << 20) advise_huge_pages(call.y, bytes);
  if (!kernels->event_convolve(call)) throw std::bad_alloc();
}

void cpu_event_weight_gradient(int threads, const std::array<int64_t, 15>& sizes, bool channels_last,
                               bool weight_channels_last, uintptr_t x, uintptr_t grad_y, uintptr_t grad_weight,
                               uintptr_t workspace) {
  py::gil_scoped_release release;
  EventCall call = event_call(threads, sizes);
  call.channels_last = channels_last;
  call.weight_channels_last = weight_channels_last;
  call.x = static_cast<const float*>(pointer(x));
  call.grad_y = static_cast<const float*>(pointer(grad_y));
  call.grad_weight = static_cast<float*>(pointer(grad_weight));
  call.workspace = static_cast<float*>(pointer(workspace));
  if (!kernels->event_weight_gradient(call)) throw std::bad_alloc();
}

#ifdef SNNFAST_CUDA
void throw_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("snnfast: CUDA: " + error);
}

void cuda_forward_(const Config& config, int device, uintptr_t stream, SNNFAST_INPUTS, SNNFAST_OUTPUTS) {
  throw_if(cuda_forward(forward_call(config, SNNFAST_INPUT_NAMES, SNNFAST_OUTPUT_NAMES), device, pointer(stream)));
}

void cuda_backward_(const Config& config, int device, uintptr_t stream, SNNFAST_INPUTS, SNNFAST_GRADIENTS,
                    uintptr_t grad_decay_partial, uintptr_t workspace) {
  Call call = backward_call(config, SNNFAST_INPUT_NAMES, SNNFAST_GRADIENT_NAMES);
  call.grad_decay_partial = pointer(grad_decay_partial);
  call.workspace = pointer(workspace);
  throw_if(cuda_backward(call, device, pointer(stream)));
}

void cuda_batch_norm_(int device, uintptr_t stream, uintptr_t workspace, SNNFAST_NORM) {
  BatchNorm b = norm_of(SNNFAST_NORM_NAMES);
  b.workspace = pointer(workspace);
  throw_if(cuda_batch_norm(b, BatchNormPass(pass), device, pointer(stream)));
}
int64_t cuda_batch_norm_workspace_(SNNFAST_NORM) {
  return cuda_batch_norm_workspace(norm_of(SNNFAST_NORM_NAMES), BatchNormPass(pass));
}

void cuda_pack_bits_(int device, uintptr_t stream, int element_bytes, int64_t n, uintptr_t elements, uintptr_t bits,
                     uint64_t one, uintptr_t other) {
  BitsCall call = bits_call(element_bytes, n, elements, bits, one);
  call.other = pointer(other);
  throw_if(cuda_pack_bits(call, device, pointer(stream)));
}

void cuda_unpack_bits_(int device, uintptr_t stream, int element_bytes, int64_t n, uintptr_t elements, uintptr_t bits,
                       uint64_t one, uintptr_t other) {
  BitsCall call = bits_call(element_bytes, n, elements, bits, one);
  call.other = pointer(other);
  throw_if(cuda_unpack_bits(call, device, pointer(stream)));
}

// (bytes of workspace, number of partial sums of the decay's gradient)
py::tuple cuda_backward_needs(const Config& config, int dtype, int64_t T, int64_t N) {
  Call call = config.call;
  call.dtype = dtype;
  call.T = T;
  call.N = N;
  return py::make_tuple(cuda_backward_workspace(call), cuda_decay_partials(call));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "snnfast's compiled kernels. Internal: use snnfast.functional or the modules.";
  py::class_<Config>(m, "Config")
      .def(py::init<int, int, int, int, double, double, double, double, double, double, double>());
  m.def("cpu_forward", &cpu_forward);
  m.def("cpu_backward", &cpu_backward);
  m.def("cpu_batch_norm", &cpu_batch_norm);
  m.def("cpu_pack_bits", &cpu_pack_bits);
  m.def("cpu_unpack_bits", &cpu_unpack_bits);
  m.def("cpu_feature_loss", &cpu_feature_loss);
  m.def("cpu_max_pool", &cpu_max_pool);
  m.def("cpu_max_pool_backward", &cpu_max_pool_backward);
  m.def("cpu_count_events", &cpu_count_events);
  m.def("event_packed_floats", [](const std::array<int64_t, 15>& s) { return event_packed_floats(event_call(1, s)); });
  m.def("cpu_pack_event_weights", &cpu_pack_event_weights);
  m.def("cpu_event_convolve", &cpu_event_convolve);
  m.def("event_workspace_floats",
        [](const std::array<int64_t, 15>& s) { return event_workspace_floats(event_call(1, s)); });
  m.def("cpu_event_weight_gradient", &cpu_event_weight_gradient);
  m.def("corrected_division_is_exact", [](float tau) { return kernels->corrected_division_is_exact(tau); });
  m.def("cpu_sets", &cpu_sets, "Instruction sets of this build that this processor has, best first.");
  m.def("cpu_set", [] { return kernels->name; });
  m.def("set_cpu_set", &set_cpu_set, "For tests and benchmarks: use this instruction set from now on.");
  m.def("stream_stores_from", [] { return stream_stores_from; }, "Bytes of output from which stores stream.");
  m.def("set_stream_stores_from", [](int64_t bytes) { stream_stores_from = bytes; });
  m.attr("calls") = 10;  // raise it with every change of a signature here; native.py refuses another build's
  m.attr("surrogates") = py::dict();
  m.attr("neurons") = py::dict();
#define SNNFAST_NAME(id, name) m.attr("surrogates")[#name] = id;
  SNNFAST_SURROGATES(SNNFAST_NAME)
#undef SNNFAST_NAME
#define SNNFAST_NAME(id, name) m.attr("neurons")[#name] = id;
  SNNFAST_NEURONS(SNNFAST_NAME)
#undef SNNFAST_NAME
#ifdef SNNFAST_CUDA
  m.def("cuda_forward", &cuda_forward_);
  m.def("cuda_backward", &cuda_backward_);
  m.def("cuda_pack_bits", &cuda_pack_bits_);
  m.def("cuda_unpack_bits", &cuda_unpack_bits_);
  m.def("cuda_backward_needs", &cuda_backward_needs);
  m.def("cuda_batch_norm", &cuda_batch_norm_);
  m.def("cuda_batch_norm_workspace", &cuda_batch_norm_workspace_);
  m.def("cuda_probe", &cuda_probe);
  m.attr("cuda_architectures") = cuda_architectures();
#else
  m.attr("cuda_architectures") = py::none();
#endif
}

}  // namespace snnfast
