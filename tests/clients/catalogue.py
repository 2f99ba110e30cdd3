"""The clients that are tried against the server: their scripts, their packages, and when they run.

To add one: a script in the folder `scripts`, and a row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Client:
    """One row.

    script: a file in `scripts`; `.py` is run by Python, `.mjs` by Node.
    requirements: packages of PyPI or npm with their exact versions. None: it needs only what the extra `test` has, and so
    runs with the tests' own Python and in each run of the tests; the others are nightly.
    min_node: the first version of Node that it runs with.
    timeout_s: after that it counts as hanging.
    """

    script: str
    requirements: tuple[str, ...] = ()
    min_node: int = 20
    timeout_s: float = 300.0

    @property
    def name(self) -> str:
        return self.script.rpartition(".")[0]

    @property
    def is_light(self) -> bool:
        return not self.requirements

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = (
    Client("openai_chat.py"),
    Client("openai_tools.py"),
    Client("openai_parse.py"),
    Client("smolagents_agent.py", ("smolagents[openai]==1.26.0",)),
    Client("autogen_agent.py", ("autogen-ext[openai]==0.7.5", "autogen-agentchat==0.7.5")),
    Client("guidellm_benchmark.py", ("guidellm==0.8.1",)),
)
