"""Which adapters an engine has, with an executor that only notes what it is told."""

from __future__ import annotations

import threading

from engine.adapters import LoadedAdapters
from engine.config import EngineConfig


class FakeExecutor:
    """during_load: called while an adapter is loaded."""

    def __init__(self):
        self.unloaded = []
        self.during_load = lambda: None

    def load_adapter(self, folder):
        self.during_load()
        return f"identity of {folder.rpartition('/')[2]}"

    def unload_adapter(self, identity):
        self.unloaded.append(identity)


def test_the_engine_thread_does_not_wait_until_an_adapter_is_loaded(tmp_path):
    """An adapter is to be forgotten while another one is loaded: that is done behind it."""
    executor = FakeExecutor()
    adapters = LoadedAdapters(EngineConfig(adapter_folder=str(tmp_path)), executor, "model")
    released = []

    def forget_in_engine_thread() -> None:
        thread = threading.Thread(target=adapters.forget, args=("identity of a", lambda: None), daemon=True)
        thread.start()
        thread.join(10.0)
        assert not thread.is_alive()

    adapters.load("x", "a", released.append)
    adapters.unload("x")
    executor.during_load = forget_in_engine_thread
    adapters.load("y", "b", released.append)
    assert executor.unloaded == []
    assert released == ["identity of a"]
    forget_in_engine_thread()
    assert executor.unloaded == ["identity of a"]


def test_an_adapter_that_gets_a_name_again_is_not_forgotten(tmp_path):
    executor = FakeExecutor()
    adapters = LoadedAdapters(EngineConfig(adapter_folder=str(tmp_path)), executor, "model")
    released = []
    adapters.load("x", "a", released.append)
    adapters.unload("x")
    executor.during_load = lambda: adapters.forget("identity of a", lambda: None)
    adapters.load("y", "a", released.append)
    adapters.forget(*released, lambda: None)
    assert executor.unloaded == []
    assert adapters.names == ("y",)
