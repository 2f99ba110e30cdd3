"""What a cluster would do with a workload: the core that serves, driven by a heap of events.

Knows no device, no Ray and no clock. It decides nothing that an engine or a router decides: EngineCore plans each step, and
the router is handed in. What it adds is how long things take.

    devices.py     models and devices as numbers, each with its source
    step_cost.py   what a step is made of, and how long it takes
    step_table.py  step times that were measured
    links.py       bandwidth and queue between a slow tier and the CPU tier
    replica.py     one EngineCore and the time of its steps
    events.py      the heap of events
    clients.py     sessions that send a turn after the answer to the last one
    routing.py     where a turn goes: the protocol, and baselines
    simulator.py   clients and replicas together; replicas that come, go and fail
    windows.py     the same with replicas in groups, which processes may drive (groups.py, group_processes.py)
    outcome.py     what came of it: a row for each turn, and statistics of them
    report.py      tables, CSV, and one page of HTML
"""
