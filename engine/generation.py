"""What an engine is asked for: one turn, as one value of plain data that travels between processes."""

from __future__ import annotations

from dataclasses import dataclass

from engine.adapters import with_adapter
from engine.core.request import SamplingParams
from engine.core.retention import RetentionHint
from engine.dialogue.tools import AS_THE_MODEL_LIKES, ToolChoice
from engine.tenant import LOCAL_TENANT, Tenant
from engine.text.cache_marks import NO_WISH, CacheWish
from engine.text.prompt import AnswerBeginning, Prompt
from engine.text.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt to answer.

    request_id: unique among running requests.
    session_id: of the tenant's; KV and tokens of its earlier turns are used again. None = no conversation.
    prompt: what to answer or to continue.
    sampling: how tokens are chosen, and when the answer ends.
    return_prompt_token_ids: the first delta is to bring them.
    return_prompt_text: the first delta is to bring the prompt's text; with sampling.prompt_logprobs, it does in any case.
    shows_special_tokens, shows_stop_string: special tokens, and the stop string that ends the answer, are part of its text.
    return_answer_format: the first delta of an answer in a chat is to bring it; special tokens that mean something in it are
        in the text then, for its parser to take out.
    tool_choice: which of the prompt's tools the answer has to call; with return_answer_format only, as strict tools are.
    has_parallel_calls: where calls are forced or strict, the answer may make several; of a named function it makes one.
    adapter: the name of a loaded adapter; empty = the model alone. A session with another adapter is another conversation.
    tenant: two tenants share nothing.
    history: what the conversation has said, for an engine that has not heard it.
    beginning: an answer to go on from; counts of the deltas include it, their texts and tokens do not.
    clamps_max_tokens: if the window leaves less than max_tokens, the answer may have what it leaves; else that is an error.
    only_encodes: nothing is computed: the one delta counts the prompt's tokens, and brings them if they were asked for.
    spells_prompt: with only_encodes, the delta has the text of the prompt's tokens, and their names.
    cache_wish: how long the KV of the context is to be kept, and what it is to be compared with.
    retention: the same in tokens; it counts instead of the wish and what is marked in messages. If neither says anything,
        what was said of the conversation holds.
    prewarms: nothing is generated: the context is only computed or loaded, while nothing else is to be done.
    explains_misses: the first delta is to say why tokens of the prompt were computed.
    explains: the last delta is to say how the answer came about.
    log_id: what log lines about it have in their field `request_id`; empty = nothing.
    """

    request_id: str
    session_id: str | None
    prompt: Prompt
    sampling: SamplingParams
    return_prompt_token_ids: bool = False
    return_prompt_text: bool = False
    shows_special_tokens: bool = False
    shows_stop_string: bool = False
    return_answer_format: bool = False
    tool_choice: ToolChoice = AS_THE_MODEL_LIKES
    has_parallel_calls: bool = True
    tenant: Tenant = LOCAL_TENANT
    history: Transcript | None = None
    beginning: AnswerBeginning | None = None
    clamps_max_tokens: bool = False
    only_encodes: bool = False
    spells_prompt: bool = False
    cache_wish: CacheWish = NO_WISH
    retention: RetentionHint | None = None
    prewarms: bool = False
    explains_misses: bool = False
    explains: bool = False
    log_id: str = ""
    adapter: str = ""

    @property
    def conversation_id(self) -> str | None:
        """The session's name among all tenants'; None = no conversation."""
        if self.session_id is None:
            return None
        return conversation_name(self.tenant, with_adapter(self.session_id, self.adapter))


def conversation_name(tenant: Tenant, session_id: str) -> str:
    """A session's name among all tenants'. session_id: with its adapter, see with_adapter."""
    return f"{tenant.tenant_id}\n{session_id}"
