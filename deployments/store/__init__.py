"""Conversations, responses and their token ids in SQLite or PostgreSQL."""
