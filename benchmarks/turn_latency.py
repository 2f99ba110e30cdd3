"""Time to first token by turn, pensieve and stateless in one run: ten turns that fill the window.

    python benchmarks/turn_latency.py
    python benchmarks/turn_latency.py --model PATH --num-turns 10 --repeats 5 --max-model-len 2048

Each turn is measured in both modes before the next, in alternating order; the figures are medians over the repeats. Writes a
JSON and a PNG to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import asdict, replace

import transformers
from machine import RESULTS, write_result

from engine.compare import Comparison, compare_modes, format_table, plot_comparison
from engine.core.request import SamplingParams
from engine.model_files import model_location

WORDS = "my cat dog house garden is in Paris London red blue green and the code of bike called Mia Tom lives"
NUM_OUTPUT_TOKENS = 16
MEDIANS = ("pensieve_ttft_s", "stateless_ttft_s", "pensieve_tokens_per_s", "stateless_tokens_per_s")


def user_messages(tokenizer, num_turns: int, tokens_per_turn: int, seed: int) -> list[str]:
    """Return messages of about `tokens_per_turn` tokens each.

    They differ for each seed, so that no cache serves two repeats.
    """
    rng, vocabulary = random.Random(seed), WORDS.split()
    messages = []
    for _ in range(num_turns):
        words = [rng.choice(vocabulary)]
        while len(tokenizer(" ".join(words)).input_ids) < tokens_per_turn:
            words.extend(rng.choices(vocabulary, k=4))
        messages.append(" ".join(words))
    return messages


def median_comparison(comparisons: list[Comparison]) -> Comparison:
    """Median times and rates of each turn over the repeats."""
    turns = []
    for same_turn in zip(*(comparison.turns for comparison in comparisons), strict=True):
        medians = {name: statistics.median(getattr(turn, name) for turn in same_turn) for name in MEDIANS}
        turns.append(
            replace(
                same_turn[0],
                **medians,
                speed_up=medians["stateless_ttft_s"] / medians["pensieve_ttft_s"],
                is_identical=all(turn.is_identical for turn in same_turn),
            )
        )
    return replace(
        comparisons[0],
        num_rounds=len(comparisons),
        turns=tuple(turns),
        is_identical=all(comparison.is_identical for comparison in comparisons),
        is_complete=all(comparison.is_complete for comparison in comparisons),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num-turns", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-model-len", type=int, help="fill only so much of the window")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="the answers of both modes are the same in float32 only")
    parser.add_argument("--name", default="turn_latency", help="name of the result files")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    location = model_location(arguments.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(location)
    config = transformers.AutoConfig.from_pretrained(location)
    window = arguments.max_model_len or config.max_position_embeddings
    per_turn = window // arguments.num_turns - NUM_OUTPUT_TOKENS - 8  # 8: the template's tokens, and to be sure
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    options = {"model": arguments.model, "num_threads": arguments.num_threads, "dtype": arguments.dtype}
    comparisons = [
        compare_modes(options, user_messages(tokenizer, arguments.num_turns, per_turn, seed), sampling, num_rounds=1)
        for seed in range(arguments.repeats)
    ]
    result = median_comparison(comparisons)
    print(format_table(result))
    last, second = result.turns[-1], result.turns[1]
    print(
        f"turn {last.turn}: {last.speed_up:.1f}x faster than stateless; "
        f"{last.pensieve_ttft_s / second.pensieve_ttft_s:.2f}x of turn 2"
    )
    write_result(arguments.name, {"repeats": arguments.repeats, "dtype": arguments.dtype, **asdict(result)})
    plot_comparison(result, RESULTS / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
