"""The series of one application among those of all, from nodes that answer and from some that do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from deployments.cluster import application_metrics
from deployments.cluster.application_metrics import ApplicationMetrics, select_series

ONE = """\
# HELP ray_pensieve_kv_blocks Blocks of KV cache
# TYPE ray_pensieve_kv_blocks gauge
ray_pensieve_kv_blocks{application="chat",state="free",tier="gpu"} 5.0
ray_pensieve_kv_blocks{application="other",state="free",tier="gpu"} 7.0
# HELP ray_pensieve_e2e_request_latency_seconds From arrival
# TYPE ray_pensieve_e2e_request_latency_seconds histogram
ray_pensieve_e2e_request_latency_seconds_bucket{application="chat",le="0.5"} 1.0
ray_pensieve_e2e_request_latency_seconds_count{application="chat"} 2.0
# HELP ray_node_cpu Of no application
# TYPE ray_node_cpu gauge
ray_node_cpu 1.0
"""
TWO = """\
# HELP ray_pensieve_kv_blocks Blocks of KV cache
# TYPE ray_pensieve_kv_blocks gauge
ray_pensieve_kv_blocks{application="chat",state="free",tier="cpu"} 9.0
# TYPE ray_pensieve_requests_total counter
ray_pensieve_requests_total{application="chat",outcome="finished"} 3.0
ray_pensieve_requests_total{application="chat2",outcome="finished"} 4.0
"""
OF_CHAT = """\
# HELP ray_pensieve_kv_blocks Blocks of KV cache
# TYPE ray_pensieve_kv_blocks gauge
ray_pensieve_kv_blocks{application="chat",state="free",tier="gpu"} 5.0
ray_pensieve_kv_blocks{application="chat",state="free",tier="cpu"} 9.0
# HELP ray_pensieve_e2e_request_latency_seconds From arrival
# TYPE ray_pensieve_e2e_request_latency_seconds histogram
ray_pensieve_e2e_request_latency_seconds_bucket{application="chat",le="0.5"} 1.0
ray_pensieve_e2e_request_latency_seconds_count{application="chat"} 2.0
# TYPE ray_pensieve_requests_total counter
ray_pensieve_requests_total{application="chat",outcome="finished"} 3.0
"""


def test_each_family_comes_once_and_with_what_is_said_of_it() -> None:
    assert select_series([ONE, TWO], 'application="chat"') == OF_CHAT
    assert select_series([ONE, TWO], 'application="none"') == ""


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The addresses of two nodes."""

    def handler(text: str) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments: object) -> None: ...

        return Handler

    with ExitStack() as stack:
        servers = [stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler(text))) for text in (ONE, TWO)]
        for server in servers:
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            stack.callback(server.shutdown)
        yield [f"http://127.0.0.1:{server.server_port}/metrics" for server in servers]


async def test_nodes_that_do_not_answer_are_named(nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert await ApplicationMetrics("chat", lambda: nodes)() == OF_CHAT
    absent = "http://127.0.0.1:1/metrics"
    assert await ApplicationMetrics("chat", lambda: [*nodes, absent])() == f"{OF_CHAT}# {absent} did not answer\n"
    monkeypatch.setattr(application_metrics, "MAX_NODE_BYTES", 10)
    told = await ApplicationMetrics("chat", lambda: nodes)()
    assert told == "".join(f"# {node} did not answer\n" for node in nodes)
