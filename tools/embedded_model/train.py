"""Trains the embedded model from nothing on generated dialogues, on one CPU core, and measures its recall.

Owns the tokenizer, the model's shape and the curriculum. After `python -m tools.embedded_model.train
--minutes 36 --out DIR`, DIR/weights is what `embedded_model_path()` ships and DIR/recall.json holds the
figures. The curriculum follows the clock, so two runs of one seed differ a little.
"""

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.embedded_model.dialogues import (
    Dialogue,
    Turn,
    draw_filler_words,
    draw_system,
    generate_dialogue,
    generate_turns,
)

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [PAD, SYSTEM, USER, ASSISTANT, END]
VOCAB_SIZE = 1024
MAX_POSITIONS = 4096

# Nothing is trimmed: a rendered history is, token for token, what was read and generated before.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONTEXT_EDGES = (0, 150, 350, 750, 1250, 1750, 2250, 3000, 3600, 4096)
EVALUATION_SEED = 1_000_000
# (dialogues, turns in each): some that fill the window, and short ones, so that every context length has its asks.
EVALUATION_SIZES = ((120, 400), (300, 12))


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the curriculum.

    until:      share of the whole time at which it ends.
    seq_len:    tokens a sequence.
    copy_share: how many sequences are repeated random segments, which teach to look up and copy.
    gap_share:  how many dialogues have their positions stretched over the whole window: a short sequence then
                shows the distances of a long one.
    """

    until: float
    seq_len: int
    copy_share: float
    gap_share: float


CURRICULUM = (
    Stage(until=0.06, seq_len=128, copy_share=0.7, gap_share=0.0),
    Stage(until=0.13, seq_len=128, copy_share=0.15, gap_share=0.3),
    Stage(until=0.22, seq_len=256, copy_share=0.1, gap_share=0.5),
    Stage(until=0.35, seq_len=512, copy_share=0.1, gap_share=0.5),
    Stage(until=0.52, seq_len=1024, copy_share=0.05, gap_share=0.5),
    Stage(until=0.73, seq_len=2048, copy_share=0.02, gap_share=0.3),
    Stage(until=1.00, seq_len=4095, copy_share=0.0, gap_share=0.0),
)
PEAK_LEARNING_RATE = 2e-3
CONSTANT_SHARE = 0.4  # of the time at the peak, then a cosine down to the floor
FLOOR_SHARE = 0.03
TOKENS_PER_STEP = 2048


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the dialogues: every byte has a token, so any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (
        message["content"]
        for dialogue_seed in range(3000)
        for message in generate_dialogue(seed + dialogue_seed, 12, filler_words=(0, 8)).messages()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(eos_token_id: int, pad_token_id: int) -> LlamaForCausalLM:
    """A Llama with untrained weights but for the positional heads of its first layer."""
    hidden_size, head_dim = 128, 32
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=hidden_size // head_dim,
        num_key_value_heads=hidden_size // head_dim // 2,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        initializer_range=0.5 * hidden_size**-0.5,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        init_positional_heads(model)
    return model


def init_positional_heads(model: LlamaForCausalLM) -> None:
    """Make head h of layer 0 look h + 1 tokens back whatever the tokens are; to be called without gradients.

    A constant query and key score c² Σ cos(θ_i (distance - offset)) under RoPE once the query's bias is
    turned by the offset. Recalling by matching the last few tokens then needs only the layers above; left to
    chance, a model this small finds that circuit late or never.
    """
    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq  # [head_dim / 2], fastest first
    head_dim, strength, num_frequencies = 32, 6.5, 6
    fast = slice(0, num_frequencies)
    fast_rotated = slice(head_dim // 2, head_dim // 2 + num_frequencies)
    attention.q_proj.weight.mul_(0.02)
    attention.k_proj.weight.mul_(0.02)
    key_bias = attention.k_proj.bias.view(-1, head_dim)
    key_bias.zero_()
    key_bias[:, fast] = strength
    query_bias = attention.q_proj.bias.view(-1, head_dim)
    query_bias.zero_()
    for head in range(query_bias.shape[0]):
        angle = frequencies[fast] * (head + 1)
        query_bias[head, fast] = strength * angle.cos()
        query_bias[head, fast_rotated] = -strength * angle.sin()


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: token ids, the position of each, and whether the token is to be learnt."""

    token_ids: list[int]
    positions: list[int]
    is_target: list[bool]


class SampleSource:
    """Draws endless training sequences from one seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._encoder = tokenizer.backend_tokenizer
        self.rng = random.Random(seed)
        ids = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END])
        self._user_id, self._assistant_id, self._end_id = ids

    def batch(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """token_ids, positions and is_target, each [batch, seq_len + 1]."""
        batch_size = max(1, TOKENS_PER_STEP // stage.seq_len)
        samples = [self._sample(stage) for _ in range(batch_size)]
        return (
            torch.tensor([sample.token_ids for sample in samples]),
            torch.tensor([sample.positions for sample in samples]),
            torch.tensor([sample.is_target for sample in samples]),
        )

    def _sample(self, stage: Stage) -> Sample:
        num_tokens = stage.seq_len + 1
        if self.rng.random() < stage.copy_share:
            return self._repeated_segment(num_tokens)
        token_ids = self.dialogue(num_tokens)
        is_target, in_answer = [], False
        for token_id in token_ids:
            is_target.append(in_answer)
            in_answer = token_id == self._assistant_id or (in_answer and token_id != self._end_id)
        positions = list(range(num_tokens))
        if self.rng.random() < stage.gap_share:
            positions = self._stretched(token_ids)
        return Sample(token_ids, positions, is_target)

    def _repeated_segment(self, num_tokens: int) -> Sample:
        # A small alphabet makes single tokens ambiguous, so that only a match of two or three in a row helps.
        alphabet_size = self.rng.choice((12, 24, 64, VOCAB_SIZE - len(SPECIAL_TOKENS)))
        alphabet = self.rng.sample(range(len(SPECIAL_TOKENS), VOCAB_SIZE), alphabet_size)
        segment_len = self.rng.randint(6, num_tokens // 2)
        segment = self.rng.choices(alphabet, k=segment_len)
        token_ids = (segment * (num_tokens // segment_len + 1))[:num_tokens]
        return Sample(token_ids, list(range(num_tokens)), [i >= segment_len for i in range(num_tokens)])

    def dialogue(self, num_tokens: int) -> list[int]:
        """A dialogue from its beginning, cut to so many tokens."""
        most = num_tokens // 12  # words of small talk, so that a short sequence still holds several turns
        low, high = draw_filler_words(self.rng)
        turns = generate_turns(
            self.rng,
            (min(low, most), min(high, most)),
            ask_share=self.rng.choice((0.5, 0.65)),
            most_facts=self.rng.choice((6, 15, 30, 60, 90)),
        )
        system = draw_system(self.rng)
        token_ids = self.encode(f"{SYSTEM}{system}") if system and num_tokens > 200 else []
        while len(token_ids) < num_tokens:
            token_ids += self.encode(render_turn(next(turns)))
        return token_ids[:num_tokens]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, which may have special ones written out."""
        token_ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return token_ids

    def _stretched(self, token_ids: list[int]) -> list[int]:
        """Positions with gaps before some of the turns, as if more had been said there."""
        starts = [i for i, token_id in enumerate(token_ids) if i and token_id == self._user_id]
        spare = MAX_POSITIONS - len(token_ids)
        if not starts or spare <= 0:
            return list(range(len(token_ids)))
        starts = sorted(self.rng.sample(starts, self.rng.randint(1, len(starts))))
        total = self.rng.randint(0, spare)
        cuts = sorted(self.rng.randint(0, total) for _ in starts)  # the shift after each start; grows
        positions, shift, next_start = [], 0, 0
        for i in range(len(token_ids)):
            if next_start < len(starts) and i == starts[next_start]:
                shift = cuts[next_start]
                next_start += 1
            positions.append(i + shift)
        return positions


def render_turn(turn: Turn) -> str:
    """The turn as the chat template writes it."""
    return f"{USER}{turn.user}{ASSISTANT}{turn.assistant}{END}"


def learning_rate(progress: float, step: int) -> float:
    """Of the peak: a short warm-up, the peak while the circuits form, a cosine. `progress` is the share that is done."""
    warm_up = min(1.0, (step + 1) / 100)
    if progress < CONSTANT_SHARE:
        return warm_up
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)))
    return max(FLOOR_SHARE, cosine) * warm_up


def train(
    model: LlamaForCausalLM,
    source: SampleSource,
    curriculum: Sequence[Stage],
    progress_at: Callable[[int], float],
    *,
    peak: float = PEAK_LEARNING_RATE,
) -> int:
    """Trains in place and returns the number of tokens seen.

    progress_at: the share that is done, by the number of steps; it ends at 1.
    peak: the highest learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    start = last_report = time.monotonic()
    step, num_tokens, smooth_loss, smooth_exact = 0, 0, 0.0, 0.0
    while (progress := progress_at(step)) < 1:
        stage = next(stage for stage in curriculum if progress < stage.until)
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate(progress, step)
        token_ids, positions, is_target = source.batch(stage)
        targets = is_target[:, 1:]
        # On short sequences the casts cost more than bfloat16 saves.
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.seq_len > 128):
            hidden = model.model(
                input_ids=token_ids[:, :-1],
                position_ids=positions[:, :-1],
                # Given so that transformers does not take a gap in the positions for another sequence.
                attention_mask=torch.ones_like(token_ids[:, :-1]),
                use_cache=False,
            ).last_hidden_state
            logits = model.lm_head(hidden[targets])
        expected = token_ids[:, 1:][targets]
        loss = torch.nn.functional.cross_entropy(logits.float(), expected)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = 0.03 if step else 1.0
        smooth_loss += share * (loss.item() - smooth_loss)
        smooth_exact += share * ((logits.argmax(-1) == expected).float().mean().item() - smooth_exact)
        step += 1
        num_tokens += token_ids.numel()
        now = time.monotonic()
        if now - last_report > 10:
            last_report = now
            print(
                f"{now - start:5.0f} s  {progress:4.0%}  step {step:5d}  length {stage.seq_len:4d}  "
                f"loss {smooth_loss:.4f}  right tokens {smooth_exact:.4f}  "
                f"{num_tokens / (now - start):6.0f} tokens/s",
                flush=True,
            )
    model.eval()
    return num_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """How one turn of an evaluation dialogue was answered.

    context_len: tokens before the answer. distance: tokens since its value was last said, 0 if it never was.
    is_exact:    greedy decoding gives the whole right answer and then the end token.
    """

    turn: Turn
    context_len: int
    distance: int
    is_exact: bool


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> Iterator[Answer]:
    """Answers every turn that fits the window, each after a history that was answered rightly.

    One forward pass is enough: a greedy answer is exact if and only if each of its tokens is the most likely
    one after the right ones before it.
    """
    token_ids: list[int] = []
    spans: list[tuple[Turn, int, int]] = []
    encode = tokenizer.backend_tokenizer.encode
    if dialogue.system is not None:
        token_ids += encode(f"{SYSTEM}{dialogue.system}").ids
    for turn in dialogue.turns:
        question = encode(f"{USER}{turn.user}{ASSISTANT}").ids
        answer = encode(f"{turn.assistant}{END}").ids
        begin = len(token_ids) + len(question)
        if begin + len(answer) > MAX_POSITIONS:
            break
        token_ids += question + answer
        spans.append((turn, begin, begin + len(answer)))
    with torch.no_grad():
        predicted = model(input_ids=torch.tensor([token_ids])).logits[0].argmax(-1).tolist()  # [i] predicts i + 1
    last_said: dict[str, int] = {}
    for turn, begin, end in spans:
        said_at = last_said.get(turn.assistant.removeprefix("ok, "), begin)
        yield Answer(turn, begin, begin - said_at, predicted[begin - 1 : end - 1] == token_ids[begin:end])
        if turn.value:
            last_said[turn.assistant.removeprefix("ok, ")] = end


def measure_recall(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    evaluation_sizes: Sequence[tuple[int, int]] = EVALUATION_SIZES,
) -> dict[str, dict[str, dict[str, float]]]:
    """Share of exact answers over held-out dialogues, cut at the end of the window.

    "by_kind" of the turn; for asks also "by_context_len" and "by_distance" to where the fact was last said.
    """
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    sizes = [num_turns for num_dialogues, num_turns in evaluation_sizes for _ in range(num_dialogues)]
    for i, num_turns in enumerate(sizes):
        # Every other one has long messages: few facts are told there and some are first asked for far behind.
        filler_words = (20, 170) if i % 2 else None
        for answer in answers(model, tokenizer, generate_dialogue(EVALUATION_SEED + i, num_turns, filler_words)):
            right["by_kind", answer.turn.kind].append(answer.is_exact)
            if answer.turn.kind == "ask":
                right["by_context_len", _bucket(answer.context_len)].append(answer.is_exact)
                right["by_distance", _bucket(answer.distance)].append(answer.is_exact)
    buckets = [f"{low}-{high}" for low, high in pairwise(CONTEXT_EDGES)]
    order = {"by_kind": ["tell", "ask", "unknown", "chat"], "by_context_len": buckets, "by_distance": buckets}
    return {
        group: {
            name: {"exact": round(sum(found) / len(found), 4), "count": len(found)}
            for name in names
            if (found := right[group, name])
        }
        for group, names in order.items()
    }


def _bucket(num_tokens: int) -> str:
    return next(f"{low}-{high}" for low, high in pairwise(CONTEXT_EDGES) if num_tokens <= high)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes what `from_pretrained` loads. A reader of the directory sees each file whole, old or new."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as staging:
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
        )
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging, save_jinja_files=False)
        for path in Path(staging).iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(path, directory / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=35.0, help="training time on one core")
    parser.add_argument("--out", type=Path, required=True, help="directory for weights/ and recall.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model(tokenizer.eos_token_id, tokenizer.pad_token_id)
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    start, seconds = time.monotonic(), 60 * arguments.minutes
    source = SampleSource(tokenizer, arguments.seed)
    num_tokens = train(model, source, CURRICULUM, lambda step: (time.monotonic() - start) / seconds)
    save(model, tokenizer, arguments.out / "weights")
    report = {
        "seed": arguments.seed,
        "minutes": arguments.minutes,
        "num_training_tokens": num_tokens,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "recall": measure_recall(model, tokenizer),
    }
    text = json.dumps(report, indent=2)
    (arguments.out / "recall.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
