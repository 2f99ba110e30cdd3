"""What the requests of a StepLoop got, for sections that need no text of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from engine.core.engine_core import RequestOutput
from engine.errors import EngineError


class Answers:
    """Outputs by request id. A step that fails raises."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            self.outputs[output.request_id].append(output)

    def deliver(self) -> None: ...

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        raise error
