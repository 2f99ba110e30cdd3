"""`pensieve experiment run FILE.yaml`: a matrix of configurations and loads, measured on a Ray cluster, or simulated.

    command.py    the command line            cells.py       what is to be run, and what identifies it
    measure.py    one cell on the cluster     deployment.py  its application: deploy, wait, change, take down
    drivers.py    actors that send the load   watch.py       what the replicas say meanwhile
    simulation.py one cell in the simulator   local_nodes.py a cluster of processes on this machine
    figures.py    turns -> figures, the same of both
    results.py    a folder with a file for each cell
    report.py, plots.py, page.py   all cells -> CSV, JSON, one HTML page

The file and its cases: deployments/experiment.py.
"""
