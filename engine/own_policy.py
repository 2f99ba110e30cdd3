"""An eviction policy that a configuration names by its import path, MODULE:NAME."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import EvictionPolicy
from engine.errors import ConfigError
from engine.options import is_import_path

METHODS = ("insert", "remove", "choose_victim", "goes_before", "__len__", "__iter__", "__contains__")


def load_policy(name: str) -> Callable[[CostModel], EvictionPolicy] | None:
    """What makes the policy from the cost model; None if `name` is no import path, but one of the named policies.

    Imports the module. Raises ConfigError if it cannot be imported, or what it names is no policy.
    """
    if not is_import_path(name):
        return None
    module_name, _, attribute = name.partition(":")
    try:
        factory: Callable[[CostModel], EvictionPolicy] = getattr(importlib.import_module(module_name), attribute)
        policy = factory(CostModel())
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"eviction_policy {name} cannot be loaded: {error}; its module has to be installed or on PYTHONPATH, and see "
            "docs/extending.md",
            param="eviction_policy",
        ) from error
    if missing := [method for method in METHODS if not hasattr(policy, method)]:
        raise ConfigError(
            f"eviction_policy {name} has no {missing[0]}; it must have the methods of EvictionPolicy",
            param="eviction_policy",
        )
    return factory
