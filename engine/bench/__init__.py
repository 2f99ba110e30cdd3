"""`pensieve bench`: a load of conversations on any server with OpenAI's API, and what it measured.

    command.py    the command line         plan.py     which endpoints, at which loads, in which order
    probe.py      what a server takes      apis.py     the bodies and streams of its APIs
    client.py     one request, timed       driver.py   the sessions of one process, in time
    processes.py  several of these         figures.py  times of turns -> figures
    files.py, plots.py, page.py            JSON and CSV, PNGs, one HTML page

Knows no engine: what it says of a server it has seen over HTTP.
"""
