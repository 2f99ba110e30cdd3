"""Pensieve on Ray Serve: an OpenAI-compatible ingress, a router and engine replicas.

The router keeps a session on the replica that holds its cache. No scheduling and no caching happens here.
"""
