"""Admission under crowds: clients of openai that come again when they are told, and ten times what can be served.

Time is virtual and chance is seeded. What a client does is what openai's and anthropic's do: two retries of a 429 or a
503, after ``retry-after-ms`` where that is at most a minute, else after half a second and twice that, less up to a
quarter by chance.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest

from sprat.serve.admission import Admission
from sprat.serve.errors import RequestError
from tests.unit.serve.virtual_time import clock, run

Service = Callable[[random.Random], float]

SERVICES: dict[str, Service] = {  # seconds for a request, of mean 1
    "constant": lambda chance: 1.0,
    "even": lambda chance: chance.uniform(0.2, 1.8),
    "exponential": lambda chance: chance.expovariate(1.0),
    "lognormal": lambda chance: chance.lognormvariate(-0.5, 1.0),
}


class Crowd:
    """Clients of one server, and what became of their requests."""

    def __init__(self, admission: Admission, service: Service, mean: float, seed: int) -> None:
        self.admission, self.service, self.mean = admission, service, mean
        self.chance = random.Random(seed)
        self.served: list[tuple[float, str]] = []
        self.failed = 0
        self.refusal_seconds: list[float] = []
        self.most_waiting = 0

    async def ask(self, tenant: str) -> None:
        """One attempt."""
        arrival = clock()
        seconds = self.mean * self.service(self.chance)
        try:
            async with self.admission.place(tenant, tokens=100) as place:
                self.most_waiting = max(self.most_waiting, self.admission.num_waiting)
                await asyncio.sleep(seconds)
                place.charge(100)
        except RequestError:
            self.refusal_seconds.append(clock() - arrival)
            raise
        self.served.append((clock(), tenant))

    async def client(self, tenant: str = "a", *, max_retries: int = 2, whole_seconds: bool = False) -> None:
        """A request and its retries."""
        for attempt in range(max_retries + 1):
            try:
                return await self.ask(tenant)
            except RequestError as error:
                headers = error.retry_headers()
                wait = float(headers["Retry-After"]) if whole_seconds else float(headers["retry-after-ms"]) / 1000
                if not 0 < wait <= 60:
                    wait = min(0.5 * 2**attempt, 8.0) * (1 - 0.25 * self.chance.random())
            if attempt < max_retries:
                await asyncio.sleep(wait)
        self.failed += 1

    async def arrivals(
        self, rate: float, seconds: float, tenant: str, max_retries: int = 2
    ) -> list[asyncio.Task[None]]:
        """Clients at random moments, ``rate`` a second."""
        tasks, end = [], clock() + seconds
        while clock() < end:
            tasks.append(asyncio.create_task(self.client(tenant, max_retries=max_retries)))
            await asyncio.sleep(self.chance.expovariate(rate))
        return tasks


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    ("places", "mean", "whole_seconds"),
    [(2, 0.5, False), (4, 0.1, False), (4, 2, False), (4, 2, True), (8, 5, False), (32, 1, False), (32, 10, False)],
)
@pytest.mark.parametrize("warm", [False, True])
def test_120_clients_at_once(service: str, places: int, mean: float, warm: bool, whole_seconds: bool) -> None:
    """At least 95 % of them get their answer, though only the places and 16 seats take them at first."""

    async def main(seed: int) -> int:
        crowd = Crowd(Admission(places, 16, 10**9, 60.0, clock=clock), SERVICES[service], mean, seed)
        if warm:
            await asyncio.gather(*await crowd.arrivals(0.5 * places / mean, 50 * mean, "a"))
        crowd.failed = 0
        await asyncio.gather(*(crowd.client(whole_seconds=whole_seconds) for _ in range(120)))
        assert crowd.admission.num_waiting == crowd.admission.num_running == 0
        return crowd.failed

    failed = [run(lambda seed=seed: main(seed)) for seed in range(3)]  # type: ignore[misc]
    assert sum(failed) <= 0.05 * 120 * len(failed), failed


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("max_retries", [0, 2])
def test_ten_times_what_can_be_served(service: str, max_retries: int) -> None:
    """For a minute: 90 % of the peak, refusals at once, never more than the seats."""

    async def main() -> None:
        crowd = Crowd(Admission(8, 16, 10**9, 60.0, clock=clock), SERVICES[service], 1.0, 1)
        tasks = await crowd.arrivals(10 * 8, 60, "a", max_retries)
        served = sum(time <= 60 for time, _ in crowd.served)
        assert served >= 0.9 * 60 * 8
        assert max(crowd.refusal_seconds) == 0 and crowd.most_waiting <= 16
        await asyncio.gather(*tasks)

    run(main)


def test_a_greedy_tenant_takes_nothing_of_another_s_share() -> None:
    """One asks ten times what there is; another asks 40 % of it and gets what it gets without the first."""

    async def main(greedy: bool) -> Counter[str]:
        crowd = Crowd(Admission(8, 16, 10**9, 60.0, clock=clock), SERVICES["exponential"], 0.5, 1)
        modest = asyncio.create_task(crowd.arrivals(0.4 * 8 / 0.5, 60, "modest", 0))
        tasks = await crowd.arrivals(10 * 8 / 0.5, 60, "greedy", 0) if greedy else []
        await asyncio.gather(*tasks, *await modest)
        return Counter(tenant for time, tenant in crowd.served if time <= 60)

    alone, together = run(lambda: main(False)), run(lambda: main(True))
    assert together["modest"] >= 0.9 * 0.4 * 60 * 8 / 0.5
    assert alone["modest"] == pytest.approx(0.4 * 60 * 8 / 0.5, rel=0.2)
    assert together.total() >= 0.9 * 60 * 8 / 0.5


def test_two_greedy_tenants_share_evenly() -> None:
    async def main() -> None:
        crowd = Crowd(Admission(8, 16, 10**9, 60.0, clock=clock), SERVICES["exponential"], 0.5, 1)
        both = [asyncio.create_task(crowd.arrivals(rate, 60, tenant, 0)) for tenant, rate in (("a", 160), ("b", 20))]
        tasks = [task for part in await asyncio.gather(*both) for task in part]
        served = Counter(tenant for time, tenant in crowd.served if time <= 60)
        assert served["b"] >= 0.45 * served.total() and served.total() >= 0.9 * 60 * 8 / 0.5
        await asyncio.gather(*tasks)

    run(main)
