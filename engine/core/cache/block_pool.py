"""The free and the taken block ids of one tier.

Only a block pool changes its free ids; what lies in a block is the executor's business.
"""

from __future__ import annotations


class BlockPool:
    """`num_blocks` blocks with ids 0..num_blocks-1, free or taken.

    The block freed last is handed out first: its memory is warm.
    """

    def __init__(self, name: str, num_blocks: int) -> None:
        """name: of the tier, for error messages."""
        self.name = name
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def try_allocate(self) -> int | None:
        """A free block's id, now taken; None if there is none."""
        if not self._free:
            return None
        block_id = self._free.pop()
        self._is_free[block_id] = 0
        return block_id

    def allocate_all(self) -> None:
        """Take all blocks that are free."""
        self._free.clear()
        self._is_free = bytearray(self.num_blocks)

    def free(self, block_id: int) -> None:
        """Take a block back."""
        assert not self._is_free[block_id], f"{self.name} block {block_id} freed twice"
        self._is_free[block_id] = 1
        self._free.append(block_id)

    def check_integrity(self, owned: list[int]) -> None:
        """Raises AssertionError unless each block id is exactly one of free or in `owned`."""
        assert len(owned) == len(set(owned)), f"{self.name}: a block has two owners: {sorted(owned)}"
        assert len(self._free) == sum(self._is_free) == len(set(self._free))
        overlap = set(self._free) & set(owned)
        assert not overlap, f"{self.name}: blocks both free and owned: {overlap}"
        assert len(self._free) + len(owned) == self.num_blocks, (
            f"{self.name}: {len(self._free)} free + {len(owned)} owned != {self.num_blocks} blocks"
        )
