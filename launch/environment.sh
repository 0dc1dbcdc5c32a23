# Makes a virtual environment in .venv with this checkout and its runtime (bipft_jax/runtime)
# installed. Sourced by the scripts of launch/ that train or test.
#
#   prepare_environment EXTRAS     EXTRAS: "", "[test]" or "[test,peers]", as pip takes them
#
# Installs only when requirements or the runtime's kernels changed: a stamp in .venv records those
# that were installed.

prepare_environment() {
  local extras="$1" python="${PYTHON:-python3}" stamp wanted
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $("$python" --version) found; bipft_jax needs Python 3.11 to 3.13." >&2
    echo "       Name one with PYTHON=python3.12 bash $0" >&2
    return 1
  fi
  # An editable install compiles the runtime's kernels once: again when they change.
  wanted=$(cd bipft_jax/runtime && cat ../../requirements.txt ../../pyproject.toml pyproject.toml &&
    cat CMakeLists.txt src/* | cksum)
  local seen=false installed
  for installed in "" "[test]" "[test,peers]"; do  # each has all of the one before
    [[ "$installed" == "$extras" ]] && seen=true
    stamp=".venv/installed$installed"
    if $seen && [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
      return
    fi
  done
  if [[ ! -x .venv/bin/python ]]; then
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  echo "installing bipft_jax$extras (a few minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extras" \
    --editable bipft_jax/runtime
  printf '%s\n' "$wanted" > ".venv/installed$extras"
}
