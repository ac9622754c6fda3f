#!/usr/bin/env bash
# The linter and all tests, on a fresh machine: makes .venv, installs, runs. Arguments go to pytest (-m "not slow" for the quick
# ones). One process a core with one thread each: two threads that share a core take many times as long.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
ruff check .

# Tests of the reports need a browser. Where it can't be installed they are skipped.
if [ -z "$(type -P chromium chromium-browser google-chrome)" ]; then
    root=$([ "$(id -u)" = 0 ] || echo "sudo -n")
    apt="$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15"
    install="$apt install -y --no-install-recommends chromium"
    if type -P apt-get >/dev/null && $root true 2>/dev/null; then
        echo "== installing chromium, for the tests of reports"
        $install >/dev/null 2>&1 || { $apt update && $install; } </dev/null >/dev/null 2>&1 || true
    fi
    [ -n "$(type -P chromium)" ] || echo "== no chromium here, and it can't be installed: tests of reports in a browser will be skipped"
fi

export OMP_NUM_THREADS=1
exec python -m pytest -q --durations=10 --numprocesses=auto --dist=loadfile "$@"
