"""`pensieve-serve serve_config.yaml`: what `serve run` does, and what it does not: the file is checked first, SIGTERM and
Ctrl-C drain, and Serve's switches for speed are set before Ray starts, more of them with --fast-path.

Draining: no new requests; those that run end, within `graceful_shutdown_timeout_s`; then everything stops.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from deployments.schema import IMPORT_PATH, check_serve_config
from deployments.tenants import API_KEY_VARIABLE, load_tenants
from engine.errors import ConfigError

DEFAULTS = {
    # `serve run` may write a token to the user's home otherwise.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Requests go from process to process by gRPC, and each process has one event loop instead of three: this halves what the
    # way of a request costs. On one machine, for which this command is, a process that dies closes its connections; a
    # machine that vanishes does not, and gRPC would take minutes to notice.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
# HAProxy as the HTTP proxy, and all of Serve's own set. See docs/configuration.md.
FAST_PATH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pensieve-serve", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("config", help="a Serve config file, such as serve_config.yaml")
    parser.add_argument("--fast-path", action="store_true", help="HAProxy in front; needs API keys")
    options = parser.parse_args(arguments)
    try:
        problems = check_serve_config(options.config)
        if options.fast_path and not problems:
            problems = list(_open_applications(options.config))
    except (OSError, ConfigError) as error:
        problems = [str(error)]
    if os.environ.get("RAY_ADDRESS", "local") != "local" and API_KEY_VARIABLE in os.environ:
        problems.append(
            f"{API_KEY_VARIABLE} counts on the nodes of the cluster that RAY_ADDRESS names, not here, and without keys "
            "everybody on those nodes is served: put the keys into args.tenants_file"
        )
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    for name, value in {**DEFAULTS, **(FAST_PATH if options.fast_path else {})}.items():
        os.environ.setdefault(name, value)
    return _run(options.config)


def _open_applications(config: str) -> Iterator[str]:
    """Behind HAProxy every client looks like this machine, so that an application without keys could serve nobody."""
    for index, application in enumerate(yaml.safe_load(Path(config).read_text())["applications"]):
        if application["import_path"] == IMPORT_PATH:
            path = (application.get("args") or {}).get("tenants_file")
            if not load_tenants(path, os.environ):
                yield (
                    f"applications[{index}]: --fast-path needs API keys, for HAProxy does not say who asks: set "
                    f"args.tenants_file or {API_KEY_VARIABLE}"
                )


def _run(config: str) -> int:
    """`serve run` in a process of its own, because Ray installs a handler for SIGTERM that drains nothing. In a session of
    its own, because Ctrl-C in a terminal goes to all processes of one, Ray's daemons included."""
    command = "import sys; from deployments.run import serve_run; serve_run(sys.argv[1])"
    serve = subprocess.Popen([sys.executable, "-c", command, config], start_new_session=True)

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        serve.send_signal(signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return serve.wait()


def serve_run(config: str) -> None:
    """`serve run config`, which drains on SIGINT. Serve's own answer to it ends the HTTP proxies first, and with them all
    streams; so the applications are deleted before, whose replicas let their requests end."""
    from ray import serve  # only now: Ray reads its environment when it is imported
    from ray.serve.scripts import SERVE_DEFAULT_APP_NAME, cli

    def drain(number: int, frame: types.FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever asks again does not want to wait
        print("draining: running requests may end", flush=True)
        try:
            for application in yaml.safe_load(Path(config).read_text())["applications"]:
                serve.delete(application.get("name", SERVE_DEFAULT_APP_NAME))
        except Exception as error:  # still starting, or half gone: nothing that could be drained
            print(f"not drained: {error!r}", flush=True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, drain)
    # A Ray of its own, unless the environment names one: without a word, `serve run` takes whichever runs on the machine, and
    # replaces and drains what is served there.
    own = [] if "RAY_ADDRESS" in os.environ else ["--address", "local"]
    cli(["run", *own, config])


if __name__ == "__main__":
    sys.exit(main())
