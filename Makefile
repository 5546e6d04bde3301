# The commands of the README. Debian 12 or 13, root.
PREFIX ?= /usr/local
PYTHON := .venv/bin/python
LIB := $(PREFIX)/lib/rbdnbd

.PHONY: help demo test torture fuzz bench lint install uninstall install-drop-in uninstall-drop-in clean

help:
	@echo "make demo       map an image of a throw-away Ceph cluster, write, read, compare"
	@echo "make test       run every test, none skipped (TIERS=unit,protocol for some)"
	@echo "make torture    break what can break, under load, for MINUTES=$(MINUTES) (docs/reliability.md)"
	@echo "make fuzz       give the server a million inputs, guided by coverage (RUNS=1000000)"
	@echo "make bench      measure it beside rbd-nbd and others (ARGS=--help for what else there is)"
	@echo "make lint       run ruff and mypy --strict"
	@echo "make install    install rbdnbd below PREFIX=$(PREFIX), for a host with a cluster of its own"
	@echo "make uninstall  remove it"
	@echo "make install-drop-in    install it, and its rbd-nbd in the place of Ceph's"
	@echo "make uninstall-drop-in  put Ceph's rbd-nbd back"

demo:
	@testbed/setup.sh demo
	@$(PYTHON) -m testbed.demo

TIERS ?= unit,protocol,cluster,kernel,debian13
test:
	@testbed/setup.sh test
	RBDNBD_TIERS=$(TIERS) $(PYTHON) -m pytest $(ARGS)

# ARGS=tests/kernel/test_x.py::test_y for one of them
MINUTES ?= 60
torture:
	@testbed/setup.sh test
	@$(PYTHON) -m testbed.torture --minutes $(MINUTES) $(ARGS)

RUNS ?= 1000000
FUZZ := handshake transmission
fuzz:
	@testbed/setup.sh fuzz
	for target in $(FUZZ); do \
		$(PYTHON) -m tests.fuzz $$target $$(($(RUNS) / $(words $(FUZZ)))) || exit; \
	done

bench:
	@testbed/setup.sh bench
	@$(PYTHON) -m bench $(ARGS)

lint:
	@testbed/setup.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

install:
	@contrib/install.sh "$(LIB)" "$(PREFIX)/bin"
	@contrib/install-host-files.sh install "$(PREFIX)"

uninstall:
	@contrib/install-host-files.sh uninstall "$(PREFIX)"
	rm -rf "$(LIB)" "$(PREFIX)/bin/rbdnbd"

install-drop-in: install
	@contrib/install-drop-in.sh install "$(LIB)/bin/rbd-nbd"

uninstall-drop-in:
	@contrib/install-drop-in.sh uninstall "$(LIB)/bin/rbd-nbd"

clean:
	rm -rf .venv .build .pytest_cache .mypy_cache .ruff_cache
