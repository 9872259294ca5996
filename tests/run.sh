#!/usr/bin/env bash
# Checks and tests, from a bare clone:
#     bash tests/run.sh [pytest options]          the default tier: what protects correctness on every change
#     bash tests/run.sh --all [pytest options]    all tests, with those marked `nightly` (clusters, kills, whole chains)
# Leaves no process, no Ray session and no file outside .venv behind, and fails if a test did.
set -euo pipefail

tier=" and not nightly"
if [[ ${1:-} == --all ]]; then
  tier=""
  shift
fi

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
# shellcheck source=../jobs/environment.sh
source jobs/environment.sh

# Home, temporary files, Ray's folder and token in one place; short, because paths of Unix sockets are.
scratch=$(mktemp -d /tmp/pear_ray-tests.XXXXXX)
mark=PEAR_RAY_TEST_RUN=$scratch
mkdir "$scratch/home" "$scratch/tmp"
if [[ -e ${HOME:-}/.gitconfig ]]; then export GIT_CONFIG_GLOBAL=$HOME/.gitconfig; fi
export HOME=$scratch/home TMPDIR=$scratch/tmp RAY_TMPDIR=$scratch
export XDG_CACHE_HOME=$HOME/.cache XDG_CONFIG_HOME=$HOME/.config XDG_STATE_HOME=$HOME/.local/state
export HYPOTHESIS_STORAGE_DIRECTORY=$root/.venv/cache/hypothesis
# vLLM's sampler compiles a kernel when it first samples.
export TORCHINDUCTOR_CACHE_DIR=$root/.venv/cache/inductor
# vLLM starts a process to inspect each model class, once for each cache.
export VLLM_CACHE_ROOT=$root/.venv/cache/vllm
# DeepSpeed compiles an op when a learner first starts.
export TORCH_EXTENSIONS_DIR=$root/.venv/cache/torch_extensions
export HF_HUB_OFFLINE=1
# Process titles must not overwrite the environment in which the mark is read.
export SPT_NOENV=1
unset RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH HF_HOME
(umask 077 && mkdir "$HOME/.ray" && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$HOME/.ray/auth_token")

# Print the ids of the tests' processes that still live.
processes() { grep -lzxF -e "$mark" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true; }

end_processes() {
  local signal ids tries
  for signal in TERM KILL; do
    for ((tries = 0; tries < 20; tries++)); do
      ids=$(processes)
      [[ -n $ids ]] || return 0
      # shellcheck disable=SC2086
      ((tries > 0)) || kill -s "$signal" $ids 2>/dev/null || true
      sleep 0.5
    done
  done
}

clean_up() {
  end_processes
  rm -rf -- "$scratch"
}
trap clean_up EXIT

failed=()
check() {
  echo "== $*"
  env "$mark" "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .

# Tests that start Ray wait for processes half of the time: the others, and the checks that take long, run in these
# pauses. Thousands of small tensors are faster on one thread than on two that wait for each other.
beside() {
  local result=0 code words
  renice -n 19 "$BASHPID" > /dev/null
  export "$mark" OMP_NUM_THREADS=1
  for words in mypy "lint-imports --cache-dir .venv/cache/import_linter"; do
    echo "== $words"
    # shellcheck disable=SC2086
    $words || { result=1 && echo "tests/run.sh: failed: $words" >&2; }
  done
  echo "== pytest -m 'not cluster$tier' $*"
  python -m pytest -m "not cluster$tier" "$@" || { code=$? && ((result)) || result=$code; }
  exit "$result"
}
status=0
echo "== pytest -m 'cluster$tier' $*; beside it mypy, lint-imports and pytest -m 'not cluster$tier' $*"
beside "$@" > "$scratch/others.log" 2>&1 &
others=$!
env "$mark" python -m pytest -m "cluster$tier" "$@" || status=$?
others_status=0
wait "$others" || others_status=$?
cat "$scratch/others.log"
# Exit code 5 of pytest: no tests of this kind were selected.
((status != 5)) || status=$others_status
((status != 0 || others_status == 5)) || status=$others_status

# A Ray session takes a moment to end after the test that shut it down.
for ((tries = 0; tries < 20; tries++)); do
  left=$(processes)
  [[ -n $left ]] || break
  sleep 0.5
done
if [[ -n $left ]]; then
  echo "tests/run.sh: the tests left processes behind:" >&2
  for id in $left; do
    command=$({ tr '\0' ' ' < "/proc/$id/cmdline"; } 2>/dev/null | cut -c 1-120)
    echo "  $id  $command" >&2
  done
  failed+=("no process left behind")
fi
if ((${#failed[@]})); then
  printf 'tests/run.sh: failed: %s\n' "${failed[@]}" >&2
  ((status != 0)) || status=1
fi
exit "$status"
