"""What the application's arguments become of the deployments. Starts nothing."""

from __future__ import annotations

import pytest

from deployments.app import HEAD_NODE, build
from deployments.schema import AppArgs


@pytest.mark.parametrize(
    ("store_url", "is_on_one_node"),
    [(None, True), ("sqlite:////var/lib/x.db", True), ("postgresql://user@host/database", False)],
)
def test_a_store_in_a_file_keeps_the_ingress_on_one_node(store_url: str | None, is_on_one_node: bool) -> None:
    """Each node would have a file of its own, and half of the requests would not find what the other half stored."""
    application = build(AppArgs(store_url=store_url, num_ingress_replicas=2))
    resources = application._bound_deployment.ray_actor_options.get("resources") or {}
    assert (HEAD_NODE in resources) is is_on_one_node
