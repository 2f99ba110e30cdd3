"""Scheduling and caching decisions, sans I/O: no clock, thread, device, file, torch or Ray. Time is an argument."""
