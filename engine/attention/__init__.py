"""Attention over a paged KV cache, for transformers' own model code.

Knows nothing of requests or scheduling.
"""
