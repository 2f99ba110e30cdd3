"""First come, first served within a tenant, fair by weight between tenants; and who goes when too many wait."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engine.core.request import Request, SamplingParams
from engine.core.waiting_queue import WaitingQueue
from engine.errors import OverloadedError

numbers = iter(range(10**9))


def make(tenant: str = "a", num_tokens: int = 10, weight: float = 1.0) -> Request:
    number = next(numbers)
    request = Request(f"{tenant}{number}", range(num_tokens), SamplingParams(), tenant=tenant, weight=weight)
    request.arrival_s = float(number)
    return request


def serve(queue: WaitingQueue, num_requests: int) -> list[Request]:
    served = []
    for _ in range(num_requests):
        request = queue.peek()
        assert request is not None
        queue.serve(request, request.num_tokens)
        served.append(request)
    return served


def tenants(requests: list[Request]) -> str:
    return "".join(request.tenant for request in requests)


def test_one_tenant_is_served_as_it_came() -> None:
    queue = WaitingQueue()
    requests = [make(num_tokens=random.Random(i).randint(1, 99)) for i in range(20)]
    for request in requests:
        queue.append(request)
    assert queue.num_tokens == sum(request.num_tokens for request in requests)
    assert serve(queue, 20) == requests
    assert (len(queue), queue.num_tokens, queue.peek()) == (0, 0, None)


def test_a_flood_does_not_delay_another_tenant() -> None:
    queue = WaitingQueue()
    for _ in range(100):
        queue.append(make("a"))
    assert tenants(serve(queue, 3)) == "aaa"
    for _ in range(3):
        queue.append(make("b"))
    assert tenants(serve(queue, 6)) == "ababab"


def test_service_is_counted_in_tokens() -> None:
    queue = WaitingQueue()
    for _ in range(4):
        queue.append(make("a", num_tokens=30))
    for _ in range(9):
        queue.append(make("b", num_tokens=10))
    assert Counter(tenants(serve(queue, 8))) == {"a": 2, "b": 6}


def test_generated_tokens_count_too() -> None:
    queue = WaitingQueue()
    for _ in range(4):
        queue.append(make("a"))
        queue.append(make("b"))
    first, *_ = serve(queue, 2)
    assert first.tenant == "a"
    queue.charge(first, 25)
    assert tenants(serve(queue, 4)) == "bbba"


def test_a_weight_of_three_gets_three_times_as_much() -> None:
    queue = WaitingQueue()
    for _ in range(100):
        queue.append(make("a", weight=3.0))
        queue.append(make("b"))
    assert Counter(tenants(serve(queue, 80))) == {"a": 60, "b": 20}


def test_idling_earns_no_credit() -> None:
    queue = WaitingQueue()
    queue.append(make("b"))
    serve(queue, 1)
    for _ in range(50):
        queue.append(make("a"))
    serve(queue, 30)
    for _ in range(20):
        queue.append(make("b"))
    assert Counter(tenants(serve(queue, 20))) == {"a": 10, "b": 10}


def test_what_others_generate_while_a_tenant_is_idle_is_no_credit() -> None:
    """ "a" generates while no request is waiting: "b" does not start behind that, and neither does a tenant of long ago."""
    queue = WaitingQueue()
    queue.append(make("b"))
    queue.append(make("a"))
    queue.append(make("a"))
    _, running, _ = serve(queue, 3)
    queue.charge(running, 1000)
    for _ in range(4):
        queue.append(make("a"), {"a"})
        queue.append(make("b"), {"a"})
    assert tenants(serve(queue, 8)) == "abababab"


def test_who_was_running_is_in_front_of_its_own_tenant_only() -> None:
    queue = WaitingQueue()
    for _ in range(2):
        queue.append(make("a"))
    older, old = serve(queue, 2)
    waiting, other = make("a"), make("b")
    queue.append(waiting, {"a"})
    queue.append(other, {"a"})
    for request in (old, older):
        queue.put_back(request)
    assert [request for request in queue if request.tenant == "a"] == [older, old, waiting]
    assert serve(queue, 4) == [older, other, old, waiting]


def test_suspended_requests_are_never_refused_and_do_not_count() -> None:
    queue = WaitingQueue()
    for _ in range(4):
        queue.append(make("a"))
    for request in serve(queue, 4):
        queue.put_back(request)
    assert queue.find_victim(make("b")) is None
    waiting = [make("a"), make("a"), make("b")]
    for request in waiting:
        queue.append(request, {"a"})
    assert queue.find_victim(make("b")) is None, "2 of a's and 2 of b's"
    assert queue.find_victim(make("c")) is waiting[1]


def test_any_request_can_be_taken_out() -> None:
    queue = WaitingQueue()
    requests = [make(tenant) for tenant in "abab"]
    for request in requests:
        queue.append(request)
    queue.remove(requests[2])
    queue.remove(requests[1])
    assert (len(queue), queue.num_tokens) == (2, 20)
    assert tenants(serve(queue, 2)) == "ab"


def test_against_a_fluid_model() -> None:
    """While tenants wait, what they got differs from their share by less than two of the largest requests."""
    rng = random.Random(3)
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    queue = WaitingQueue()
    for tenant, weight in weights.items():
        for _ in range(400):
            queue.append(make(tenant, rng.randint(1, 50), weight))
    got: Counter[str] = Counter()
    for _ in range(300):
        request = serve(queue, 1)[0]
        got[request.tenant] += request.num_tokens
        normalised = [got[tenant] / weight for tenant, weight in weights.items()]
        assert max(normalised) - min(normalised) <= 100


def test_served_tenants_leave_nothing_behind() -> None:
    queue = WaitingQueue()
    for number in range(1000):
        queue.append(make(f"t{number}"))
        serve(queue, 1)
    assert len(queue._virtual_times) <= 2


# -- in the core -------------------------------------------------------------------------------------------------------


def test_limits_of_waiting_requests_and_tokens_are_exact(make_core) -> None:
    driver = make_core(32, max_num_seqs=1, max_num_queued_reqs=3, max_num_queued_tokens=30)
    driver.add("running", range(8))
    driver.step()
    for number in range(3):
        driver.add(f"w{number}", range(8))
    with pytest.raises(OverloadedError, match=r"queue is full \(3 requests, 24 tokens\)"):
        driver.add("one too many", range(1))
    driver.core.abort("w1", driver.now)
    with pytest.raises(OverloadedError, match=r"queue is full \(2 requests, 16 tokens\)"):
        driver.add("too long", range(15))
    driver.add("fits", range(14))
    driver.core.check_integrity()
    driver.run()
    assert set(driver.finished) == {"running", "w0", "w2", "fits"}
    assert driver.core.get_statistics()["num_refused"] == 2


def test_a_context_longer_than_the_limit_waits_alone(make_core) -> None:
    driver = make_core(32, max_num_queued_tokens=10)
    driver.add("long", range(50))
    with pytest.raises(OverloadedError):
        driver.add("short", range(1))
    driver.run()
    assert set(driver.finished) == {"long"}


def test_who_has_more_than_a_share_of_the_queue_makes_room(make_core) -> None:
    driver = make_core(32, max_num_seqs=1, max_num_queued_reqs=4)
    driver.add("running", range(8))
    driver.step()
    for number in range(4):
        driver.add(f"flood{number}", range(8))

    def add(tenant: str, name: str, weight: float = 1.0) -> list[str]:
        sampling = SamplingParams(temperature=0.0, max_tokens=2)
        return driver.core.add_request(Request(name, range(8), sampling, tenant=tenant, weight=weight), driver.now)

    assert add("b", "b0") == ["flood3"]
    assert add("b", "b1") == ["flood2"]
    with pytest.raises(OverloadedError):  # two of four: that is its share
        add("b", "b2")
    with pytest.raises(OverloadedError):
        driver.add("flood4", range(8))
    assert add("c", "c0", weight=4.0) == ["flood1"]
    driver.core.check_integrity()
    assert driver.core.get_statistics()["num_requests_waiting"] == 4
    assert driver.core.get_statistics()["num_refused"] == 5


def test_admission_is_fair_between_tenants(make_core) -> None:
    """Four places, a flood of one tenant, then another tenant: it gets every second place that becomes free."""
    driver = make_core(64, max_num_seqs=4, max_num_batched_tokens=64)
    for number in range(40):
        driver.add(f"a{number}", range(number, number + 8), tenant="a")
    driver.run_steps(2)
    for number in range(6):
        driver.add(f"b{number}", range(number, number + 8), tenant="b")
    started = [start.request_id[0] for plan in driver.plans for start in plan.starts]
    driver.plans.clear()
    driver.run()
    assert started == ["a"] * 4
    order = "".join(start.request_id[0] for plan in driver.plans for start in plan.starts)
    assert order.rindex("b") <= 15
    assert Counter(order[:12])["b"] >= 5
