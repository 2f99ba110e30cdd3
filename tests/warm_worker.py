"""A worker process that belongs to one group after the other.

Standard input: pickled (EngineConfig, GroupMember, fault). Standard output: a line after each. fault: None, or what happens
instead of this rank's second step that computes: "raise" or "hang".
"""

import logging
import pickle
import sys
import threading

import torch

from engine.executor.model_runner import ModelRunner
from engine.executor.worker import run_worker

forward = ModelRunner._forward


def faulty(fault: str):
    calls = []

    def instead(self, *args):
        calls.append(args)
        if len(calls) < 2:
            return forward(self, *args)
        if fault == "hang":
            threading.Event().wait()
        raise RuntimeError("injected fault")

    return instead


torch.set_num_threads(1)
logging.basicConfig(level=logging.ERROR)
while True:
    try:
        config, member, fault = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    ModelRunner._forward = forward if fault is None else faulty(fault)
    run_worker(config, member)  # whatever it raises ends the process, as it does elsewhere
    print("ended", flush=True)
