# Builds ./train, the whole trainer: one C compiler and make are enough. What else is there (OpenMP,
# two header-only packages, nvcc) is found by compiling or linking a probe, never by looking for
# names, and a line says what was found and how to get what was not.
#
#   make              ./train                        make SAN=1       with address and UB sanitizers
#   make deps         fetch jsmn.h and stb, no root  make ACT=float   activations in fp32
#   make test         all tests without a GPU        make help        the rest
# Everything that is built lies in build/, except ./train. The flags of the last build are recorded
# in build/flags, so that switching a flavour, or finding a package, builds again.

CC ?= cc
NVCC ?= nvcc
CUDA_ARCH ?= 90a
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := train
.DELETE_ON_ERROR:
.PHONY: deps test test-gpu check cuda-check twins kernels.o clean help FORCE

# --------------------------------------------------------------------------------------------------
# What is here. A probe costs some 20 ms; the goals that do not compile skip them all.

NEEDS_CC := $(filter-out clean help,$(or $(MAKECMDGOALS),train))
HASH := \#
INCLUDES := -isystem .deps/usr/include
# $(call probe,lines of C,flags): "yes" if it compiles and links
probe = $(shell mkdir -p build; printf '%s\n' $(1) 'int main(void) { return 0; }' | \
    $(CC) -x c $(CPPFLAGS) $(CFLAGS) - -o build/probe $(INCLUDES) $(2) $(LDFLAGS) \
    2>/dev/null && echo yes; rm -f build/probe)
ifneq ($(NEEDS_CC),)
  ifneq ($(NEEDS_CC),deps)
    ifneq ($(call probe,),yes)
      $(error ✗ no working C compiler ('$(CC)') -> apt-get install gcc libc6-dev, or make CC=...)
    endif
  endif
  NATIVE := $(if $(call probe,,-march=native),-march=native)
  OPENMP := $(call probe,'$(HASH)include <omp.h>' 'int n(void) { return omp_get_num_procs(); }', \
      -fopenmp)
  JSMN := $(call probe,'$(HASH)include <stdlib.h>' '$(HASH)include <jsmn.h>')
  STB := $(call probe,'$(HASH)include <stb/stb_ds.h>' '$(HASH)include <stb/stb_image_write.h>')
endif

# --------------------------------------------------------------------------------------------------
# Flags. CPPFLAGS, CFLAGS, LDFLAGS and LDLIBS from outside are honoured. -isystem: warnings are for
# our code. Never -ffast-math: it may reorder sums, and bits must not depend on the compiler's mood.

OPTIMIZE := -O3
ifeq ($(SAN),1)
  OPTIMIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
  export ASAN_OPTIONS := detect_leaks=0:$(ASAN_OPTIONS)  # what lives until exit is never freed
endif
WARNINGS := -Wall -Wextra $(if $(OPENMP),,-Wno-unknown-pragmas)
FLAVOUR := $(if $(ACT),-DACT=$(ACT)) $(if $(REAL),-DREAL=$(REAL))
BASE := $(CPPFLAGS) -std=gnu11 $(OPTIMIZE) $(NATIVE) $(CFLAGS) $(if $(OPENMP),-fopenmp) \
    $(WARNINGS) $(INCLUDES)
LIBS = $(LDFLAGS) $(LDLIBS) -lm

# What nvcc can do: yes, or the reason why not. Asked once: it takes a second.
GENCODE := -gencode=arch=compute_$(CUDA_ARCH),code=sm_$(CUDA_ARCH)
NVCC_WORKS = $(shell command -v $(firstword $(NVCC) none) > /dev/null || { echo missing; exit; }; \
    mkdir -p build; echo '__global__ void probe(void) { }' > build/probe.cu; $(NVCC) $(GENCODE) \
    -c build/probe.cu -o build/probe.o > build/probe.log 2>&1 && echo yes || echo broken)
# ./train gets the kernels where nvcc works, unless another flavour is asked for: they store bf16.
# Several GPUs need NCCL: beside CUDA, in the system, or in NCCL=DIR.
CUDA_HOME = $(realpath $(dir $(shell command -v $(NVCC)))..)
NCCL_LINK = $(NCCL:%=-L%/lib -Xlinker -rpath=%/lib) -l:libnccl.so.2
ifneq ($(NEEDS_CC),)
  CUDA ?= $(if $(ACT)$(REAL)$(filter 1,$(SAN)),0,$(if $(filter yes,$(NVCC_WORKS)),1,0))
  CUDA := $(CUDA)
  HAS_NCCL := $(if $(CUDA:0=),$(call probe,'$(HASH)include <nccl.h>' 'int n(void) { return \
      ncclGroupEnd(); }',$(NCCL:%=-I%/include) $(CUDA_HOME:%=-I%/include -L%/lib64) $(NCCL_LINK)))
  # The recorded flags are rewritten, and so everything is rebuilt, only when they differ.
  SIGNATURE := $(strip $(CC) $(BASE) $(FLAVOUR) $(LIBS) $(NVCC) $(CUDA_ARCH) cuda=$(CUDA) \
      jsmn=$(JSMN) stb=$(STB) nccl=$(HAS_NCCL)$(NCCL))
  ifneq ($(shell cat build/flags 2>/dev/null),$(SIGNATURE))
    build/flags: FORCE
  endif
endif
build/flags:
	@mkdir -p build && echo '$(SIGNATURE)' > $@

# --------------------------------------------------------------------------------------------------
# The trainer: train.c includes every other C file, so it is one compiler run. kernels.cu is the
# other translation unit; nvcc compiles it without a GPU, and ./train looks for one when it starts.

MODULES := $(wildcard *.c dev/*.c dev/data/*.c)
train: $(MODULES) kernels.cu build/flags $(if $(filter 1,$(CUDA)),build/kernels.o)
	@printf '%s\n' \
	    "$(if $(OPENMP),✓ OpenMP found,✗ OpenMP not found -> one thread; clang needs libomp-dev)" \
	    "$(if $(JSMN),✓ jsmn.h found,✗ jsmn.h not found -> no -m and no --resume; make deps)" \
	    "$(if $(STB),✓ stb headers found,✗ stb headers not found -> no loss.png; make deps)" \
	    "$(if $(filter 1,$(CUDA)),✓ nvcc found: kernels included,✗ no nvcc, ACT or SAN -> CPU only)" \
	    "$(if $(HAS_NCCL),✓ NCCL found,✗ NCCL not found -> at most one GPU; libnccl-dev or NCCL=DIR)"
	@rm -f $@
ifeq ($(CUDA),1)
	$(CC) $(BASE) $(FLAVOUR) -DUSE_CUDA -MMD -MP -MF build/train.d -MT $@ -c train.c -o build/train.o
	$(NVCC_LINK) build/train.o build/kernels.o -o $@ $(CUDA_LIBS)
else
	$(CC) $(BASE) $(FLAVOUR) -MMD -MP -MF build/train.d train.c -o $@ $(LIBS)
endif

# 177: a helper of the contract that only C files use.
NVCCFLAGS := -O3 -std=c++17 $(GENCODE) -Xcompiler -Wall,-Wextra -Werror all-warnings \
    -diag-suppress 177 $(if $(HAS_NCCL),-DUSE_NCCL $(NCCL:%=-I%/include))
NVCC_LINK = $(NVCC) $(if $(OPENMP),-Xcompiler -fopenmp) -Xlinker -rpath=$(CUDA_HOME)/lib64
CUDA_LIBS = -lcublas $(if $(HAS_NCCL),$(NCCL_LINK)) $(LIBS)
build/kernels.o: kernels.cu dev/device.cu dev/launchers.h build/flags
	$(NVCC) $(NVCCFLAGS) -c $< -o $@

kernels.o cuda-check:
	@case $(NVCC_WORKS) in \
	yes) $(MAKE) build/kernels.o && echo "✓ nvcc found: kernels.cu compiles for sm_$(CUDA_ARCH)" ;; \
	missing) echo "✗ nvcc not found -> kernels.cu is not compiled; CUDA toolkit, or NVCC=..." ;; \
	*) cat build/probe.log; echo "✗ nvcc fails on an empty kernel -> see above"; exit 1 ;; esac

# --------------------------------------------------------------------------------------------------
# Packages: two Debian packages of headers are unpacked into .deps, which needs no root. Where the
# system's package lists are empty (containers) or stale, lists of our own are fetched for it.

APT := apt-get -qq -oAPT::Sandbox::User=root -oAcquire::Retries=3
OWN_LISTS := -oDir::State::Lists=$(CURDIR)/.deps/get/lists -oDir::Cache=$(CURDIR)/.deps/get/cache \
    -oAcquire::Languages=none
PACKAGES := libjsmn-dev libstb-dev
deps:
	@if [ "$(JSMN)$(STB)" = yesyes ]; then echo "✓ jsmn.h and stb headers found"; exit; fi; \
	help="or put jsmn.h into .deps/usr/include and stb_*.h into .deps/usr/include/stb by hand"; \
	if ! command -v apt-get > /dev/null || ! command -v dpkg > /dev/null; then \
	    echo "✗ apt-get not found: not a Debian -> install jsmn and stb, $$help"; exit 1; fi; \
	rm -rf .deps/get; trap 'rm -rf "$(CURDIR)/.deps/get"' EXIT; \
	mkdir -p .deps/get/lists/partial .deps/get/cache/archives/partial && cd .deps/get || exit 1; \
	$(APT) download $(PACKAGES) > log 2>&1 || { \
	    echo "→ the system's package lists lack $(PACKAGES); fetching lists of our own"; \
	    $(APT) $(OWN_LISTS) update >> log 2>&1; \
	    $(APT) $(OWN_LISTS) download $(PACKAGES) >> log 2>&1; } || { cat log; \
	    echo "✗ $(PACKAGES) not fetched (see above) -> check the network, $$help"; exit 1; }; \
	for deb in *.deb; do dpkg -x $$deb .. || exit 1; done; \
	echo "✓ jsmn.h and stb headers unpacked into .deps/usr/include"

# --------------------------------------------------------------------------------------------------
# Tests. Each program includes the module it tests. Five are built once more in double, where
# gradients can be checked, model and engine also in float; what is compared with PyTorch only in
# float. A program that does not build is counted as failed by test/run.sh, so -k goes on.

TESTS := $(sort $(addprefix build/test_,fp8 mxfp4 lora moe refit train data engine_float) \
    $(patsubst test/%.c,build/%,$(filter-out %_vectors.c,$(wildcard test/test_*.c)))) \
    $(addprefix build/test_,$(addsuffix _double,fp8 mxfp4 lora moe train) train_float vectors_float)

build/%_double: test/%.c build/flags
	$(COMPILE_TEST) -DACT=double -DREAL=double $(LIBS)
build/%_float: test/%.c build/flags
	$(COMPILE_TEST) -DACT=float $(LIBS)
build/%: test/%.c build/flags
	$(COMPILE_TEST) $(FLAVOUR) $(LIBS)
build/train_float: train.c build/flags      # for test_cli.sh
	$(COMPILE_TEST) -DACT=float $(LIBS)
COMPILE_TEST = @echo "cc $(@F)"; rm -f $@; $(CC) $(BASE) -MMD -MP -MF $@.d $< -o $@
-include $(wildcard build/*.d)

test:
	-@$(MAKE) -k CUDA=$(CUDA) $(if $(filter -j%,$(MAKEFLAGS)),,-j$(shell nproc)) \
	    train build/train_float $(TESTS) $(filter build/%,$(GPU_TESTS))
	@bash test/run.sh test/test_cli.sh $(TESTS) $(GPU_TESTS) test/test_house.sh

# The twins against the C text. Without nvcc, those of the list above say skipped.
build/%_gpu: test/%.c build/kernels.o build/flags
	@echo "cc $(@F)"; rm -f $@
	@$(CC) $(BASE) $(FLAVOUR) -DUSE_CUDA -MMD -MP -MF $@.d -MT $@ -c $< -o $@.o
	@$(NVCC_LINK) $@.o build/kernels.o -o $@ $(CUDA_LIBS)
test-gpu: GPU_TESTS = $(if $(CUDA:0=),$(patsubst %,build/test_%_gpu,kernels gpus engine) \
    test/test_ranks.sh)
test-gpu: test

# --------------------------------------------------------------------------------------------------
# Checks of the text itself: every module compiles alone and without a warning in every flavour, so
# that no hidden dependency grows; the arguments of GPU(...) lines stand in the function's order.

CHECKS := $(foreach m,$(MODULES),$(foreach f,bf16 float double serial,check/$(m).$(f)))
.PHONY: $(CHECKS)
FLAGS.bf16 := $(if $(OPENMP),-fopenmp)
FLAGS.float := $(FLAGS.bf16) -DACT=float
FLAGS.double := $(FLAGS.bf16) -DACT=double -DREAL=double
FLAGS.serial := -Wno-unknown-pragmas
$(CHECKS): check/%:
	@$(CC) $(CPPFLAGS) -std=gnu11 -O1 -Wall -Wextra -Werror $(INCLUDES) \
	    $(if $(OPENMP),,-Wno-unknown-pragmas) $(FLAGS$(suffix $*)) -S $(basename $*) -o /dev/null

twins:
	@awk -f test/twins.awk $(MODULES) dev/launchers.h kernels.cu dev/device.cu

check: $(CHECKS) twins cuda-check
	@echo "✓ each alone, -Wall -Wextra -Werror, as bf16, float, double, without OpenMP: $(MODULES)"

clean: ; rm -rf build train

help:
	@echo "make              ./train; ACT=float, SAN=1; CC, CFLAGS, CPPFLAGS, NVCC, CUDA_ARCH, NCCL"
	@echo "make deps         jsmn.h and stb into .deps (Debian, no root): -m, --resume, loss.png"
	@echo "make test         every test that needs no GPU; logs in build/*.log"
	@echo "make test-gpu     the same, and every kernel against its C text"
	@echo "make check        every module alone without a warning, GPU() lines, kernels.cu with nvcc"
	@echo "make clean        removes build/ and ./train"
