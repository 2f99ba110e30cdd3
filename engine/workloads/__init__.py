"""Workloads: sessions of turns, from traces, files of conversations and named distributions. Values; no clock and no network.

The simulator and the load generator take the same sessions from here.

    session.py         Session, Turn, Span: what is asked when, and which tokens are the same
    distributions.py   lengths, counts and pauses by name
    arrivals.py        when sessions start
    synthetic.py       sessions from distributions; ShareGPT and UltraChat by the paper's statistics
    conversations.py   files with text: tau-bench, OASST, ShareGPT, vLLM's multi-turn benchmark, aiperf
    mooncake.py        traces of requests with hashes of their blocks, in and out
    session_file.py    our own JSONL, in and out
    tokens.py          token ids and words of a span
    sources.py         all of them by name
"""
