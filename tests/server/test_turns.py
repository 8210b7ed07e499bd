from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fedpace.server import turns
from fedpace.server.turns import Turns

LARGE = 100_000_000


async def hold(queue: Turns, began: list[int], number: int, until: asyncio.Event, *, moving: bool = True) -> None:
    async with queue.take(LARGE, lambda: None) as moved:
        began.append(number)
        while not until.is_set():
            await asyncio.sleep(0.01)
            if moving:
                moved()


def run(scene: Callable[[], object]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scene()  # type: ignore[misc]

    asyncio.run(limited())


def test_large_transfers_begin_in_order_a_few_at_a_time() -> None:
    async def scene() -> None:
        queue, began, done = Turns(2), list[int](), [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.create_task(hold(queue, began, number, done[number])) for number in range(4)]
        await asyncio.sleep(0.5)  # five times as long as a turn may stand still
        assert began == [0, 1]
        done[1].set()
        await tasks[1]
        await asyncio.sleep(0.05)
        assert began == [0, 1, 2]
        for event in done:
            event.set()
        await asyncio.gather(*tasks)
        assert began == [0, 1, 2, 3]

    run(scene)


def test_one_that_stands_still_loses_its_turn_and_gives_it_back_once() -> None:
    async def scene() -> None:
        queue, began, done, never = Turns(1), list[int](), asyncio.Event(), asyncio.Event()
        slow = asyncio.create_task(hold(queue, began, 0, done, moving=False))
        first = asyncio.create_task(hold(queue, began, 1, never))
        second = asyncio.create_task(hold(queue, began, 2, never))
        await asyncio.sleep(0.5)
        assert began == [0, 1]
        done.set()
        await slow
        await asyncio.sleep(0.05)
        assert began == [0, 1]  # its end is nobody's turn
        never.set()
        await asyncio.gather(first, second)

    run(scene)


def test_small_transfers_wait_for_nobody() -> None:
    async def scene() -> None:
        queue = Turns(1)
        async with queue.take(LARGE, lambda: None), queue.take(1 << 20, lambda: None) as moved:
            moved()

    run(scene)


def test_one_that_is_called_off_while_it_waits_takes_no_turn() -> None:
    async def scene() -> None:
        queue, began, never = Turns(1), list[int](), asyncio.Event()
        first = asyncio.create_task(hold(queue, began, 0, never))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(hold(queue, began, 1, never))
        await asyncio.sleep(0.02)
        waiting.cancel()
        never.set()
        await asyncio.gather(first, waiting, return_exceptions=True)
        async with queue.take(LARGE, lambda: None):
            assert began == [0]

    run(scene)


def test_whoever_waits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_SAY_SECONDS", 0.02)

    async def scene() -> None:
        queue, began, done, said = Turns(1), list[int](), asyncio.Event(), list[int]()
        first = asyncio.create_task(hold(queue, began, 0, done))
        await asyncio.sleep(0.02)
        asyncio.get_running_loop().call_later(0.2, done.set)
        async with queue.take(LARGE, lambda: said.append(1)):
            heard = len(said)
            assert heard >= 2
            await asyncio.sleep(0.1)
            assert len(said) == heard
        await first

    run(scene)
