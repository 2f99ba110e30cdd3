"""Processes and resources on Ray: placement, tensor-parallel groups, starts and their failures."""
