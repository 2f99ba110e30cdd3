"""What a stranger tries who reaches Ray's ports: to run code, here what makes a folder.

A program, so that it can run in another network namespace and with another environment than the test.

    python stranger.py KIND ADDRESS FOLDER [TOKEN]    prints what came of it; the test looks for the folder
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 20


class _MakeFolder:
    """Unpickling it makes the folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._folder,)


def call_replica(address: str, folder: str, token: str | None) -> str:
    """Serve's gRPC port of a replica, which unpickles what comes."""
    import pickle

    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(_MakeFolder(folder)))
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, metadata=metadata, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return "answered"


def run_task(address: str, folder: str, token: str | None) -> str:
    """The GCS, as a driver."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # or Ray takes another address of this machine for 127.0.0.1
    os.environ["RAY_NUM_REDIS_GET_RETRIES"] = "1"  # a refusal is final
    os.environ["RAY_AUTH_MODE"] = "token" if token else "disabled"
    if token:
        os.environ["RAY_AUTH_TOKEN"] = token
    import ray

    @ray.remote(num_cpus=0)
    def make_folder() -> None:
        os.mkdir(folder)

    try:
        ray.init(address, log_to_driver=False)
        ray.get(make_folder.remote(), timeout=TIMEOUT_S)
    except Exception as error:
        return repr(error)
    return "ran"


def submit_job(address: str, folder: str, token: str | None) -> str:
    """The dashboard, which starts any command line."""
    import json

    body = json.dumps({"entrypoint": f"mkdir {folder}"}).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{address}/api/jobs/", body, headers), timeout=TIMEOUT_S
        ) as response:
            return str(response.status)
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read().decode()}"
    except OSError as error:
        return repr(error)


KINDS = {"replica": call_replica, "gcs": run_task, "dashboard": submit_job}

if __name__ == "__main__":
    kind, address, folder, *token = sys.argv[1:]
    print(KINDS[kind](address, folder, token[0] if token else None))
