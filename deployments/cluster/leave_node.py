"""`python -m deployments.cluster.leave_node`: moves Serve's replicas away from this node before it is taken away.

Ray starts others elsewhere, and each replica here then ends as at any other time: its requests finish, its KV is handed over.
Ends when none is left, or there was no time for more. Ray's processes go on: `ray stop` ends them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

# How often the node's processes are looked at, in seconds.
INTERVAL_S = 0.5
# Ray's names for the processes of replicas begin so.
REPLICA = "ray::ServeReplica:"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if no replica is left, 1 if some are, or Ray refuses to let the node go."""
    parser = argparse.ArgumentParser(
        prog="leave_node", description=(__doc__ or "").partition("\n")[0].partition(": ")[2]
    )
    parser.add_argument(
        "--timeout", type=float, default=150.0, help="seconds until the node is taken away (default 150)"
    )
    parser.add_argument("--node-id", default=None, help="another node than the one whose Ray is found here")
    options = parser.parse_args(arguments)
    deadline_s = time.monotonic() + options.timeout
    if not start_leaving(options.timeout, options.node_id):
        return 1
    while (replicas := list(replicas_here(options.node_id))) and time.monotonic() < deadline_s:
        time.sleep(INTERVAL_S)
    for name in replicas:
        print(f"leave_node: still here: {name}", file=sys.stderr)
    return 1 if replicas else 0


def start_leaving(timeout_s: float, node_id: str | None) -> bool:
    """Tell Ray that the node goes, so that nothing more is placed there and Serve moves what is."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the node is taken out of the cluster"]
    command += ["--deadline-remaining-seconds", str(int(timeout_s))]
    if node_id is not None:
        command += ["--node-id", node_id]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"leave_node: Ray does not let this node go: {done.stderr.strip()[-1000:]}", file=sys.stderr)
    return done.returncode == 0


def replicas_here(node_id: str | None) -> Iterator[str]:
    """The names of the processes of replicas that this machine's Ray has started, in the order of their ids.

    node_id: of the one Ray, if several run on this machine.
    """
    import psutil

    for process in psutil.process_iter(["name", "cmdline"]):
        command = process.info["cmdline"] or []  # None of one that has just ended
        if process.info["name"] != "raylet" or (node_id and not any(node_id in part for part in command)):
            continue
        for child in process.children():
            try:
                command = child.cmdline()
            except psutil.NoSuchProcess:
                continue
            if command and command[0].startswith(REPLICA):
                yield command[0]


if __name__ == "__main__":
    sys.exit(main())
