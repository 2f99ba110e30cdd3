"""KV from and to other engines of the same model: connections, frames, and the peers as a slow tier."""
