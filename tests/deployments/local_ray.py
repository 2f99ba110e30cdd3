"""A Ray of a test's own, in this process and on this machine."""

from typing import Any

import ray


def start_ray(**options: Any) -> None:
    """Small, and without a dashboard unless it is asked for. Ray gives its node half a minute to come up, which a slow
    machine may miss: then once more."""
    options = {"num_cpus": 4, "object_store_memory": 150 * 2**20, "include_dashboard": False, **options}
    try:
        ray.init("local", log_to_driver=False, **options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        ray.init("local", log_to_driver=False, **options)
