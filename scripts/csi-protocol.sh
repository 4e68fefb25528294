#!/usr/bin/env bash
# Generates the Python code of share_manager/csi/protocol/csi.proto beside it, or into the directory given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=share_manager/csi/protocol
"${VENV:-.venv}/bin/python" -m grpc_tools.protoc -I "$here" --python_out="${1:-$here}" --pyi_out="${1:-$here}" csi.proto
