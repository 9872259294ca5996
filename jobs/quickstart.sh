#!/usr/bin/env bash
# The laptop job, from nothing: environment, a local Ray, `ray job submit`, and the result.
#     bash jobs/quickstart.sh [--section.key value ...]        options go to the job, e.g. --rl.steps 2
# A second run installs nothing, follows the job if it still runs, and otherwise runs the missing stages.
#
#   PEAR_RAY_RUN_DIR         the run folder (runs/laptop in the checkout)
#   PEAR_RAY_DASHBOARD_PORT  8265
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
run_dir=$(realpath -m -- "${PEAR_RAY_RUN_DIR:-$root/runs/laptop}")

say() { echo "quickstart: $*"; }

bash "$root/cluster/local.sh" check
# shellcheck source=environment.sh
source "$root/jobs/environment.sh"
bash "$root/cluster/local.sh" start
address=$(bash "$root/cluster/local.sh" status | grep -o 'http://127.0.0.1:[0-9]*')

# Ask Ray's job service: `job_service find RUN_DIR` prints the id of the live job of that run folder, if any;
# `job_service outcome ID` waits until the job has ended and prints its status and exit code.
job_service() { "$root/.venv/bin/python" - "$address" "$@" <<'PYTHON'
import json, os, pathlib, sys, time, urllib.request

address, verb, argument = sys.argv[1:]
path = pathlib.Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or pathlib.Path.home() / ".ray/auth_token")
headers = {"Authorization": f"Bearer {os.environ.get('RAY_AUTH_TOKEN') or path.read_text().strip()}"}
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(what):
    return json.load(opener.open(urllib.request.Request(f"{address}/api/jobs/{what}", headers=headers), timeout=30))


if verb == "find":
    for job in get(""):
        if job["status"] in ("PENDING", "RUNNING") and (job["metadata"] or {}).get("run_dir") == argument:
            print(job["submission_id"])
            break
else:
    deadline = time.monotonic() + 10
    while (job := get(argument))["status"] in ("PENDING", "RUNNING") and time.monotonic() < deadline:
        time.sleep(0.5)
    print(job["status"], job["driver_exit_code"] if job["driver_exit_code"] is not None else 1)
PYTHON
}

on_interrupt() {
  echo
  say "the job continues without this terminal. To follow it again: bash jobs/quickstart.sh"
  say "to stop it: .venv/bin/ray job stop --address $address $id        dashboard: $address"
  exit 130
}

# Only one process at a time looks for the job and submits it.
exec {lock}< "$root/jobs/laptop.toml"
flock "$lock"
id=$(job_service find "$run_dir")
if [[ -n $id ]]; then
  say "the job of $run_dir is already running ($id); following it${*:+ (it does not use these options: $*)}"
else
  id=laptop-$(date +%Y%m%d-%H%M%S)-$$
  printed=$("$root/.venv/bin/ray" job submit --address "$address" --submission-id "$id" --no-wait \
    --metadata-json "$(RUN_DIR=$run_dir "$root/.venv/bin/python" -c 'import json, os; print(json.dumps({"job_name": "laptop", "run_dir": os.environ["RUN_DIR"]}))')" \
    -- "$root/.venv/bin/python" -m pear_ray pipeline "$root/jobs/laptop.toml" --run.dir "$run_dir" "$@" 2>&1) ||
    { echo "$printed" >&2; say "ray job submit failed" >&2; exit 1; }
  say "submitted $id; dashboard: $address; Ctrl-C leaves it running"
fi
exec {lock}<&-
trap on_interrupt INT

while :; do
  "$root/.venv/bin/ray" job logs --address "$address" --follow "$id" || true
  read -r status code < <(job_service outcome "$id") || { say "Ray does not answer at $address" >&2; exit 1; }
  [[ $status == PENDING || $status == RUNNING ]] || break
  say "lost the log of the running job; following it again"
done

if [[ $status != SUCCEEDED ]]; then
  say "the job ended as $status with exit code $code; its last lines are above, dashboard: $address" >&2
  say "stop Ray with: bash cluster/local.sh stop" >&2
  [[ $code != 0 ]] || code=1
  exit "$code"
fi
echo
cat -- "$run_dir/report/report.md"
echo
say "report     $run_dir/report/index.html"
say "dashboard  $address   (the token it asks for: .venv/bin/ray get-auth-token)"
say "stop Ray   bash cluster/local.sh stop"
