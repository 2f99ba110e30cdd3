"""Environment variables by which `pensieve-serve` sets up the Ray that it starts.

Each has its reason, and at its end Ray's own value.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Requests go from process to process by gRPC, and each process has one event loop instead of three: this halves what the
    # way of a request costs. On one machine, for which this command is, a process that dies closes its connections; a
    # machine that vanishes does not, and gRPC would take minutes to notice.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Serve's proxy answers 500 if this header (x-session-id, unless it is set) is not UTF-8, and what it reads there is of no
    # use here: see deployments/routing/session_key.py. So it gets the name of a header that clients do not send.
    "RAY_SERVE_SESSION_ID_HEADER_KEY": "x-pensieve-serve-session",
    # Headers of clients that Serve's proxy would stumble over, or be steered by.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy_headers:middlewares",
    # A proxy that is not ready within so many seconds is killed; 5. On a busy machine it needs longer, and with it fails
    # `serve.start`, which waits for that very proxy for a minute. One that cannot listen says so at once.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # -- a server without work computes next to nothing. Ray is made for clusters of many nodes and short tasks, and looks at
    # much ten times a second. What notices failures keeps Ray's own intervals.
    # The controller's look at everything; 0.1.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Serve counts requests in each replica, and hands the counts to Ray's metrics this often, which go out every 10 s; 100.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    # What prints the replicas' lines looks for new files each time that it looks for new lines (ten times a second), unless
    # there are more than so many; 1000. Then this often; 0.5.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "1",
    # The dashboard's metrics of its own memory, for which the kernel walks all its pages; 5.
    "METRICS_RECORD_INTERVAL_S": "60",
    # Times of each handler in the event loops of Ray's processes, for Ray's developers. A third of what an idle worker
    # computes, because its main loop looks for signals every 10 ms.
    "RAY_event_stats": "0",
    # The raylet's looks at free resources, objects that could be freed, the disk, transfers of objects; 100. At workers that
    # are not used; 200. And at memory, from 95 % of which on it kills a worker; 250.
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_local_fs_monitor_interval_ms": "1000",
    "RAY_kill_idle_workers_interval_ms": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    # What the GCS asks of the raylet's load, for an autoscaler, which one machine has not; 1000. And how late the event loops
    # of Ray's processes are, for Ray's developers; 250.
    "RAY_gcs_pull_resource_loads_period_milliseconds": "5000",
    "RAY_io_context_monitor_probe_interval_ms": "5000",
}
# HAProxy as the HTTP proxy, and all of Serve's own set. See docs/configuration.md.
FAST_PATH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def guard(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment so that strangers do not get into the Ray that is started.

    It listens on the loopback address as far as Ray allows, and wants a token: a new one, which is in no file, unless the
    environment names one. No token if RAY_AUTH_MODE says so; nothing at all if RAY_ADDRESS names a cluster.
    """
    if names_cluster(environment):
        return {}
    # By its name for other systems, where it is off: nodes have the address 127.0.0.1 then, and listen there only.
    added = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    if environment.get("RAY_AUTH_MODE", "token").lower() == "token":
        added["RAY_AUTH_MODE"] = "token"
        if not (environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH")):
            added["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return added


def names_cluster(environment: Mapping[str, str]) -> bool:
    """Whether RAY_ADDRESS names a cluster that runs already."""
    return (environment.get("RAY_ADDRESS") or "local") != "local"
