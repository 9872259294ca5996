"""What a process answers to somebody who can reach its port and has no token."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException

import grpc

SECONDS = 5.0
# One call of each service that Ray's processes offer (src/ray/protobuf).
CALLS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVGet",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/FreeObjects",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.LogService/ListLogs",
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
)
PATHS = ("/api/jobs/", "/api/v0/nodes", "/get_or_create_runtime_env", "/metrics", "/logs/")
REFUSED = {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}


def answered(port: int, host: str = "127.0.0.1") -> set[str]:
    """Calls and paths that were answered."""
    found = {path for path in PATHS if page(f"http://{host}:{port}{path}")}
    for call in CALLS:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            try:
                channel.unary_unary(call)(b"", timeout=SECONDS)
                found.add(call)
            except grpc.RpcError as error:
                if error.code().name not in REFUSED:
                    found.add(call)
    return found


def page(address: str) -> bool:
    """Whether something is served there; a page that does not exist is nothing."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=SECONDS) as answer:
            return answer.status == 200
    except (urllib.error.URLError, HTTPException, OSError):
        return False
