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
    Client("openai_auto.py"),
    Client("openai_responses.py"),
    Client("openai_agents.py"),
    Client("anthropic_messages.py"),
    Client("pydantic_ai_agent.py", ("pydantic-ai-slim[openai]==2.66.0",)),
    Client("instructor_modes.py", ("instructor==1.17.0",)),
    Client("langchain_agent.py", ("langchain-openai==1.7.4", "langgraph==1.2.24", "langchain==1.5.2")),
    Client("litellm_bridge.py", ("litellm==1.110.2",)),
    Client("llama_index_agent.py", ("llama-index-llms-openai-like==0.8.1", "llama-index-core==0.14.25")),
    Client("smolagents_agent.py", ("smolagents[openai]==1.26.0",)),
    Client("autogen_agent.py", ("autogen-ext[openai]==0.7.5", "autogen-agentchat==0.7.5")),
    Client("openai_js.mjs", ("openai@6.49.0", "zod@4.6.7")),
    Client("ai_sdk.mjs", ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7")),
    Client("lm_eval_tasks.py", ("lm-eval[api]==0.4.13", "transformers==5.23.0")),
    Client("guidellm_benchmark.py", ("guidellm==0.8.1",)),
    Client("aiperf_profile.py", ("aiperf==0.13.0",)),
    # Ten gigabytes; its client needs no GPU.
    Client("vllm_bench.py", ("vllm[bench]==0.33.0",), timeout_s=1200.0),
)
