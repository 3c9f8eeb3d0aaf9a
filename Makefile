# RLHF, checked. Two commands matter: `make book` and `make test`. They need make, Python 3.11 or 3.12, and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# the first Python of the right version; `make PY=/path/to/python3.12 book` chooses another
PY ?= $(shell for p in python3 python3.12 python3.11 python; do \
        "$$p" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null </dev/null \
        && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
INSTRUCTOR := .venv-instructor
NOTEBOOKS := $(wildcard index.ipynb chapters/*.ipynb)
# pip tells of options it ignores and of versions newer than the pinned ones; errors and real warnings stay
PIP_ENV := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
QUIET := 2> >(sed -E '/WARNING: (Location|Url) .* is ignored|^\[notice\]|^$$/d' >&2)
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: help book test lab refresh models bench stress pdf instructor clean

help:  ## list these commands
	@echo "RLHF, checked: make COMMAND"
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 14

book: $(VENV)/.stamp build/vendor/.lock.json  ## build the book: _build/html/index.html
	@$(RUN) book/build.py
	@echo "The book is in _build/html/index.html"

test: $(VENV)/.stamp build/vendor/.lock.json build/vendor-test/.lock.json $(if $(CI),instructor)  ## build the book and check all of it
	@$(RUN) book/run_tests.py

lab: $(VENV)/.stamp  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab

refresh: $(VENV)/.stamp  ## run the notebooks and store their outputs; prints each page's seconds
	@$(RUN) book/refresh.py $(NOTEBOOKS)

models: $(VENV)/.stamp  ## train the models that pages start from and write them to chapters/data
	@$(RUN) book/make_models.py

stress: $(VENV)/.stamp  ## kill labelling and training 200 times each, at random moments
	@RLHFKIT_KILLS=200 $(RUN) -m pytest -q -s tests/kill

bench: $(VENV)/.stamp  ## run every benchmark
	@for f in benchmarks/*.py; do [ -e "$$f" ] || { echo "no benchmarks yet"; break; }; echo "== $$f"; $(RUN) "$$f"; done

pdf: $(VENV)/.stamp build/vendor/.lock.json  ## print the book: _build/rlhf-checked.pdf (needs Chromium)
	@$(RUN) book/make_pdf.py _build/rlhf-checked.pdf

instructor: $(INSTRUCTOR)/.stamp  ## set up the environment that makes and grades the homework

clean:  ## remove everything that make made
	rm -rf _build build $(VENV) $(INSTRUCTOR) rlhfkit.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .jupyter_cache

# Each environment carries a stamp with the checksums it was made from: a file that is newer but the same installs nothing.
$(VENV)/.stamp: requirements.txt constraints.txt pyproject.toml
	@if [ "$$(cat $@ 2>/dev/null)" != "$$(cksum $^)" ]; then \
	  if [ ! -x $(RUN) ]; then \
	    [ -n "$(PY)" ] || { echo "Python 3.11 or 3.12 is needed and neither was found. With another name: make PY=/path/to/python3.12 book"; exit 1; }; \
	    "$(PY)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in [(3, 11), (3, 12)] else f"Python 3.11 or 3.12 is needed; $(PY) is {v[0]}.{v[1]}")'; \
	    echo "setting up $(VENV) with $$("$(PY)" --version); a few minutes the first time"; \
	    "$(PY)" -m venv $(VENV) || { rm -rf $(VENV); echo "venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }; \
	  fi; \
	  $(PIP_ENV) $(RUN) -m pip install -q -r requirements.txt -c constraints.txt $(QUIET); \
	  $(PIP_ENV) $(RUN) -m pip install -q --no-deps -e . $(QUIET); \
	fi
	@cksum $^ > $@

INSTRUCTOR_FILES := $(wildcard homework/instructor-constraints.txt) requirements.txt constraints.txt pyproject.toml
$(INSTRUCTOR)/.stamp: $(INSTRUCTOR_FILES) | $(VENV)/.stamp
ifeq ($(wildcard homework/instructor-constraints.txt),)
	@echo "homework/instructor-constraints.txt is missing: no instructor environment"
else
	@if [ "$$(cat $@ 2>/dev/null)" != "$$(cksum $^)" ]; then \
	  echo "setting up $(INSTRUCTOR): otter-grader on top of $(VENV)'s packages"; \
	  [ -x $(INSTRUCTOR)/bin/python ] || $(RUN) -m venv --without-pip $(INSTRUCTOR); \
	  $(RUN) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(INSTRUCTOR)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"; \
	  $(PIP_ENV) $(RUN) -m pip --python $(INSTRUCTOR)/bin/python install -q --no-deps -r homework/instructor-constraints.txt $(QUIET); \
	fi
	@cksum $^ > $@
endif

build/vendor/.lock.json: book/vendor.lock.json book/vendor.py | $(VENV)/.stamp
	@$(RUN) book/vendor.py --dest build/vendor --lock $<

build/vendor-test/.lock.json: book/vendor-test.lock.json book/vendor.py | $(VENV)/.stamp
	@$(RUN) book/vendor.py --dest build/vendor-test --lock $<
