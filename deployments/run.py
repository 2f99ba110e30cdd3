"""`pensieve-serve serve_config.yaml`: serves on this machine, in a Ray of its own.

What it adds to `serve run`: mistakes are told before anything starts; Ray wants a token and listens on this machine only;
SIGTERM and Ctrl-C drain; when Ray's daemons die it ends with an error and leaves nothing behind.

    pensieve-serve         checks file, port and model; says when all is ready; ends what the other one leaves behind
    `-- serve_run          a session of its own: Ray's driver and daemons, Serve, the replicas; watches the daemons

Draining: no new requests; those that run end, within `graceful_shutdown_timeout_s`; then everything stops.
"""

from __future__ import annotations

import argparse
import difflib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from deployments.cluster.ray_settings import DEFAULTS, FAST_PATH, guard, names_cluster
from deployments.cluster.start_checks import find_problems, own_applications, urls

if TYPE_CHECKING:
    import psutil

# The imports of Ray's schema and of pydantic are in the functions: `--help` is quick, and says nothing of Ray.

# Ray's daemons without which nothing is served. What else Ray starts ends with them, or is not needed.
DAEMONS = {"gcs_server", "raylet"}
WATCH_INTERVAL_S = 0.5
# How often this command asks whether all is ready, and how long an answer to that may take, in seconds.
READY_INTERVAL_S = 0.5
READY_TIMEOUT_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after a regular end, 1 where serving ended by itself, 2 for a mistake in the options or the file."""
    options = _parse(arguments)
    problems = list(find_problems(options.config, options.fast_path))
    if problems:
        print("\n".join(f"pensieve-serve: {problem}" for problem in problems), file=sys.stderr)
        return 2
    if not names_cluster(os.environ) and not _prepare_models(options.config):
        return 2
    for name, value in {**DEFAULTS, **(FAST_PATH if options.fast_path else {})}.items():
        os.environ.setdefault(name, value)
    added = guard(os.environ)
    os.environ.update(added)
    # The dashboard cannot be used without the token, and it is a tenth of the memory and a quarter of the idle CPU time.
    has_dashboard = "RAY_AUTH_TOKEN" not in added
    if not has_dashboard:
        print(
            "Ray wants a token, made for this start, and has no dashboard; to have it, and `serve status`: docs/security.md",
            flush=True,
        )
    elif not names_cluster(os.environ) and os.environ["RAY_AUTH_MODE"] != "token":
        print(
            "pensieve-serve: RAY_AUTH_MODE is not 'token': who reaches Serve's gRPC ports can run code on this machine",
            file=sys.stderr,
        )
    return _run(options.config, has_dashboard=has_dashboard)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = (
        "Start a Serve config file on this machine, in a Ray of its own; SIGTERM and Ctrl-C let running requests end."
    )
    parser = argparse.ArgumentParser(prog="pensieve-serve", description=description, allow_abbrev=False)
    parser.add_argument("config", help="a Serve config file, such as serve_config.yaml")
    parser.add_argument("--fast-path", action="store_true", help="HAProxy in front; needs API keys")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], ["--fast-path", "--help"], n=1)
        parser.error(f"unrecognized argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return options


def _prepare_models(config: str) -> bool:
    """Convert the models that have to be, before replicas wait for it; False after a line that says what is wrong with one.

    In a process of its own, because that takes memory which this one would keep.
    """
    models = {
        model.engine.get("model", "embedded") for _, args in own_applications(config) for model in args.models.values()
    }
    return all(
        subprocess.run([sys.executable, "-m", "engine.model_files", model], check=False).returncode == 0
        for model in sorted(models)
    )


def announce(url: str, process: subprocess.Popen[bytes], failed: threading.Event) -> None:
    """Print `url` when what it names is ready; if its model cannot be loaded, say why, set `failed` and end the process."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for other machines
    while process.poll() is None:
        try:
            with opener.open(f"{url}ready", timeout=READY_TIMEOUT_S):
                print(f"\npensieve-serve: ready at {url} (Ctrl-C ends it)\n", flush=True)
                return
        except urllib.error.HTTPError as error:
            with suppress(OSError, ValueError, KeyError, TypeError):
                failure = json.load(error)["error"]
                if failure["code"] == "model_not_loaded":
                    print(f"pensieve-serve: {failure['message']}", file=sys.stderr, flush=True)
                    failed.set()
                    process.send_signal(signal.SIGINT)
                    return
        except (OSError, http.client.HTTPException):
            pass  # nothing listens there yet
        time.sleep(READY_INTERVAL_S)


def _run(config: str, *, has_dashboard: bool) -> int:
    """Run `serve_run` in a process and a session of its own, pass signals on, and return the exit status.

    A process, because Ray installs a handler for SIGTERM that drains nothing. A session, because Ctrl-C in a terminal goes to
    all processes of one, Ray's daemons included; and so that what is left of it at the end can be found.
    """
    command = (
        f"import sys; from deployments.run import serve_run; serve_run(sys.argv[1], has_dashboard={has_dashboard})"
    )
    serve = subprocess.Popen([sys.executable, "-c", command, config], start_new_session=True)

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        serve.send_signal(signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    failed = threading.Event()
    for url in urls(config):
        threading.Thread(target=announce, args=(url, serve, failed), daemon=True).start()
    status = serve.wait()
    _end_session(serve.pid)
    if status != 0:
        print(f"pensieve-serve: serving has ended (status {status})", file=sys.stderr)
    return 0 if status == 0 and not failed.is_set() else 1


def _end_session(session: int) -> None:
    """Kill what is left of a session whose leader has ended.

    That is nothing after a regular end. When Ray's daemons have died, it is proxies that accept connections and never answer,
    replicas, agents.
    """
    import psutil

    def is_left(process: psutil.Process) -> bool:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
        return False

    for _ in range(3):  # one may start another while it is looked for
        processes = list(filter(is_left, psutil.process_iter()))
        if not processes:
            return
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)


def serve_run(config: str, *, has_dashboard: bool) -> None:
    """Do what `serve run config` does, drain on SIGINT, and end with an error when Ray's daemons end.

    Serve's own answer to SIGINT ends the HTTP proxies first, and with them all streams; so the applications are deleted
    before, whose replicas let their requests end. A Ray of its own is not told that Serve is shut down, because it ends with
    this process; Serve in another cluster is.
    """
    is_own = not names_cluster(os.environ)
    if is_own:
        os.environ.pop("RAY_ADDRESS", None)  # "local" would be another Ray to `serve run` than the one below
    import ray  # only now: it reads its environment when it is imported
    from ray.serve.scripts import cli

    from deployments.cluster.serve_start import list_metrics_ports, start_serve
    from deployments.schema import read_serve_config

    is_asked = False

    def drain(number: int, frame: types.FrameType | None) -> None:
        nonlocal is_asked
        is_asked = True
        signal.signal(signal.SIGINT, leave)  # the second signal does not wait
        _drain(config)
        leave(number, frame)

    def leave(number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(0) if is_own else KeyboardInterrupt

    signal.signal(signal.SIGINT, drain)
    watch = None
    try:
        if is_own:
            # Without an address, `serve run` would take any Ray that runs on this machine, and replace and drain what is
            # served there.
            ray.init("local", namespace="serve", include_dashboard=has_dashboard)
            watch = _DaemonWatch()
            if not has_dashboard:
                list_metrics_ports()
            start_serve(read_serve_config(config))
        cli(["run", config])
    except SystemExit as end:
        if not is_asked and not end.code:  # `serve run` ends so after an error
            raise SystemExit(1) from end
        raise
    finally:
        if watch is not None:
            watch.stop()


def _drain(config: str) -> None:
    """Delete all applications of the file, which lets their requests end; returns when they are gone."""
    import ray
    from ray import serve
    from ray.serve.scripts import SERVE_DEFAULT_APP_NAME

    from deployments.schema import read_serve_config

    if not ray.is_initialized():  # `serve.delete` would look for another Ray on this machine
        print("not drained: still starting", flush=True)
        return
    print("draining: running requests may end", flush=True)
    try:
        for application in read_serve_config(config)["applications"]:
            serve.delete(application.get("name", SERVE_DEFAULT_APP_NAME))
    except Exception as error:  # half started, or half gone: nothing that could be drained
        print(f"not drained: {error!r}", flush=True)


class _DaemonWatch:
    """Ends this process when one of Ray's daemons, its children, ends; drains when its parent is gone.

    Ray does not: without a raylet its proxies accept connections and never answer, and its driver waits for ever.
    """

    def __init__(self) -> None:
        import psutil

        self._parent = os.getppid()
        self._daemons: dict[psutil.Process, str] = {}
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if child.name() in DAEMONS:
                    self._daemons[child] = child.name()
        missing = DAEMONS - set(self._daemons.values())
        if missing:
            raise RuntimeError(
                f"Ray has started, but {', '.join(missing)} cannot be found among this process's children"
            )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="daemons", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Before Ray ends them."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(WATCH_INTERVAL_S):
            for daemon, name in self._daemons.items():
                if not _is_alive(daemon):
                    print(
                        f"pensieve-serve: Ray's {name} (process {daemon.pid}) has ended, and without it nothing is served: "
                        "this server ends; start it again",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)  # anything of Ray's could wait for the daemon
            if os.getppid() != self._parent:
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGINT)


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(main())
