#!/usr/bin/env bash
# All tests, on a fresh machine: makes .venv, installs, runs pytest. Arguments go to pytest (-m "not slow" for the quick ones).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
exec python -m pytest -q --durations=10 "$@"
