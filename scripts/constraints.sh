#!/usr/bin/env bash
# Resolves pyproject.toml anew, in an environment of its own, and writes constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-/usr/bin/python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check ".[dev]"
{
    echo "# What CI installs and what was tested. Refresh with: make constraints"
    "$work/venv/bin/python" -m pip freeze --disable-pip-version-check --exclude share-manager --exclude setuptools
} >"$work/constraints.txt"
mv "$work/constraints.txt" constraints.txt
