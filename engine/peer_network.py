"""How an engine meets its peers: engines of the same model in other processes, which hand KV over to each other.

Plain data. Who they are is told to AsyncEngine.set_peers.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PeerNetwork:
    """What an engine needs to be one of them.

    secret: of all peers; who does not know it is refused.
    host: the address of this machine at which the engine listens.
    peer_id: this engine's name among them; another one after a restart.
    """

    secret: bytes = field(repr=False)
    host: str
    peer_id: str
