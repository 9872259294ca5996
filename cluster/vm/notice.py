"""Drain this Ray node when the cloud announces its preemption, so that engines hand over their
requests and learners save a checkpoint: python notice.py aws|gcp. Exits once Ray has been notified.

Sources: EC2 user guide, "Spot Instance interruption notices" (instance-action, two minutes ahead)
and "Use IMDSv2"; Compute Engine, "Preemptible VM instances" (instance/preempted, 30 seconds ahead).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ADDRESSES = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
SECONDS_AHEAD = {"aws": 110, "gcp": 25}
TOKEN_SECONDS = "60"
ANSWER_SECONDS = 5.0
RAY_SECONDS = 20.0


def ask(address: str, method: str = "GET", **headers: str) -> str:
    """Return the metadata service's answer; it is never behind a proxy."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address, method=method, headers=named)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=ANSWER_SECONDS) as answer:
        return answer.read().decode()


def is_noticed(cloud: str, metadata: str) -> bool:
    """Whether the machine is going to be taken back. No answer is no notice."""
    try:
        if cloud == "gcp":
            path = "computeMetadata/v1/instance/preempted"
            return ask(f"{metadata}/{path}", Metadata_Flavor="Google") == "TRUE"
        token = ask(f"{metadata}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds=TOKEN_SECONDS)
        # Not found until there is a notice.
        return bool(ask(f"{metadata}/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token))
    except (urllib.error.URLError, TimeoutError):
        return False


def tell_ray(seconds: int) -> bool:
    """Drain the node that runs on this machine."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node",
        "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "the cloud takes the machine back",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    try:
        return subprocess.run(command, timeout=RAY_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("cloud", choices=ADDRESSES)
    parser.add_argument("--metadata", help="address of the metadata service, if not the cloud's")
    parser.add_argument("--seconds-between", type=float, default=3.0)
    options = parser.parse_args()
    while not is_noticed(options.cloud, options.metadata or ADDRESSES[options.cloud]):
        time.sleep(options.seconds_between)
    ends = time.monotonic() + SECONDS_AHEAD[options.cloud]
    while (left := int(ends - time.monotonic())) > 0 and not tell_ray(left):
        time.sleep(1.0)


if __name__ == "__main__":
    main()
