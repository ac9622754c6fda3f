#!/usr/bin/env bash
# The linter and all tests, on a fresh machine: makes .venv, installs, runs. Arguments go to pytest (-m "not slow" for the quick ones).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
ruff check .
exec python -m pytest -q --durations=10 "$@"
