"""Anthropic's Messages API: its requests, its answers, its errors."""
