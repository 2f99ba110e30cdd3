"""The adapters of an engine by the names that clients give, and how many requests use each.

    load      read on all ranks -> its name is known
    unload    its name is known no more -> the last request that uses it ends -> the executor forgets it

Chunks and the executor know an adapter by its identity, the hash of its files: another one of the same name is another one.
Knows no asyncio; from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import ADAPTER_NAME, ADAPTER_NAME_WORDS, EngineConfig
from engine.core.executor_protocol import Executor
from engine.errors import AdapterError, UnknownModelError

# In the name of a conversation, what stands for an adapter that is not loaded; no chunk has such a key.
NOT_LOADED = "not loaded"
MAX_SHOWN_CHARS = 80


class LoadedAdapters:
    """Those that may be asked for, and those that are still used."""

    def __init__(self, config: EngineConfig, executor: Executor, model_name: str) -> None:
        """Loads those of the configuration; blocking. Raises AdapterError.

        model_name: of the model itself, which no adapter may have.
        """
        self._executor = executor
        self._model_name = model_name
        self._folder = config.adapter_folder
        self._max_adapters = config.max_adapters
        self._identities: dict[str, str] = {}
        self._uses: Counter[str] = Counter()  # of each identity
        self._postponed: set[str] = set()  # identities that `forget` could not look at while an adapter was loaded
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        self._configured = frozenset(config.adapters or ())
        for name, folder in (config.adapters or {}).items():
            self._load(name, folder)

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may give as a model, besides the model itself."""
        with self._lock:
            return tuple(self._identities)

    def load(self, name: str, folder: str, released: Callable[[str], object]) -> None:
        """Load one while requests run; blocking. Raises AdapterError.

        folder: below adapter_folder, or the path from there on.
        released: told the identities of which `forget` was told meanwhile, and is to be told again.
        """
        try:
            self._load(name, str(self._below_folder(folder)))
        finally:
            with self._lock:
                postponed, self._postponed = self._postponed, set()
            for identity in postponed:
                released(identity)

    def unload(self, name: str) -> str:
        """No request may ask for it from now on; those that run, and wait, go on with it to their ends.

        Returns its identity, of which `forget` is to be told. Raises AdapterError.
        """
        with self._lock:
            if name in self._configured:
                raise AdapterError(
                    f"the adapter {_shown(name)} is one of the configuration; take it out of adapters there",
                    param="lora_name",
                )
            identity = self._identities.pop(name, None)
            if identity is None:
                raise AdapterError(f"no adapter {_shown(name)} is loaded", param="lora_name")
            return identity

    @contextmanager
    def used_by_request(self, name: str, released: Callable[[str], object]) -> Iterator[str]:
        """Hold an adapter as long as a request lives; gives its identity, "" for no name. Raises UnknownModelError.

        released: told the identity if `forget` may have something to do.
        """
        if not name:
            yield ""
            return
        with self._lock:
            identity = self._identities.get(name)
            if identity is None:
                raise UnknownModelError(
                    f"the model {_shown(name)} is not served; use {self._model_name!r} or a loaded adapter",
                    param="model",
                )
            self._uses[identity] += 1
        try:
            yield identity
        finally:
            with self._lock:
                self._uses[identity] -= 1
                is_named = identity in self._identities.values()
            if not is_named:
                released(identity)

    def identity_of(self, name: str) -> str:
        """Of the adapter that has that name now, "" for no name; NOT_LOADED if none has."""
        with self._lock:
            return self._identities.get(name, NOT_LOADED) if name else ""

    def forget(self, identity: str, before: Callable[[], object]) -> None:
        """Unload an adapter from the executor if it has no name and no request any more; in the engine thread.

        Nothing happens while another one is loaded, which might give it a name again: `load` says when to come again. The
        engine thread waits for no file.

        before: called if it is unloaded, to end what the engine itself does with it.
        """
        with self._lock:
            self._postponed.add(identity)
        if not self._loading.acquire(blocking=False):
            return
        try:
            with self._lock:
                self._postponed.discard(identity)
                if self._uses[identity] or identity in self._identities.values():
                    return
                del self._uses[identity]
            before()
            self._executor.unload_adapter(identity)
        finally:
            self._loading.release()

    def _load(self, name: str, folder: str) -> None:
        if not ADAPTER_NAME.fullmatch(name):
            raise AdapterError(f"an adapter's name has {ADAPTER_NAME_WORDS}, got {_shown(name)}", param="lora_name")
        if name == self._model_name:
            raise AdapterError(
                f"{_shown(name)} is the name of the model; give the adapter another one", param="lora_name"
            )
        with self._loading:
            with self._lock:
                if name in self._identities:
                    raise AdapterError(
                        f"an adapter {_shown(name)} is loaded already; unload it first", param="lora_name"
                    )
                in_use = {*self._identities.values(), *(+self._uses)}
            if len(in_use) >= self._max_adapters:
                raise AdapterError(
                    f"{len(in_use)} adapters are loaded, or still used, and max_adapters is {self._max_adapters}; unload one",
                    param="max_adapters",
                )
            identity = self._executor.load_adapter(folder)
            with self._lock:
                self._identities[name] = identity

    def _below_folder(self, folder: str) -> Path:
        if self._folder is None:
            raise AdapterError(
                "adapters are not loaded while this server runs; set adapter_folder to the folder of those that may be",
                param="adapter_folder",
            )
        allowed = Path(self._folder).expanduser().resolve()
        try:
            found = (allowed / Path(folder).expanduser()).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # no such home; links in a circle; a null character
            raise AdapterError(f"{_shown(folder)} is no path of a folder: {error}", param="lora_path") from None
        if found == allowed or not found.is_relative_to(allowed):
            raise AdapterError(
                f"{_shown(folder)} is not below adapter_folder; put the adapter there", param="lora_path"
            )
        return found


def _shown(text: str) -> str:
    return repr(text[:MAX_SHOWN_CHARS])


def split_session(session_id: str) -> tuple[str, str]:
    """The session and the adapter that a name made by `with_adapter` consists of."""
    session, _, adapter = session_id.partition("\n")
    return session, adapter


def with_adapter(session_id: str, adapter: str) -> str:
    """The name under which a session is routed and remembered: with each adapter it is a conversation of its own."""
    return f"{session_id}\n{adapter}" if adapter else session_id


def adapter_of(conversation_id: str) -> str:
    """The name of the adapter in a conversation's name; "" = the model alone."""
    return split_session(conversation_id.partition("\n")[2])[1]
