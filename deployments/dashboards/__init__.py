"""`pensieve dashboards`: what Prometheus, Grafana and Ray's dashboard need to show a running cluster.

files    configuration for Prometheus and Grafana, from Ray's own templates; our dashboard beside Ray's
command  writes it, starts what is installed, and ends it
"""
