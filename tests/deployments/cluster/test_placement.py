"""What is said of a replica or a group that has no place. The real thing is in test_rolling.py and test_tp_group.py."""

from deployments.cluster.placement import Node, explain, explain_replica, group_bundles


def test_bundles() -> None:
    assert group_bundles(2, 4, 1) == [{"CPU": 4, "GPU": 1}] * 2
    assert group_bundles(3, 0.5, 0) == [{"CPU": 0.5}] * 3
    assert group_bundles(1, 0, 1) == [{"GPU": 1}]


def test_what_is_asked_and_what_is_there() -> None:
    nodes = [
        Node({"CPU": 64, "GPU": 4, "memory": 1e9}, {"CPU": 60.5, "memory": 1e9}),
        Node({"CPU": 96, "GPU": 8}, {"CPU": 10, "GPU": 3}),
        Node({"CPU": 8}, {"CPU": 8}),
    ]
    bundles = [{"CPU": 4, "GPU": 1}] * 4
    assert explain(bundles, "STRICT_PACK", nodes) == (
        "an engine replica waits for its tensor-parallel group to be placed: 4 bundles of 4 CPU, 1 GPU, all on one node "
        "(STRICT_PACK); free on the 3 nodes: 10 of 96 CPU, 3 of 8 GPU; 60.5 of 64 CPU, 0 of 4 GPU; 8 of 8 CPU, 0 of 0 GPU. "
        "It starts when that is free: add nodes, or lower tensor_parallel_size, num_cpus or num_gpus"
    )
    hopeless = explain(bundles, "PACK", nodes, is_hopeless=True)
    assert "on as few nodes as possible (PACK)" in hopeless
    assert "The cluster is too small even when idle" in hopeless


def test_many_nodes_are_not_all_named() -> None:
    nodes = [Node({"GPU": 8}, {"GPU": number % 3}) for number in range(30)]
    message = explain([{"GPU": 1}] * 4, "STRICT_PACK", nodes)
    assert message.count("2 of 8 GPU") == 8
    assert "1 of 8 GPU" not in message
    assert "and 22 more nodes" in message


def test_a_replica_that_no_node_has_room_for() -> None:
    nodes = [Node({"CPU": 2, "memory": 1e9}, {"CPU": 0.5}), Node({"CPU": 8}, {"CPU": 3})]
    assert explain_replica({"CPU": 1, "GPU": 1}, nodes, is_new=True) == (
        "an engine replica waits for 1 CPU, 1 GPU on one node; free on the 2 nodes: 3 of 8 CPU, 0 of 0 GPU; 0.5 of 2 CPU, "
        "0 of 0 GPU. No node has as much, even when idle: add nodes, or lower num_cpus or num_gpus"
    )
    assert explain_replica({"CPU": 4}, nodes) == (
        "an engine replica waits for 4 CPU on one node; free on the 2 nodes: 3 of 8 CPU; 0.5 of 2 CPU. It starts when that "
        "is free: add nodes, or lower num_cpus or num_gpus"
    )
    assert explain_replica({"CPU": 4}, nodes, is_new=True) is None  # its process is starting, and has taken them itself
    assert explain_replica({"CPU": 3}, nodes) is None
