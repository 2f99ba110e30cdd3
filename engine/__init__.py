"""The inference engine of Pensieve: conversations keep their KV cache between turns.

Knows nothing of Ray or HTTP.
"""

__version__ = "0.1.0"
