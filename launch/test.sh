#!/usr/bin/env bash
# Sets up .venv (shared with quickstart.sh) and runs all tests. Arguments go to pytest.
#
#   bash launch/test.sh
#   bash launch/test.sh tests/quantization -k window
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment "[test]"
exec .venv/bin/python -m pytest "$@"
