# Sourced by quickstart.sh and test.sh: goes to the bundle's root and makes the virtual environment .venv once.
# First argument: the requirements file to install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $("$python" --version) was found; set PYTHON to another one." >&2
    exit 1
}
stamp=.venv/$(cat requirements*.txt pyproject.toml | sha256sum | cut -c1-16)-$requirements
if [ ! -f "$stamp" ]; then
    echo "== installing $requirements into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and exactly: a later range is then content with it and pulls no GPU libraries
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
    .venv/bin/pip install --quiet --disable-pip-version-check -r "$requirements"
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=Agg
