# The tasks live in dev.py, which also runs where there is no make.
PYTHON ?= python3

.PHONY: setup quickstart check test fix docs
setup quickstart check test fix docs:
	$(PYTHON) dev.py $@
