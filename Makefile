# Each target makes .venv ready first (tools/bootstrap.py; instant when it is).
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= -p dataset toybirds
SCALE ?= smoke
.DEFAULT_GOAL := help
.PHONY: help setup demo paper pictures test test-browser check bench lab readme refresh clean-notebooks

help:             ## this list
	@echo "make TARGET, where TARGET is one of"; sed -n 's/^\([a-z-]*\):.*## /  \1	/p' Makefile | expand -t 20

setup:            ## .venv with the package and exact versions of all it needs
	@command -v $(PYTHON) >/dev/null || { echo "set-up: Python 3.10, 3.11 or 3.12 is needed and there is no $(PYTHON); install one" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py

demo: setup       ## the main experiment on the embedded data set: a table, a notebook, figures
	@$(BIN)/protoquant run cub $(DEMO)

paper: setup      ## every table and figure of the paper (SCALE=smoke, small or paper; a second call continues)
	@$(BIN)/protoquant reproduce --scale $(SCALE)

pictures:         ## README pictures of ToyBirds: explained images, the widget in a browser (installs what test-browser installs)
	@$(PYTHON) tools/bootstrap.py dev demo browser
	@$(BIN)/python tools/pictures.py

test: setup       ## clean, exported, tagged, README in step; all notebooks; pytest
	@$(BIN)/python tools/check.py

test-browser:     ## the widget in a real browser (also installs playwright and, as root with apt-get, chromium)
	@$(PYTHON) tools/bootstrap.py dev demo browser
	@$(BIN)/python tools/browser.py

check: setup      ## only the checks that take seconds
	@$(BIN)/python tools/check.py quick

bench:            ## the benchmark (also installs faiss)
	@$(PYTHON) tools/bootstrap.py dev demo bench
	@$(BIN)/python tools/bench.py

lab: setup        ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=nbs

readme: setup     ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

refresh: setup   ## outputs of run_*.ipynb and README pictures, by running them on ToyBirds (ONLY=cub,purity for some; RESULTS=folder of smoke runs)
	@$(BIN)/python tools/refresh.py $(ONLY) $(if $(RESULTS),--results $(RESULTS))

clean-notebooks: setup ## remove what changes with every run from the notebooks
	@$(BIN)/nbdev_clean
