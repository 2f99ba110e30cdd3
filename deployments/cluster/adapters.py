"""The adapters that were loaded at run time, by deployment: names and folders, in Ray's control store.

They are there for replicas that start later, and as long as the Ray cluster lives; see docs/adapters.md.
"""

from __future__ import annotations

from ray import serve
from ray.experimental import internal_kv

from deployments.cluster.replica_feed import KV_NAMESPACE

MAX_FOLDER_CHARS = 4096


def wanted_adapters() -> dict[str, str]:
    """Those of the deployment whose replica this process is: folders by name. Blocks for a moment."""
    deployment = serve.get_replica_context().replica_id.deployment_id
    return AdapterRecords(deployment.app_name, deployment.name).read()


class AdapterRecords:
    """Those of one deployment. Each call blocks for a moment."""

    def __init__(self, app_name: str, deployment_name: str) -> None:
        self._prefix = f"{app_name}:{deployment_name}:adapter:"

    def read(self) -> dict[str, str]:
        """Folders by name."""
        keys = internal_kv._internal_kv_list(self._prefix, namespace=KV_NAMESPACE)
        found = {key: internal_kv._internal_kv_get(key, namespace=KV_NAMESPACE) for key in keys}
        return {
            key.decode().removeprefix(self._prefix): folder.decode()
            for key, folder in found.items()
            if folder is not None
        }

    def add(self, name: str, folder: str) -> bool:
        """False, and nothing changed, if there is one of that name."""
        key, value = self._prefix + name, folder.encode()
        is_there: bool = internal_kv._internal_kv_put(key, value, overwrite=False, namespace=KV_NAMESPACE)
        return not is_there

    def remove(self, name: str) -> bool:
        """False if there was none of that name."""
        return bool(internal_kv._internal_kv_del(self._prefix + name, namespace=KV_NAMESPACE))
