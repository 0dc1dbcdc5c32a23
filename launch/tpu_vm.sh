#!/usr/bin/env bash
# Runs launch/train.py on every worker of a Cloud TPU VM slice, with `gcloud compute tpus`.
#
#   bash launch/tpu_vm.sh --help
#
# On each worker, ~/bipft_jax holds source/ (this checkout), venv/, and the run's log.txt and pid.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"

fail() {
  echo "error: $*" >&2
  exit 1
}

help() {  # [COMMAND]
  case "${1:-}" in
    create) cat <<TEXT
usage: bash launch/tpu_vm.sh create --accelerator=TYPE [OPTION...]

Creates a slice.
  --accelerator=TYPE   v5litepod-16, v5p-32, v6e-16, ...
  --version=VERSION    runtime version; without it the one for JAX on that type
  --spot               cheaper, and may be taken away at any time
  --queued             waits in Google's queue until there is room: see status --queued
TEXT
      ;;
    setup) cat <<TEXT
usage: bash launch/tpu_vm.sh setup [--bucket=NAME] [OPTION...]

Copies the last commit of this checkout to all workers and installs it there with jax[tpu], in a
Python 3.12 that uv fetches (the images of TPU VMs have 3.10). Again after every commit that is to
run, with no run going on, and with --bucket after a restart of the workers.
  --bucket=NAME        mounts this bucket as /mnt/NAME, for --workdir and data
TEXT
      ;;
    run) cat <<TEXT
usage: bash launch/tpu_vm.sh run [--wait] [OPTION...] -- ARGUMENT...

Starts \`python launch/train.py --distributed ARGUMENT...\` on all workers. It goes on when this
command has ended. After an end of any kind the same command resumes from the --workdir, which has
to be a directory that all workers share: one in /mnt/BUCKET.
  --wait               ends when the run has, whether or not that was a success
TEXT
      ;;
    logs) cat <<TEXT
usage: bash launch/tpu_vm.sh logs [--worker=N] [OPTION...]

Follows the output of the runs on a worker, until Ctrl-C.
  --worker=N           default: 0, the one that reports progress
TEXT
      ;;
    status) cat <<TEXT
usage: bash launch/tpu_vm.sh status [--queued] [OPTION...]

Shows the state of the slice, and on which workers a run is going on.
  --queued             instead, the state of a request that was made with create --queued
TEXT
      ;;
    stop) cat <<TEXT
usage: bash launch/tpu_vm.sh stop [OPTION...]

Sends SIGTERM to the run on all workers and waits until it has saved and ended.
TEXT
      ;;
    delete) cat <<TEXT
usage: bash launch/tpu_vm.sh delete [--queued] [OPTION...]

Deletes the slice with what is on its workers, after a question.
  --queued             of one that was made with create --queued
TEXT
      ;;
    *) cat <<TEXT
usage: bash launch/tpu_vm.sh COMMAND [OPTION...]

  create   a slice of TPU VMs
  setup    this checkout on all workers
  run      launch/train.py on all workers, in the background
  logs     follows the output of a worker
  status   of the slice and of the run
  stop     the run: it saves, and \`run\` goes on with it
  delete   the slice

bash launch/tpu_vm.sh COMMAND --help: the options of a command.
TEXT
      ;;
  esac
  cat <<TEXT

Options of every command:
  --name=NAME          of the slice; or the variable TPU_NAME
  --zone=ZONE          or TPU_ZONE
  --project=PROJECT    or TPU_PROJECT
  --dry-run            prints each command as it would be run, and runs none
TEXT
}

quoted() {  # WORD...: as a shell reads them back
  local word separator="" LC_ALL=C
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

execute() {  # COMMAND ARGUMENT...
  if $dry_run; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

tpus() {  # GROUP COMMAND ARGUMENT...
  execute gcloud compute tpus "$@" --zone="$zone" --project="$project"
}

on_workers() {  # all|NUMBER SCRIPT
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

runtime_version() {  # ACCELERATOR: Google's table of TPU software versions for JAX
  case "$1" in
    v5lite*) echo v2-alpha-tpuv5-lite ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v6e*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "no runtime version is known for $1: give --version=VERSION" ;;
  esac
}

# A shell condition, evaluated on a worker: the last run is still going. It checks the command line,
# because after a reboot another process may have the same pid.
# shellcheck disable=SC2016
running='[ -s ~/bipft_jax/pid ] && grep -qs launch/train.py "/proc/$(cat ~/bipft_jax/pid)/cmdline"'

create() {
  [[ -n "$accelerator" ]] || fail "create needs --accelerator=TYPE, v5litepod-16 for example"
  [[ -n "$version" ]] || version="$(runtime_version "$accelerator")"
  if $queued; then
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator" \
      --runtime-version="$version" ${spot:+"$spot"}
  else
    tpus tpu-vm create "$name" --accelerator-type="$accelerator" --version="$version" \
      ${spot:+"$spot"}
  fi
}

setup() {
  local archive="$root/build/bipft_jax.tar.gz"
  if [[ -n "$(git -C "$root" status --porcelain)" ]]; then
    echo "note: the workers get the last commit, without the changes since" >&2
  fi
  execute mkdir -p "$root/build"
  execute git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$name:bipft_jax.tar.gz" --worker=all
  on_workers all "set -e
rm -rf ~/bipft_jax/source
mkdir -p ~/bipft_jax/source
tar -xzf ~/bipft_jax.tar.gz -C ~/bipft_jax/source
cd ~/bipft_jax
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 venv
~/.local/bin/uv pip install --quiet --python venv --editable source 'jax[tpu]'"
  if [[ -n "$bucket" ]]; then mount_bucket; fi
}

# Workers see each other's writes and renames through the bucket, so no metadata may be cached. root
# makes the mount point, so that a run cannot write into it while no bucket is mounted.
mount_bucket() {
  on_workers all "set -e
if ! command -v gcsfuse > /dev/null; then
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
  echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc]\" \\
    \"https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -q
  sudo apt-get install -qy -o DPkg::Lock::Timeout=600 gcsfuse
fi
sudo mkdir -p /mnt/$bucket
mountpoint -q /mnt/$bucket || sudo gcsfuse -o allow_other --uid=\"\$(id -u)\" --gid=\"\$(id -g)\" \\
  --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $bucket /mnt/$bucket"
}

run() {
  (($#)) || fail "run needs the arguments of launch/train.py after --"
  [[ " $* " != *" --dry-run "* ]] || fail "--dry-run comes before --: what follows is for train.py"
  on_workers all "set -e
cd ~/bipft_jax/source
if $running; then
  echo 'error: a run is going on here: stop it, or wait for its end' >&2
  exit 1
fi
nohup ../venv/bin/python -u launch/train.py --distributed $(quoted "$@") \\
  >> ../log.txt 2>&1 < /dev/null &
echo \$! > ../pid"
  if $wait && ! on_workers all "while $running; do sleep 5; done"; then
    echo "error: the connection is lost; the run may go on: bash launch/tpu_vm.sh status" >&2
    exit 255  # xargs then starts no further point of a sweep
  fi
}

logs() { on_workers "$worker" "tail -n 100 -F ~/bipft_jax/log.txt"; }

status() {
  if $queued; then
    tpus queued-resources describe "$name" --format="value(state.state)"
    return
  fi
  tpus tpu-vm describe "$name" --format="value(state,health)"
  on_workers all "if $running; then state=running; else state='no run'; fi
echo \"\$(hostname): \$state\""
}

stop() {
  on_workers all "$running || exit 0
kill -TERM \"\$(cat ~/bipft_jax/pid)\"
while $running; do sleep 1; done"
}

delete() {
  if $queued; then
    tpus queued-resources delete "$name" --force  # with its slice
  else
    tpus tpu-vm delete "$name"
  fi
}

command="${1:---help}"
case "$command" in
  create) allowed="--accelerator --version --spot --queued" ;;
  setup) allowed="--bucket" ;;
  run) allowed="--wait --" ;;
  logs) allowed="--worker" ;;
  status | delete) allowed="--queued" ;;
  stop) allowed="" ;;
  -h | --help) help && exit ;;
  *) fail "$command is no command: create, setup, run, logs, status, stop or delete" ;;
esac
shift

name="${TPU_NAME:-}" zone="${TPU_ZONE:-}" project="${TPU_PROJECT:-}" dry_run=false
accelerator="" version="" spot="" queued=false bucket="" wait=false worker=0
while (($#)); do
  case " --name --zone --project --dry-run --help -h $allowed " in
    *" ${1%%=*} "*) ;;
    *) fail "$command has no $1: bash launch/tpu_vm.sh $command --help" ;;
  esac
  case "$1" in
    -h | --help) help "$command" && exit ;;
    --dry-run) dry_run=true ;;
    --name=?*) name="${1#*=}" ;;
    --zone=?*) zone="${1#*=}" ;;
    --project=?*) project="${1#*=}" ;;
    --accelerator=?*) accelerator="${1#*=}" ;;
    --version=?*) version="${1#*=}" ;;
    --spot) spot=--spot ;;
    --queued) queued=true ;;
    --bucket=?*) bucket="${1#*=}" ;;
    --wait) wait=true ;;
    --worker=?*) worker="${1#*=}" ;;
    --)
      shift
      break
      ;;
    *) fail "$1 is not in the form that bash launch/tpu_vm.sh $command --help shows" ;;
  esac
  shift
done
[[ -n "$name" ]] || fail "which slice? give --name=NAME or set TPU_NAME"
[[ -n "$zone" ]] || fail "in which zone? give --zone=ZONE or set TPU_ZONE"
[[ -n "$project" ]] || fail "in which project? give --project=PROJECT or set TPU_PROJECT"
[[ "$bucket" != *[!a-z0-9._-]* ]] || fail "$bucket is no bucket's name: give it without gs://"
if ! $dry_run && ! command -v gcloud > /dev/null; then
  fail "gcloud is not here: install the Google Cloud CLI, or see the commands with --dry-run"
fi
"$command" "$@"
