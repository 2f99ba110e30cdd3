"""`pensieve dashboards`: Prometheus and Grafana beside a Ray cluster on this machine, as far as they are installed.

    pensieve dashboards               write the files, start what is installed, end it on Ctrl-C
    pensieve dashboards --write-only  only write the files
    pensieve dashboards --print-env   what Ray's dashboard needs in its environment, for a shell that starts Ray

It looks at Ray's files only: no Ray is joined or started.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from deployments.dashboards.files import Addresses, Files, find_discovery, write_files
from engine.errors import ConfigError, PensieveError

SESSION = Path("/tmp/ray/session_latest")
INSTALL_PROMETHEUS = (
    "Prometheus is not installed: apt-get install prometheus (and systemctl disable --now prometheus, which would take its "
    "port), or let yours read"
)
INSTALL_GRAFANA = (
    "Grafana is not installed, and Debian has no package of it: https://grafana.com/grafana/download says how; "
    "or give yours"
)
GRAFANA_HOME = Path("/usr/share/grafana")
# How long a program may take to end, in seconds, before it is killed; and how often it is seen whether one has ended.
END_S = 10.0
LOOK_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """0 = done or ended by a signal, 1 = it cannot be done, or a program ended by itself, 2 = usage."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except PensieveError as error:
        print(f"pensieve dashboards: {error.message}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pensieve dashboards",
        description="Start Prometheus and Grafana beside a running cluster, as far as they are installed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--session",
        type=Path,
        default=SESSION,
        metavar="DIR",
        help="Folder of Ray's session, if several run on this machine (default: %(default)s, the one that started last)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="Where to write (default: pensieve_dashboards in there)"
    )
    parser.add_argument("--prometheus-port", type=_port, default=9090, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--grafana-port", type=_port, default=3000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--grafana-url",
        metavar="URL",
        help="Where a browser reaches Grafana, for the pages that Ray's dashboard embeds (default: this machine)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write-only", action="store_true", help="Write the files and start nothing")
    what.add_argument(
        "--print-env", action="store_true", help="Print what Ray needs in its environment, and do no more"
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 1 to 65535")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    grafana = f"http://127.0.0.1:{options.grafana_port}"
    addresses = Addresses(
        prometheus=f"http://127.0.0.1:{options.prometheus_port}",
        grafana=grafana,
        grafana_for_browsers=options.grafana_url or grafana,
    )
    if options.print_env:
        print(addresses.exports(), end="")
        return 0
    discovery = find_discovery(options.session)
    folder = options.output or discovery.parent / "pensieve_dashboards"
    files = write_files(discovery, folder, addresses, options.grafana_port)
    print(f"pensieve dashboards: wrote {files.folder}, for the Ray of {discovery.parent}")
    if options.write_only:
        return 0
    programs = _find_programs(files, addresses, options)
    if not programs:
        return 1
    print(
        "Ray's dashboard embeds them if it was started with\n"
        + "".join(f"    {line}\n" for line in addresses.exports().splitlines()),
        flush=True,
    )
    return _run_programs(programs, files.folder)


@dataclass(frozen=True, slots=True)
class _Program:
    """name: for messages, and of its log. port, url: where it listens."""

    name: str
    command: tuple[str, ...]
    port: int
    url: str


def _find_programs(files: Files, addresses: Addresses, options: argparse.Namespace) -> list[_Program]:
    """Those that are installed; says what is to be done about the others."""
    programs: list[_Program] = []
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        print(f"pensieve dashboards: {INSTALL_PROMETHEUS} {files.prometheus_config}", file=sys.stderr)
    else:
        command: tuple[str, ...] = (
            prometheus,
            f"--config.file={files.prometheus_config}",
            f"--storage.tsdb.path={files.prometheus_data}",
            f"--web.listen-address=127.0.0.1:{options.prometheus_port}",
        )
        programs.append(_Program("Prometheus", command, options.prometheus_port, addresses.prometheus))
    grafana = shutil.which("grafana-server")
    if grafana is None:
        where = f"the data source {addresses.prometheus} and the dashboards in {files.grafana_dashboards}"
        print(f"pensieve dashboards: {INSTALL_GRAFANA} {where}", file=sys.stderr)
    else:
        command = (grafana, f"--homepath={GRAFANA_HOME}", f"--config={files.grafana_config}")
        programs.append(_Program("Grafana", command, options.grafana_port, addresses.grafana))
    return programs


def _run_programs(programs: Sequence[_Program], folder: Path) -> int:
    """Run them until a signal comes or one of them ends; then none of them is left."""
    for program in programs:
        _check_port(program)
    is_asked = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        is_asked.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    running: list[tuple[_Program, subprocess.Popen[bytes]]] = []
    try:
        for program in programs:
            log = folder / f"{program.name.lower()}.log"
            with log.open("wb") as output:
                # In a session of its own: Ctrl-C in a terminal goes to this process, which ends the others.
                process = subprocess.Popen(program.command, stdout=output, stderr=output, start_new_session=True)
            running.append((program, process))
            print(f"{program.name}: {program.url} (log: {log}); Ctrl-C ends it", flush=True)
        while not is_asked.wait(LOOK_S):
            for program, process in running:
                if (status := process.poll()) is not None:
                    log = folder / f"{program.name.lower()}.log"
                    print(
                        f"pensieve dashboards: {program.name} has ended (status {status}); {log} says why",
                        file=sys.stderr,
                    )
                    return 1
        return 0
    finally:
        _end([process for _, process in running])


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _check_port(program: _Program) -> None:
    """Raises ConfigError if something listens there already."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", program.port))
        except OSError as error:
            option = f"--{program.name.lower()}-port"
            message = (
                f"{program.name} cannot listen on port {program.port}: {error.strerror}; name another with {option}"
            )
            raise ConfigError(message) from error


if __name__ == "__main__":
    sys.exit(main())
