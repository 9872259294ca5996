# shellcheck shell=bash
# Make and check .venv, and set the variables that every process of a job needs. Sourced, never run:
#     source jobs/environment.sh
# Exits with 2 and lists all that is missing before it changes anything. A second run installs nothing.
#
#   PYTHON=/path/to/python           use this interpreter (otherwise the first fitting one on PATH)
#   PEAR_RAY_PLATFORM=cpu|gpu        which lock: docker/requirements-cpu.lock (default) or -gpu.lock
#   PEAR_RAY_INSTALL=dependencies    stop before the package itself (a layer of the images)

environment_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
environment_platform=${PEAR_RAY_PLATFORM:-cpu}
environment_lock=$environment_root/docker/requirements-$environment_platform.lock
environment_venv=$environment_root/.venv
environment_log=$environment_venv/install.log
case $environment_platform in
  cpu) environment_python=3.11 environment_disk_gb=8 ;;
  gpu) environment_python=3.12 environment_disk_gb=25 ;;
  *) echo "environment: PEAR_RAY_PLATFORM: expected cpu or gpu, got '$environment_platform'" >&2; exit 2 ;;
esac

# PyTorch's own index of CPU builds, used only if the configured indexes have no torch +cpu.
environment_torch_cpu_index=https://download.pytorch.org/whl/cpu

environment_version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

environment_free_gb() { df -Pk -- "$1" 2>/dev/null | awk 'NR == 2 { printf "%d", $4 / 1048576 }'; }

environment_stamp() {
  printf '%s %s python%s with-ops ' "$environment_platform" "$environment_root" "$environment_python"
  sha256sum < "$environment_lock" | cut -d' ' -f1
}

environment_dependencies_ready() {
  [[ -x $environment_venv/bin/python && ! -e $environment_venv/installing ]] &&
    [[ $(cat "$environment_venv/dependencies.stamp" 2>/dev/null) == "$(environment_stamp)" ]]
}

environment_package_ready() {
  [[ ${PEAR_RAY_INSTALL:-} == dependencies ]] ||
    [[ $(cat "$environment_venv/package.stamp" 2>/dev/null) == "$(sha256sum < "$environment_root/pyproject.toml")" ]]
}

environment_find_python() {
  local candidate found="" candidates=("python$environment_python" python3 python)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    candidate=$(type -P "$candidate") || continue
    if [[ $(environment_version_of "$candidate") == "$environment_python" ]]; then
      environment_base_python=$candidate
      return 0
    fi
    found+="${found:+, }$candidate is $("$candidate" -V 2>&1 | head -n 1)"
  done
  environment_problems+=("expected Python $environment_python, got ${found:-no ${PYTHON:-Python on PATH}}. Install it with its venv module and headers, or set PYTHON=/path/to/python$environment_python")
  return 1
}

# Report everything that is missing at once, before any work.
environment_check() {
  environment_problems=()
  local system compiler missing include free path
  system="$(uname -s) $(uname -m)"
  [[ $system == "Linux x86_64" ]] ||
    environment_problems+=("expected Linux x86_64 (the locked builds are for it), got $system")
  compiler=${CXX:-c++}
  compiler=${compiler%% *}
  if ! type -P "$compiler" >/dev/null; then
    environment_problems+=("expected a C++ compiler (DeepSpeed compiles a part of itself), got no '$compiler' on PATH. Install g++, or set CXX")
  elif ! echo '#include <concepts>' | "$compiler" -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1; then
    environment_problems+=("expected a C++20 compiler, got $("$compiler" --version 2>&1 | head -n 1), which does not compile '#include <concepts>'. Install g++ 10 or later, or set CXX")
  fi
  if ! environment_dependencies_ready; then
    if environment_find_python; then
      missing=$("$environment_base_python" -c 'import importlib.util as u; print(*[m for m in ("venv", "ensurepip") if not u.find_spec(m)])')
      [[ -z $missing ]] ||
        environment_problems+=("$environment_base_python lacks the module(s) $missing; install python$environment_python-venv")
      include=$("$environment_base_python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
      [[ -e $include/Python.h ]] ||
        environment_problems+=("expected the C headers of Python $environment_python, got no $include/Python.h. Install python$environment_python-dev")
      [[ $environment_platform != cpu ]] || "$environment_base_python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        environment_problems+=("expected the library libnuma.so.1 (vLLM's CPU kernels link to it), got none. Install libnuma1 or numactl-libs")
    fi
    free=$(environment_free_gb "$environment_root")
    ((${free:-0} >= environment_disk_gb)) ||
      environment_problems+=("expected $environment_disk_gb GB of free disk for the first install, got ${free:-?} GB at $environment_root")
    path=${TMPDIR:-/tmp}
    free=$(environment_free_gb "$path")
    ((${free:-0} >= 2)) ||
      environment_problems+=("expected 2 GB of free disk for temporary files, got ${free:-?} GB at $path. Set TMPDIR to another folder")
  fi
  if ((${#environment_problems[@]})); then
    printf 'environment: %s\n' "${environment_problems[@]}" >&2
    exit 2
  fi
}

# Run a command with its output in the log, and print a line of progress every 20 seconds.
environment_step() {
  local title=$1 status=0 ticker pipe started=$SECONDS
  shift
  echo "environment: $title"
  printf '\n== %s\n' "$title" >> "$environment_log"
  (
    exec {pipe}<> <(:)
    while read -r -t 20 -u "$pipe" || kill -0 $$ 2>/dev/null; do
      printf '   %4d s, %3d packages in place: %s\n' $((SECONDS - started)) \
        "$(find "$environment_venv/lib" -maxdepth 3 -name '*.dist-info' | wc -l)" \
        "$(tail -n 50 "$environment_log" | grep -v '^WARNING' | tail -n 1 | cut -c 1-60)"
    done
  ) & ticker=$!
  "$@" >> "$environment_log" 2>&1 || status=$?
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  return "$status"
}

environment_fail() {
  echo "environment: $1 failed; the end of $environment_log:" >&2
  tail -n 15 "$environment_log" | cut -c 1-300 >&2
  exit 1
}

# Bytecode is compiled at first import, only of imported modules: a minute less. An image compiles it once for all containers.
environment_pip() {
  local bytecode=--no-compile
  [[ ${PEAR_RAY_INSTALL:-} != dependencies ]] || bytecode=--compile
  "$environment_venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    --no-deps "$bytecode" "$@"
}

# Print the lock's lines of the named packages; with a second argument, all the others.
environment_lock_of() {
  awk -v names="$1" -v others="${2:-}" 'BEGIN { split(names, n, " "); for (i in n) named[n[i]] = 1 }
    /^[a-z0-9]/ { split($1, pin, "=="); keep = (pin[1] in named) != (others != "") } keep' "$environment_lock"
}

environment_install_dependencies() {
  local part=$environment_venv/part.lock
  if [[ -e $environment_venv/pyvenv.cfg && ! -e $environment_venv/installing ]] &&
    [[ $(environment_version_of "$environment_venv/bin/python") == "$environment_python" ]] &&
    grep -qF "$environment_venv" "$environment_venv/bin/activate"; then
    echo "environment: $environment_venv does not match $environment_lock: bringing it up to date"
  elif [[ -e $environment_venv ]]; then
    [[ -e $environment_venv/pyvenv.cfg || -e $environment_venv/installing ]] ||
      { echo "environment: $environment_venv exists and is no virtual environment; move it away" >&2; exit 2; }
    echo "environment: $environment_venv is from an interrupted install, another Python or another folder: making it again"
    rm -rf -- "$environment_venv"
  fi
  mkdir -p "$environment_venv"
  touch "$environment_venv/installing"
  : > "$environment_log"
  if [[ ! -e $environment_venv/pyvenv.cfg || ! -x $environment_venv/bin/python ]]; then
    environment_step "making .venv with $environment_base_python" \
      "$environment_base_python" -m venv "$environment_venv" || environment_fail "making .venv"
  fi

  # Build tools of the lock's source packages come from the lock as well: no unpinned build environment.
  environment_lock_of "setuptools packaging ninja" > "$part"
  environment_step "1/4 build tools" environment_pip --require-hashes -r "$part" || environment_fail "pip install"

  environment_lock_of torch > "$part"
  if ! environment_step "2/4 PyTorch" environment_pip --require-hashes -r "$part"; then
    if [[ $environment_platform != cpu ]] || ! grep -q "No matching distribution found for torch" "$environment_log"; then
      environment_fail "pip install"
    fi
    environment_step "2/4 PyTorch: not in the configured indexes, trying PyTorch's own index of CPU builds" \
      environment_pip --require-hashes --extra-index-url "$environment_torch_cpu_index" -r "$part" ||
      environment_fail "pip install"
  fi

  environment_lock_of deepspeed others > "$part"
  environment_step "3/4 the others of $(grep -c '^[a-z0-9]' "$environment_lock") packages (2-5 minutes; log: $environment_log)" \
    environment_pip --require-hashes --no-build-isolation --use-pep517 -r "$part" || environment_fail "pip install"

  # With its shared-memory op compiled now: if the first job compiled it and were killed meanwhile, a stale lock file
  # would hang every later one. No cache: pip's may hold a DeepSpeed built without the op.
  local made_of op=0
  made_of=$(environment_lock_of "torch deepspeed" | sha256sum)
  if [[ $(cat "$environment_venv/deepspeed.stamp" 2>/dev/null) != "$made_of" ]]; then
    [[ $environment_platform != cpu ]] || op=1
    environment_lock_of deepspeed > "$part"
    PATH=$environment_venv/bin:$PATH CFLAGS=-g0 DS_ENABLE_NINJA=1 \
      DS_ACCELERATOR=${environment_platform/gpu/cuda} DS_BUILD_SHM_COMM=$op \
      environment_step "4/4 DeepSpeed, from source (1-2 minutes)" \
      environment_pip --require-hashes --no-build-isolation --use-pep517 --no-cache-dir --force-reinstall -r "$part" ||
      environment_fail "building DeepSpeed"
    echo "$made_of" > "$environment_venv/deepspeed.stamp"
  fi
  rm -f -- "$part" "$environment_venv/package.stamp"
  environment_stamp > "$environment_venv/dependencies.stamp"
  rm -f -- "$environment_venv/installing"
}

environment_install_package() {
  environment_step "installing pear_ray itself, editable" \
    environment_pip --no-build-isolation -e "$environment_root" || environment_fail "pip install -e ."
  sha256sum < "$environment_root/pyproject.toml" > "$environment_venv/package.stamp"
}

environment_main() {
  local lock_fd
  environment_check
  if ! { environment_dependencies_ready && environment_package_ready; }; then
    exec {lock_fd}< "$environment_lock"
    flock -n "$lock_fd" || { echo "environment: waiting for another install in this folder" >&2; flock "$lock_fd"; }
    environment_dependencies_ready || environment_install_dependencies
    environment_package_ready || environment_install_package
    exec {lock_fd}<&-
    echo "environment: ready ($(du -sm "$environment_venv" | cut -f1) MB in $environment_venv)"
  fi
  [[ :$PATH: == *:$environment_venv/bin:* ]] || export PATH=$environment_venv/bin:$PATH
  export VIRTUAL_ENV=$environment_venv
  # Without stored bytecode each process compiles thousands of files: 30 s for vLLM instead of 12.
  unset PYTHONDONTWRITEBYTECODE
  # `ray start` turns token authentication on by default; its clients need this variable.
  export RAY_AUTH_MODE=token
  # Nothing reports home.
  export DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
}

environment_main
