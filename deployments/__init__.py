"""Pensieve on Ray Serve: an OpenAI-compatible ingress, engine replicas, and a router that keeps a session
where its cache is. No scheduling and no caching happens here.
"""
