"""Which chunk of which context is where, and what is evicted next."""
