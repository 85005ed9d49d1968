"""Admission: who starts, who waits, who is refused. Time is virtual, so what is expected is arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.serve.admission import Admission
from sprat.serve.errors import RequestError
from sprat.serve.service_rate import ServiceRate
from tests.unit.serve.virtual_time import clock, run


def make(seqs: int = 1, reqs: int = 4, tokens: int = 10**9, wait: float | None = None, **others: Any) -> Admission:
    return Admission(seqs, reqs, tokens, wait, clock=clock, **others)


class Office:
    """Sends requests to an admission and writes down what becomes of them."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.tasks: list[asyncio.Task[None]] = []
        self.started: list[str] = []
        self.refused: list[tuple[str, int, str, float]] = []
        self.seconds_to_refusal: list[float] = []

    async def _work(self, name: str, tenant: str, tokens: int, seqs: int, seconds: float) -> None:
        arrival = clock()
        try:
            async with self.admission.place(tenant, tokens=tokens, seqs=seqs) as place:
                self.started.append(name)
                await asyncio.sleep(seconds)
                place.charge(tokens)
        except RequestError as error:
            assert error.retry_after is not None
            self.refused.append((name, error.status, error.code, error.retry_after))
            self.seconds_to_refusal.append(clock() - arrival)

    async def send(
        self, name: str, tenant: str = "a", *, tokens: int = 10, seqs: int = 1, seconds: float = 1.0
    ) -> asyncio.Task[None]:
        """Send a request and let it come as far as it comes."""
        task = asyncio.create_task(self._work(name, tenant, tokens, seqs, seconds))
        self.tasks.append(task)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    async def finish(self) -> None:
        """Wait for all."""
        await asyncio.gather(*self.tasks, return_exceptions=True)
        admission = self.admission
        assert (admission.num_running, admission.num_running_seqs) == (0, 0)
        assert (admission.num_waiting, admission.num_waiting_tokens) == (0, 0)


def test_places_then_seats_then_a_refusal_at_once() -> None:
    async def main() -> None:
        office = Office(make(seqs=2, reqs=3))
        for n in range(7):
            await office.send(str(n))
        assert clock() == 0 and office.started == ["0", "1"] and office.admission.num_waiting == 3
        assert [(name, status, code) for name, status, code, _ in office.refused] == [
            ("5", 503, "overloaded"),
            ("6", 503, "overloaded"),
        ]
        await office.finish()
        assert office.started == ["0", "1", "2", "3", "4"] and clock() == 3  # ceil(5 / 2) rounds of a second

    run(main)


def test_no_seats_at_all() -> None:
    async def main() -> None:
        office = Office(make(seqs=1, reqs=0))
        await office.send("first")
        await office.send("second")
        await office.finish()
        assert office.started == ["first"] and office.refused[0][:2] == ("second", 503)

    run(main)


def test_a_request_is_counted_before_it_waits() -> None:
    async def main() -> None:
        seen: list[int] = []
        admission = make(reqs=9)
        admission.admit = lambda tenant, generation: seen.append(admission.num_waiting + admission.num_running)
        office = Office(admission)
        for n in range(3):
            await office.send(str(n))
        await office.finish()
        assert seen == [1, 2, 3]

    run(main)


def test_what_admit_answers_refuses_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        broke = RequestError(402, "no money", code="insufficient_balance", retry_after=1)
        admission = make(admit=lambda tenant, generation: broke if tenant == "poor" else None)
        office = Office(admission)
        await office.send("1", "rich")
        await office.send("2", "poor")
        await office.send("3", "rich")
        assert (admission.num_running, admission.num_waiting) == (1, 1)
        await office.finish()
        assert office.started == ["1", "3"] and office.refused == [("2", 402, "insufficient_balance", 1)]

    run(main)


def test_nobody_gives_way_to_a_stranger_whom_admit_refuses() -> None:
    async def main() -> None:
        broke = RequestError(402, "no money", retry_after=1)
        office = Office(make(reqs=2, admit=lambda tenant, generation: broke if tenant == "poor" else None))
        for n in range(3):
            await office.send(str(n), "a")
        await office.send("x", "poor")
        assert [name for name, *_ in office.refused] == ["x"] and office.admission.num_waiting == 2
        await office.finish()

    run(main)


def test_usage_is_told_with_its_tenant() -> None:
    async def main() -> None:
        told: list[Any] = []
        admission = make(on_usage=lambda tenant, usage: told.append((tenant, usage)))
        async with admission.place("a", tokens=1) as place:
            place.record_usage("usage")  # type: ignore[arg-type]
        assert told == [("a", "usage")]

    run(main)


def test_who_waits_too_long_is_refused_then_and_its_seat_is_free() -> None:
    async def main() -> None:
        office = Office(make(reqs=1, wait=30.0))
        await office.send("long", seconds=100)
        await asyncio.sleep(5)
        await office.send("late")
        await asyncio.sleep(29.9)
        assert office.refused == []
        await asyncio.sleep(0.2)
        assert office.refused[0][:3] == ("late", 503, "queue_timeout")
        assert office.seconds_to_refusal == [pytest.approx(30)]
        await office.send("next")
        await asyncio.sleep(29)
        assert office.admission.num_waiting == 1
        await office.finish()

    run(main)


def test_who_started_in_time_meets_no_deadline() -> None:
    async def main() -> None:
        office = Office(make(wait=30.0))
        await office.send("1", seconds=29)
        await office.send("2", seconds=1000)
        await office.finish()
        assert office.started == ["1", "2"] and office.refused == [] and clock() == 1029

    run(main)


def test_a_cancelled_waiter_leaves_at_once() -> None:
    async def main() -> None:
        office = Office(make(reqs=2))
        await office.send("runs")
        waits = await office.send("waits")
        await office.send("next")
        waits.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert office.admission.num_waiting == 1 and clock() == 0
        await office.finish()
        assert office.started == ["runs", "next"]

    run(main)


@pytest.mark.parametrize("cancel_first", [True, False])
def test_cancelled_at_the_moment_of_its_turn(cancel_first: bool) -> None:
    async def main() -> None:
        admission = make()
        holder = await admission.enter("a", tokens=1)
        waits = asyncio.create_task(admission.enter("a", tokens=1))
        after = asyncio.create_task(admission.enter("a", tokens=1))
        await asyncio.sleep(0)
        steps: list[Callable[[], Any]] = [waits.cancel, holder.leave]
        for step in steps if cancel_first else reversed(steps):
            step()
        with suppress(asyncio.CancelledError):
            await waits
        place = await after
        assert waits.cancelled() and admission.num_running_seqs == 1
        place.leave()
        place.leave()
        assert (admission.num_running, admission.num_running_seqs, admission.num_waiting) == (0, 0, 0)

    run(main)


def test_an_error_inside_gives_the_place_back() -> None:
    async def main() -> None:
        admission = make()
        with pytest.raises(ZeroDivisionError):
            async with admission.place("a", tokens=1):
                1 / 0  # noqa: B018
        assert admission.num_running == 0

    run(main)


def test_choices_take_a_place_each_and_are_not_overtaken() -> None:
    async def main() -> None:
        office = Office(make(seqs=4))
        await office.send("three", seqs=3, seconds=2)
        await office.send("two", seqs=2, seconds=1)
        await office.send("one", seqs=1, seconds=1)
        assert office.started == ["three"]  # a place is free, but it is the turn of "two"
        await asyncio.sleep(2.5)
        assert office.started == ["three", "two", "one"] and office.admission.num_running_seqs == 3
        await office.finish()

    run(main)


def test_more_choices_than_places_start_alone() -> None:
    async def main() -> None:
        office = Office(make(seqs=2))
        await office.send("small")
        await office.send("large", seqs=8)
        await office.send("after")
        await asyncio.sleep(1.5)
        assert office.started == ["small", "large"] and office.admission.num_running_seqs == 8
        await office.finish()
        assert office.started[-1] == "after"

    run(main)


def test_tenants_get_the_same_tokens_not_the_same_requests() -> None:
    async def main() -> None:
        office = Office(make(reqs=1000))
        for n in range(200):
            await office.send(f"a{n}", "a", tokens=100)
            await office.send(f"b{n}", "b", tokens=300)
        await asyncio.sleep(100.5)
        done = [name[0] for name in office.started[:100]]
        assert done.count("a") == pytest.approx(75, abs=1)  # 75 × 100 = 25 × 300
        office.admission.close()
        await office.finish()

    run(main)


def test_what_was_computed_counts_and_not_what_was_estimated() -> None:
    async def main() -> None:
        """Both are estimated at 100; "a" really takes 400, "b" 100: four of "b" for one of "a"."""
        admission, order = make(reqs=1000), []

        async def work(tenant: str, computed: int) -> None:
            with suppress(RequestError):
                async with admission.place(tenant, tokens=100) as place:
                    order.append(tenant)
                    for _ in range(4):
                        await asyncio.sleep(0.25)
                        place.charge(computed // 4)

        tasks = [asyncio.create_task(work(*kind)) for _ in range(200) for kind in (("a", 400), ("b", 100))]
        await asyncio.sleep(100.5)
        assert order[:100].count("b") == pytest.approx(80, abs=2)
        admission.close()
        await asyncio.gather(*tasks)

    run(main)


def test_absence_earns_nothing() -> None:
    async def main() -> None:
        office = Office(make(reqs=1000))
        for n in range(100):
            await office.send(f"a{n}", "a")
        await asyncio.sleep(50.5)
        for n in range(40):
            await office.send(f"b{n}", "b")
        await asyncio.sleep(40)
        since = [name[0] for name in office.started[51:]]
        assert len(since) == 40 and since.count("b") == pytest.approx(20, abs=1)
        await office.finish()

    run(main)


def test_who_asks_little_saves_nothing_up_for_a_newcomer() -> None:
    async def main() -> None:
        """Tenant "c" runs all the while and is served little: no reason for "d" to begin where "c" is."""
        office = Office(make(seqs=2, reqs=1000))
        await office.send("c", "c", tokens=1, seconds=10_000)
        for n in range(200):
            await office.send(f"a{n}", "a")
        await asyncio.sleep(50.5)
        for n in range(60):
            await office.send(f"d{n}", "d")
        await asyncio.sleep(40)
        since = [name[0] for name in office.started[52:]]
        assert since.count("d") == pytest.approx(20, abs=1)
        office.admission.close()
        await office.finish()

    run(main)


def test_the_newest_of_the_greedy_gives_way_until_all_have_the_same() -> None:
    async def main() -> None:
        office = Office(make(reqs=4))
        for n in range(5):
            await office.send(f"a{n}", "a", seconds=100)
        await office.send("a5", "a")  # one tenant alone has filled all: everybody's limit
        assert office.refused[-1][:3] == ("a5", 503, "overloaded")
        await office.send("b0", "b")
        assert office.refused[-1][:3] == ("a4", 429, "too_many_requests")
        await office.send("b1", "b")
        assert office.refused[-1][:3] == ("a3", 429, "too_many_requests")
        await office.send("b2", "b")  # two and two: its own limit
        assert office.refused[-1][:3] == ("b2", 429, "too_many_requests")
        await office.send("c0", "c")
        await office.send("d0", "d")
        assert office.admission.num_waiting == 4 and len(office.refused) == 6
        await office.send("e0", "e")  # four tenants, a seat each: nobody has one too many
        assert office.refused[-1][:3] == ("e0", 503, "overloaded")
        office.admission.close()
        await office.finish()

    run(main)


def test_a_tenant_s_own_limits() -> None:
    async def main() -> None:
        office = Office(make(seqs=4, reqs=10, max_num_seqs_per_tenant=2, max_num_queued_reqs_per_tenant=1))
        for n in range(4):
            await office.send(f"a{n}", "a")
        await office.send("b", "b")
        assert office.started == ["a0", "a1", "b"]  # two places stay free of "a"
        assert [refused[:3] for refused in office.refused] == [("a3", 429, "too_many_requests")]
        await office.finish()

    run(main)


def test_who_holds_all_its_places_is_told_so() -> None:
    async def main() -> None:
        office = Office(make(seqs=4, reqs=1, max_num_seqs_per_tenant=2))
        for n in range(4):
            await office.send(f"a{n}", "a")
        assert office.started == ["a0", "a1"] and office.refused[-1][:2] == ("a3", 429)
        await office.send("b0", "b", seqs=2)
        await office.send("b1", "b", seqs=1)
        assert office.refused[-1][:2] == ("b1", 503)  # all four are taken, and the seat is
        await office.finish()

    run(main)


def test_no_seats_for_one_tenant_is_its_own_limit() -> None:
    async def main() -> None:
        office = Office(make(reqs=5, max_num_queued_reqs_per_tenant=0))
        await office.send("a0", "a")
        await office.send("a1", "a")
        assert office.refused[-1][:2] == ("a1", 429)
        await office.finish()

    run(main)


def test_tokens_of_those_who_wait_are_bounded() -> None:
    async def main() -> None:
        office = Office(make(reqs=100, tokens=100))
        await office.send("runs", "z", tokens=10_000, seconds=50)  # holds a place: not among those who wait
        await office.send("a0", "a", tokens=40)
        await office.send("a1", "a", tokens=40)
        await office.send("a2", "a", tokens=40)
        assert office.refused[-1][:2] == ("a2", 503)
        await office.send("b0", "b", tokens=50)
        assert office.refused[-1][:2] == ("a1", 429) and office.admission.num_waiting_tokens == 90
        await office.send("c0", "c", tokens=20)  # "a" and "b" have one each, of no more than half
        assert office.refused[-1][:2] == ("c0", 503)
        await office.finish()
        assert office.started == ["runs", "a0", "b0"]

    run(main)


def test_one_that_is_larger_than_the_bound_may_wait_alone() -> None:
    async def main() -> None:
        office = Office(make(reqs=100, tokens=100))
        await office.send("runs", tokens=1, seconds=50)
        await office.send("huge", "a", tokens=500)
        assert office.refused == []
        await office.send("b", "b", tokens=10)
        assert [refused[:2] for refused in office.refused] == [("huge", 429)]
        await office.finish()

    run(main)


def test_close_refuses_those_who_wait_and_lets_the_others_end() -> None:
    async def main() -> None:
        office = Office(make(seqs=2, reqs=5))
        for n in range(5):
            await office.send(str(n), seconds=10)
        await asyncio.sleep(1)
        office.admission.close()
        await office.send("late")
        assert sorted(refused[:3] for refused in office.refused) == [
            (name, 503, "shutting_down") for name in ("2", "3", "4", "late")
        ]
        await office.admission.drained()
        assert clock() == 10 and office.started == ["0", "1"]
        await office.finish()

    run(main)


def test_close_starts_nobody_who_waited_behind_a_larger_one() -> None:
    async def main() -> None:
        office = Office(make(seqs=2))
        await office.send("runs", seqs=1)
        await office.send("large", seqs=2)
        await office.send("small", seqs=1)
        office.admission.close()
        await office.finish()
        assert office.started == ["runs"] and len(office.refused) == 2

    run(main)


def test_drained_at_once_where_nobody_is() -> None:
    async def main() -> None:
        admission = make()
        await asyncio.wait_for(admission.drained(), 1)
        assert clock() == 0

    run(main)


def test_time_of_a_place_by_little_s_law() -> None:
    now = [0.0]
    rate = ServiceRate(2.0, lambda: now[0])
    assert rate.held_seconds() == 2.0 and rate.mean_age() == 0.0
    starts = [rate.arrive(1), rate.arrive(1)]
    now[0] = 10.0
    assert rate.mean_age() == 10 and rate.held_seconds() == 20  # nobody is through: they may be half through
    rate.depart(1, start=starts[0], tokens=100)
    rate.depart(1, start=starts[1], tokens=300)
    assert rate.held_seconds() == pytest.approx((0.3 * 2 + 20) / 2.3, rel=0.01)
    for _ in range(1000):
        start = rate.arrive(4)
        now[0] += 3.0
        rate.depart(4, start=start, tokens=200)
    assert rate.held_seconds() == pytest.approx(3, rel=1e-3) and rate.margin() == pytest.approx(1 + 1 / 8, rel=0.01)
    assert rate.held_seconds(400) == pytest.approx(6, rel=1e-3)
    assert rate.held_seconds(10**12) == pytest.approx(12, rel=1e-3)
    assert rate.held_seconds(0) == pytest.approx(0.75, rel=1e-3)


@pytest.mark.parametrize(("seqs", "reqs", "soonest"), [(8, 16, 9), (64, 256, 15)])
def test_nothing_measured_yet_is_no_reason_to_send_anybody_far_away(seqs: int, reqs: int, soonest: float) -> None:
    """Half of the seats are free after one or two rounds of answers, which are taken to last for three seconds."""

    async def main() -> None:
        office = Office(make(seqs=seqs, reqs=reqs))
        for n in range(seqs + reqs + 2):
            await office.send(str(n), seconds=20)
        (*_, first), (*_, second) = office.refused
        assert 1 <= first < second < soonest
        await asyncio.sleep(20.5)  # the first answers are through: that is what counts now
        for n in range(seqs + 1):
            await office.send(f"late{n}", seconds=20)
        until_half_empty = 20 * reqs / 2 / seqs
        assert 0.75 * until_half_empty <= office.refused[-1][-1] <= min(60, 1.5 * (until_half_empty + 20))
        await office.finish()

    run(main)


def test_who_came_when_it_was_told_and_in_vain_is_not_told_too_little_again() -> None:
    async def main() -> None:
        """All answers last ten seconds, and nobody has left when the first one comes again: it has one more try."""
        office = Office(make(seqs=32, reqs=16))
        for n in range(32 + 16 + 1):
            await office.send(str(n), seconds=10)
        told = office.refused[0][-1]
        await asyncio.sleep(told + 0.01)
        await office.send("again", seconds=10)
        assert [name for name, *_ in office.refused] == ["48", "again"]
        assert told < 6 and told + office.refused[1][-1] >= 8
        await office.finish()

    run(main)


def test_each_refused_is_told_the_next_moment() -> None:
    async def main() -> None:
        """One place, ten seconds each: half of five seats is 25 seconds away, then one every ten; 1/8 for the error."""
        office = Office(make(reqs=1000))
        for n in range(500):
            await office.send(f"w{n}", seconds=10)
        await office.finish()
        office.admission._queue.max_reqs = 4
        for n in range(5):
            await office.send(f"x{n}", seconds=10)
        await asyncio.sleep(5)
        for n in range(6):
            await office.send(f"y{n}")
        assert [seconds for *_, seconds in office.refused] == pytest.approx(
            [25 * 9 / 8, 35 * 9 / 8, 45 * 9 / 8, 60, 60, 60], rel=0.02
        )
        await office.finish()

    run(main)


ACTION = st.one_of(
    st.tuples(
        st.just("send"),
        st.sampled_from("abcd"),
        st.integers(0, 60),
        st.integers(1, 6),
        st.floats(0, 20),
        st.booleans(),
    ),
    st.tuples(st.just("sleep"), st.floats(0, 10)),
    st.tuples(st.just("cancel"), st.integers(0, 1000)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ACTION, max_size=60),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([None, 3.0]),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_random_schedules(
    actions: list[tuple[Any, ...]], seqs: int, reqs: int, wait: float | None, per_tenant: int | None, close: bool
) -> None:
    """Bounds hold at every event, and everybody is served, refused or cancelled; a lost one would be a deadlock."""

    async def main() -> None:
        admission = make(seqs=seqs, reqs=reqs, tokens=100, wait=wait, max_num_seqs_per_tenant=per_tenant)
        fates: list[str] = []
        inside: list[int] = []

        def check() -> None:
            assert sum(inside) <= seqs or len(inside) == 1
            assert admission.num_running_seqs <= seqs or admission.num_running == 1
            assert admission.num_waiting <= reqs
            assert admission.num_waiting_tokens <= 100 or admission.num_waiting == 1

        async def work(tenant: str, tokens: int, n: int, seconds: float, charges: bool) -> None:
            arrival = clock()
            try:
                async with admission.place(tenant, tokens=tokens, seqs=n) as place:
                    assert wait is None or clock() - arrival <= wait + 1e-6
                    inside.append(n)
                    check()
                    try:
                        await asyncio.sleep(seconds)
                        place.charge(tokens * charges)
                    finally:
                        inside.remove(n)
                fates.append("served")
            except RequestError as error:
                assert error.status in (429, 503) and 0.1 <= (error.retry_after or 0) <= 60
                fates.append("refused")
            except asyncio.CancelledError:
                fates.append("cancelled")
                raise

        tasks: list[asyncio.Task[None]] = []
        for action, *arguments in actions:
            if action == "send":
                tasks.append(asyncio.create_task(work(*arguments)))
                await asyncio.sleep(0)
            elif action == "sleep":
                await asyncio.sleep(arguments[0])
            elif tasks:
                tasks[arguments[0] % len(tasks)].cancel()
            check()
        if close:
            admission.close()
            assert admission.num_waiting == 0
        await admission.drained()
        await asyncio.gather(*tasks, return_exceptions=True)
        never_began = len(tasks) - len(fates)  # cancelled before its first step
        assert never_began == sum(task.cancelled() for task in tasks) - fates.count("cancelled")
        assert not any(task.exception() for task in tasks if not task.cancelled())
        assert (admission.num_running, admission.num_running_seqs, sum(inside)) == (0, 0, 0)
        assert (admission.num_waiting, admission.num_waiting_tokens) == (0, 0)
        account = admission._queue.account("a", clock())
        assert (account.num_waiting, account.waiting_tokens, account.waiting_seqs, account.running_seqs) == (0,) * 4

    run(main)


@given(st.lists(st.sampled_from([f"t{n}" for n in range(2000)]), max_size=300))
@settings(max_examples=20, deadline=None)
def test_tenants_who_left_are_forgotten(names: list[str]) -> None:
    async def main() -> None:
        admission = make()
        for name in [*names, *(f"u{n}" for n in range(500))]:
            async with admission.place(name, tokens=0):
                pass
        assert len(admission._queue._accounts) <= 65

    run(main)
