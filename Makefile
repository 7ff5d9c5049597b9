# The logic is in `labs`; these lines make its environment first. Without make: README.md.
PYTHON ?= python3
ARGS ?=
.PHONY: lab test interop colab browser
lab:  ; @$(PYTHON) labsupport/install.py && .venv/bin/labs lab $(ARGS)
test: ; @$(PYTHON) labsupport/install.py --all && .venv/bin/labs test $(ARGS)
interop: ; @$(PYTHON) labsupport/install.py --all && PYTHONPATH=tests .venv/bin/python -m interop $(ARGS)
colab: ; @$(PYTHON) labsupport/install.py --all && PYTHONPATH=tests .venv/bin/python -m colab $(ARGS)
browser: ; @$(PYTHON) labsupport/install.py --all && PYTHONPATH=tests .venv/bin/python -m browser $(ARGS)
