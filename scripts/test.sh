#!/usr/bin/env bash
# The linter and all tests, on a fresh machine: makes .venv, installs, runs. Arguments go to pytest (-m "not slow" for the quick
# ones). One process a core with one thread each: two threads that share a core take many times as long.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
ruff check .
export OMP_NUM_THREADS=1
exec python -m pytest -q --durations=10 --numprocesses=auto --dist=loadfile "$@"
