"""A compiler in front of another one: it lets a process of its own compile first, with limits of time and memory.

A client's grammar may be such that compiling it takes years: some constructs cost exponential time in every library, and a
thread cannot be stopped. A process can. What it got through, this process compiles too, in about the same time.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import engine
from engine.core.grammar import GrammarSpec
from engine.errors import EngineError, InvalidParameterError
from engine.grammar.guidance import GuidanceCompiler
from engine.grammar.interface import CompiledGrammar, GrammarCompiler, Vocabulary

# Seconds of a CPU, and bytes, for one grammar.
MAX_CPU_S = 2
MAX_BYTES = 1 << 30
STATM = Path("/proc/self/statm")


class TriedCompiler:
    """GuidanceCompiler for grammars that it compiles within limits. Thread-safe; they are tried one after the other."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Starts the process, and does what GuidanceCompiler does."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = _start(vocabulary)
        self._compiler: GrammarCompiler = GuidanceCompiler(vocabulary)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Raises InvalidParameterError, as GrammarCompiler.compile."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:  # what ended it was not this grammar
                self._end()
                self._process = _start(self._vocabulary)
            try:
                _write(self._process, spec)
                _read(self._process)
            except (EOFError, OSError, pickle.UnpicklingError):
                self._end()
                raise InvalidParameterError(
                    "the grammar cannot be used: compiling it takes too much time or memory; simplify it",
                    param="grammar",
                ) from None
        return self._compiler.compile(spec)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _stop(process)


def _start(vocabulary: Vocabulary) -> subprocess.Popen[bytes]:
    """A process that has the vocabulary. Raises EngineError if it does not come up."""
    root = str(Path(engine.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "engine.grammar.trial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for this process; that one ends with it
    )
    try:
        _write(process, vocabulary)
        _read(process)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        _stop(process)
        raise EngineError(f"the process that compiles grammars did not start: {error!r}; see standard error") from error
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it, and close what leads to it."""
    process.kill()
    with suppress(OSError):  # what was not read yet cannot be written any more
        process.communicate()


def _write(process: subprocess.Popen[bytes], message: Any) -> None:
    assert process.stdin is not None
    pickle.dump(message, process.stdin)
    process.stdin.flush()


def _read(process: subprocess.Popen[bytes]) -> None:
    """Wait until it is done with what was written."""
    assert process.stdout is not None
    pickle.load(process.stdout)


def _set_limits() -> None:
    """For what follows, from now on. Beyond them the system ends this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + MAX_CPU_S)
    if STATM.exists():
        _set_limit(resource.RLIMIT_AS, int(STATM.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES)


def _set_limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def serve(read: Callable[[], Any], write: Callable[[Any], None]) -> None:
    """Take a vocabulary, then one grammar after the other, until there are no more; say when each is done with."""
    compiler = GuidanceCompiler(read())
    write(True)
    while True:
        try:
            spec = read()
        except EOFError:
            return
        _set_limits()
        with suppress(InvalidParameterError):  # the other process finds the same, and says so
            compiler.compile(spec)
        write(True)


def main() -> None:
    """The process, between its standard input and output."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer

    def write(message: Any) -> None:
        pickle.dump(message, stdout)
        stdout.flush()

    serve(lambda: pickle.load(stdin), write)


if __name__ == "__main__":
    main()
