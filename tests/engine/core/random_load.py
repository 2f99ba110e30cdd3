"""Arrivals, ends and faults at random, for a CoreDriver."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.core.cache.cost_model import CostModel
from engine.core.request import Request, SamplingParams


def random_sizes(rng: random.Random, num_cpu_blocks: int) -> tuple[int, dict[str, object]]:
    """(GPU blocks, options of CacheConfig and SchedulingConfig): tight ones."""
    num_gpu_blocks = rng.randint(7, 12)
    options = {
        "max_num_batched_tokens": rng.choice([2, 4, 7, 64]),
        "max_num_seqs": rng.choice([3, 6]),
        "decode_reserve": rng.choice([0.0, 0.2]),
        "num_cpu_blocks": num_cpu_blocks,
        "swap_out_watermark": rng.choice([0.0, 0.25, 0.8]),
        "max_swap_outs": rng.choice([1, 4, 16]),
        "write_through": rng.random() < 0.3,
        "cost_model": CostModel(1.0, 0.25, 4, load_costs={"cpu": rng.choice([0.0, 0.0, 1.0])}),
        "keep": rng.random() < 0.9,
        "prefill_batch_tokens": rng.choice([None, 1, 5]),
    }
    return num_gpu_blocks, options


@dataclass
class Load:
    """Arrivals, ends and faults at random; the same for the same seed as long as the plans and outputs are the same."""

    driver: object
    seed: int
    num_requests: int = 60
    tenants: tuple[tuple[str, float], ...] = (
        ("local", 1.0),
    )  # id and weight; conversations take turns in being theirs
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    conversations: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        for _ in self.steps():
            pass
        self.driver.settle()

    def steps(self) -> Iterator[None]:
        """One step after the other, until no request is left."""
        rng, driver = random.Random(self.seed), self.driver
        num_cpu_blocks = driver.core.cache_config.num_cpu_blocks
        window = driver.core.scheduling_config.max_model_len
        histories = dict.fromkeys("abcdef", tuple(rng.choices(range(9), k=6)))
        num_arrived = 0
        while num_arrived < self.num_requests or driver.core.has_requests:
            idle = [c for c in histories if c not in self.conversations.values()]
            while num_arrived < self.num_requests and idle and rng.random() < 0.4:
                name, conversation = f"r{num_arrived}", idle.pop(rng.randrange(len(idle)))
                history = histories[rng.choice(list(histories)) if rng.random() < 0.3 else conversation]
                prompt = (*history, *rng.choices(range(9), k=rng.randint(1, 9)))
                prompt = prompt if len(prompt) <= window - 12 else prompt[:6]
                stop = rng.sample(range(100, 150), k=3)  # a step in seventeen gives one of these
                options = {"frequency_penalty": 0.5} if rng.random() < 0.2 else {}
                max_tokens = rng.choice([1, 2, 4, 12, None])
                sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)
                tenant, weight = self.tenants[ord(conversation) % len(self.tenants)]
                request = Request(
                    name,
                    prompt,
                    sampling,
                    conversation_id=conversation,
                    eos_token_ids=stop,
                    tenant=tenant,
                    weight=weight,
                )
                driver.add_request(request)
                self.prompts[name], self.conversations[name] = prompt, conversation
                num_arrived += 1
            if driver.slow_tier is not None and rng.random() < 0.02:
                driver.slow_tier.wake()  # as long as a transfer hangs, the tier is left alone
            driver.executor.fails = rng.random() < 0.02
            driver.executor.computation_fails = rng.random() < 0.02
            if num_cpu_blocks and rng.random() < 0.05:
                driver.executor.corrupted.add(rng.randrange(num_cpu_blocks))
            running = list(self.conversations)
            driver.step(rng.choice(running) if running and rng.random() < 0.05 else None)
            for name in running:
                if rng.random() < 0.01:
                    driver.core.stop(name, driver.now, num_kept_output_tokens=1)
                elif rng.random() < 0.01:
                    driver.core.abort(name, driver.now)
                if name not in driver.core._requests:
                    histories[self.conversations.pop(name)] = self.prompts[name] + driver.tokens[name]
            yield
        driver.executor.fails = driver.executor.computation_fails = False
