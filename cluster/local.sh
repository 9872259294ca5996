#!/usr/bin/env bash
# One Ray head node on this machine: bash cluster/local.sh start|stop|status|check
#
#   start   starts the node unless it is running; all its ports are on loopback
#   stop    ends the node and everything on it (Ray processes, workers, jobs), and nothing else
#   status  prints the dashboard's address and the processes; exits with 0 if the node runs, 3 if not
#   check   exits with 2 if another process has the dashboard's port
#
#   PEAR_RAY_DASHBOARD_PORT  8265        PEAR_RAY_NUM_CPUS  logical CPUs: the cores, at least 4
#   PEAR_RAY_OBJECT_STORE_MB 1024
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
port=${PEAR_RAY_DASHBOARD_PORT:-8265}
# One folder per checkout: a submitted job finds its cluster through a file in this folder, so clusters that share it
# mix up their jobs. Short, because Unix socket paths end at 107 characters.
folder=/tmp/pear_ray-$(id -u)-$(printf '%s' "$root" | cksum | cut -d' ' -f1)
# Every process of the cluster inherits this variable; `stop` finds them by it, not by name.
mark=PEAR_RAY_LOCAL_CLUSTER=$root

say() { echo "cluster: $*"; }
fail() { echo "cluster: $1" >&2; exit "${2:-1}"; }

# Print the ids of this cluster's processes, one per line.
processes() { grep -lzxF -e "$mark" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true; }

# Print the value of a variable in the environment of the cluster's first process.
variable() {
  local first
  first=$(processes | head -n 1)
  [[ -z $first ]] || { tr '\0' '\n' < "/proc/$first/environ" | sed -n "s/^$1=//p" | head -n 1; } 2>/dev/null || true
}

port_open() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

dashboard_answers() {
  "$root/.venv/bin/python" - "$1" <<'PYTHON' 2>/dev/null
import os, pathlib, sys, urllib.request
path = pathlib.Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or pathlib.Path.home() / ".ray/auth_token")
token = os.environ.get("RAY_AUTH_TOKEN") or path.read_text().strip()
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).read()
PYTHON
}

check() {
  local owner=""
  [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "PEAR_RAY_DASHBOARD_PORT: expected a port number, got '$port'" 2
  [[ -z $(processes) ]] || return 0
  if port_open "$port"; then
    if type -P ss >/dev/null; then
      owner=$(ss -Hltnp "sport = :$port" 2>/dev/null | sed -n 's/.*users:((\(.*\)))$/ (\1)/p' | head -n 1)
    fi
    fail "port $port for the dashboard is taken by another process$owner. Stop it, or set PEAR_RAY_DASHBOARD_PORT to a free port" 2
  fi
}

token() {
  local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  [[ -z ${RAY_AUTH_TOKEN:-} ]] || return 0
  if [[ ! -s $file ]]; then
    (umask 077 && mkdir -p -- "$(dirname -- "$file")" && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$file")
  fi
  # Ray creates it readable by everyone.
  chmod 600 -- "$file"
}

start() {
  local cpus limit running tries
  check
  # shellcheck source=../jobs/environment.sh
  source "$root/jobs/environment.sh"
  # One start at a time; Ray must not inherit the lock.
  exec 9< "$root/.venv/pyvenv.cfg"
  flock 9
  if [[ -n $(processes) ]]; then
    running=$(variable PEAR_RAY_DASHBOARD_PORT)
    if dashboard_answers "$running"; then
      say "already running: http://127.0.0.1:$running"
      return 0
    fi
    say "found a cluster that does not answer; stopping it"
    stop
    check
  fi
  (umask 077 && mkdir -p -- "$folder")
  [[ -O $folder && ! -L $folder ]] || fail "$folder belongs to someone else; remove it" 2
  chmod 700 -- "$folder"
  # Delete the logs of earlier sessions but the last.
  find "$folder" -mindepth 1 -maxdepth 1 -name 'session_2*' ! -samefile "$folder/session_latest/" -exec rm -rf {} + 2>/dev/null || true
  token
  cpus=$(nproc)
  ((cpus >= 4)) || cpus=4
  limit=$(ulimit -Hn)
  if [[ $limit == unlimited ]] || ((limit > 65536)); then limit=65536; fi
  ulimit -Sn "$limit"
  # setsid: a closed terminal or Ctrl-C does not reach the node. SPT_NOENV keeps process titles from overwriting the
  # environment in which `mark` is read. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 puts every port on loopback. This node is
  # never preempted: Ray Train's watcher would be one more process to start in each run.
  env -u RAY_ADDRESS "$mark" PEAR_RAY_DASHBOARD_PORT="$port" SPT_NOENV=1 RAY_AUTH_MODE=token RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0 \
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 \
    setsid -w "$root/.venv/bin/ray" start --head --port 0 --dashboard-host 127.0.0.1 --dashboard-port "$port" \
    --dashboard-agent-listen-port 0 --num-cpus "${PEAR_RAY_NUM_CPUS:-$cpus}" --object-store-memory $((${PEAR_RAY_OBJECT_STORE_MB:-1024} * 1048576)) \
    --temp-dir "$folder" --disable-usage-stats < /dev/null > "$folder/start.log" 2>&1 9<&- ||
    { tail -n 20 "$folder/start.log" >&2; stop; fail "ray start failed; see $folder/start.log"; }
  for ((tries = 0; ; tries++)); do
    dashboard_answers "$port" && break
    ((tries < 60)) || { stop; fail "Ray started, but its dashboard did not answer on port $port; see $folder/session_latest/logs"; }
    sleep 1
  done
  say "started: http://127.0.0.1:$port (logs: $folder/session_latest/logs)"
}

stop() {
  local ids count tries
  ids=$(processes)
  [[ -n $ids ]] || { say "not running"; return 0; }
  count=$(wc -l <<< "$ids")
  # shellcheck disable=SC2086
  kill -TERM $ids 2>/dev/null || true
  for ((tries = 0; tries < 10; tries++)); do
    sleep 0.5
    ids=$(processes)
    [[ -n $ids ]] || break
  done
  for ((tries = 0; tries < 10; tries++)); do
    ids=$(processes)
    [[ -n $ids ]] || break
    # shellcheck disable=SC2086
    kill -KILL $ids 2>/dev/null || true
    sleep 0.5
  done
  rm -f -- "$folder/ray_current_cluster"
  ids=$(processes)
  [[ -z $ids ]] || fail "these processes did not end: $(tr '\n' ' ' <<< "$ids")"
  say "stopped ($count processes)"
}

status() {
  local ids
  ids=$(processes)
  [[ -n $ids ]] || { say "not running"; exit 3; }
  say "http://127.0.0.1:$(variable PEAR_RAY_DASHBOARD_PORT), $(wc -l <<< "$ids") processes, logs: $folder/session_latest/logs"
}

case ${1:-} in
  start | stop | status | check) "$1" ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
