# What the scripts of launch/ that train share: help, paths, checks and runs. They source it before
# they leave the directory where they were started.

root="$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")"
python=.venv/bin/python

head_comment() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }  # of the script
usage() { head_comment; }

need_arguments() {  # NUMBER ARGUMENTS...: ends with the usage for -h, --help or fewer
  local number="$1"
  shift
  if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit
  elif (($# < number)); then
    usage >&2
    exit 2
  fi
}

split_words() {  # NAME VALUE: sets an array, of words on one line or several
  read -rd '' -a "$1" <<< "$2" || true  # it ends without a delimiter
}

from_root() { realpath -m -s --relative-to="$root" "$1"; }  # PATH, for use after cd "$root"

fail() {  # MESSAGE...
  echo "error: $*" >&2
  exit 1
}

require() {  # FILE WHAT
  if [[ ! -f "$1" ]]; then fail "$1 is missing: $2"; fi
}

require_text() {  # TEXT: a directory of pretraining text
  local split
  for split in train validation; do
    if ! compgen -G "$1/*-$split-*.jsonl.xz" > /dev/null; then
      fail "$1 has no *-$split-*.jsonl.xz: TEXT is the directory of the pretraining text"
    fi
  done
}

declare -A glue_directories=(
  [cola]=CoLA [sst2]=SST-2 [mrpc]=MRPC [stsb]=STS-B [rte]=RTE [qnli]=QNLI [qqp]=QQP [mnli]=MNLI
)
require_task() {  # GLUE TASK
  if [[ ! -d "$1/glue" ]]; then  # else prepared by TensorFlow Datasets
    require "$1/${glue_directories[$2]}/train.tsv" "GLUE is a glue_dir with the tasks"
  fi
}

install() {
  source launch/environment.sh
  prepare_environment ""
}

keep_compiled() {  # RUNS: for runs that share shapes, so that each shape is compiled once
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(realpath -m "$1/compiled")}"
}

make_corpus() {  # TEXT RUNS FLAGS...
  $python -m bipft_jax.data.corpus --output "$2/corpus" --input "$1/*-train-*.jsonl.xz" \
    --validation_input "$1/*-validation-*.jsonl.xz" "${@:3}"
}

train() {  # FLAGS...: if this shell is stopped, so is the run, which saves first
  local status=0
  $python launch/train.py "$@" &
  trap "kill $! 2> /dev/null; wait $!; exit 143" INT TERM
  wait $! || status=$?
  trap - INT TERM
  return $status
}
