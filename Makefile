# The front door. Everything else is plain CMake: see CONTRIBUTING.md.

PREFIX ?= /usr/local
TEXT   ?=
ARGS   ?=
LAUNCH ?=
JOBS   ?= $(shell nproc)

build   := build/release
step    := .ci/step
model   := $(build)/examples/cumoe-language-model
texts   := $(if $(TEXT),--text '$(TEXT)',--text build/text/bible.txt --text build/text/jargon.txt)
results := examples/language_model/results
strict  := -DCUMOE_STRICT=ON $(if $(CI),-DCMAKE_COMPILE_WARNING_AS_ERROR=ON)
cuda    := -DCUMOE_CUDA=$$cuda
export TEXT LAUNCH

.PHONY: help demo test bench install coverage readme

help: ## this list
	@echo 'make TARGET:'
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14
	@echo 'Logs and results are below build/.'

demo: ## train language models on real text: experts against a dense layer (TEXT=path, ARGS="--seeds 3" or --table6, LAUNCH="mpirun -n 2")
	@.ci/packages demo
	@$(if $(TEXT),,$(step) 'fetch text' examples/language_model/fetch_text.sh build/text)
	@cuda=$$(.ci/cuda demo) && $(step) 'configure' cmake --preset release -DCUMOE_STRICT=OFF $(cuda)
	@$(step) 'build the demo' cmake --build $(build) --target cumoe-language-model -j $(JOBS)
	@GOMP_SPINCOUNT=3000 $(LAUNCH) $(model) $(if $(LAUNCH),--ranks mpi) $(texts) --out build/demo $(ARGS)

test: ## build everything and run all tests
	@.ci/packages $(if $(CI),ci,test)
	@cuda=$$(.ci/cuda test) && torch=$$(.ci/torch) && \
	    $(step) 'configure' cmake --preset release $(strict) $(cuda) -DCUMOE_TORCH=$$torch
	@$(step) 'build' cmake --build $(build) -j $(JOBS)
	@$(step) 'test' ctest --preset release -j $(JOBS)
	@sed -n '/tests passed/,$$p' build/logs/test.log
	@sed -n 's/^-- *CUDA backend */CUDA backend: /p' build/logs/configure.log

bench: ## measure this machine: the layer beside dense products, loops and PyTorch (ARGS="layer --help": cumoe-perf alone)
	@.ci/packages bench
	@cuda=$$(.ci/cuda bench) && $(step) 'configure' cmake --preset release -DCUMOE_STRICT=OFF $(cuda)
	@$(step) 'build the benchmark' cmake --build $(build) --target cumoe-perf -j $(JOBS)
	@$(if $(ARGS),$(build)/perf/cumoe-perf $(ARGS),perf/bench.sh $(build) build/bench)

install: ## install library, headers, cumoe-cost, cumoe-perf, cumoe-check, CMake package and pkg-config file (PREFIX=/usr/local)
	@.ci/packages install
	@cuda=$$(.ci/cuda install) && $(step) 'configure' cmake --preset release -DCUMOE_STRICT=OFF $(cuda)
	@$(step) 'build library and programs' cmake --build $(build) --target cumoe_to_install -j $(JOBS)
	@$(step) 'install' cmake --install $(build) --prefix '$(PREFIX)'
	@if [ "$$(id -u)" = 0 ] && [ -z "$$DESTDIR" ]; then ldconfig; fi
	@echo "installed below $(DESTDIR)$(PREFIX)"

readme: ## put the results of the last "make demo" and the code of the examples into README.md
	@mkdir -p $(results)
	@for file in build/demo/*.md build/demo/*.tsv build/demo/*.svg; do if [ -e "$$file" ]; then cp "$$file" $(results); fi; done
	@tests/checks/readme.sh --write

coverage: ## lines of host/ that the tests execute; fails below 90 %
	@.ci/packages coverage
	@$(step) 'configure coverage' cmake --preset coverage $(strict)
	@$(step) 'build coverage' cmake --build build/coverage -j $(JOBS)
	@find build/coverage -name '*.gcda' -delete
	@$(step) 'test coverage' ctest --preset coverage -j $(JOBS)
	@gcovr --root . --object-directory build/coverage --filter 'host/' --fail-under-line 90 \
	    --xml build/coverage/coverage.xml --txt -
