"""Computes steps: model, KV pools, sampling. Follows plans; decides nothing."""
