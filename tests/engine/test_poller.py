"""Descriptors handled past trio's loop, which still gets its turns."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import trio
import trio.lowlevel
import trio.testing

from engine.poller import Poller
from engine.readiness import BUDGET, LINGER


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield reading, writing
    os.close(reading)
    os.close(writing)


async def test_what_arrives_within_the_linger_time_costs_no_turn_of_trio(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    poller, seen, rounds = Poller(), [], 0
    turns = 0

    def readable() -> None:
        seen.append(os.read(reading, 1))
        if len(seen) < 20:
            os.write(writing, b"x")

    def after() -> None:
        nonlocal rounds
        rounds += 1

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    poller.add(reading, readable, linger=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run, after)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(count_turns)
        os.write(writing, b"x")
        with trio.fail_after(5):
            while len(seen) < 20:
                before = turns
                await trio.lowlevel.checkpoint()
        # all twenty came between two turns of this task
        assert turns - before <= 2
        nursery.cancel_scope.cancel()
    assert rounds == 20


async def test_endless_traffic_leaves_turns_to_the_other_tasks(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    poller = Poller()

    def readable() -> None:
        os.write(writing, os.read(reading, 1))

    poller.add(reading, readable, linger=True)
    os.write(writing, b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run, lambda: None)
        started = time.monotonic()
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        # generous: the machine may be busy
        assert time.monotonic() - started < 5 * (BUDGET + LINGER) + 2
        nursery.cancel_scope.cancel()


async def test_a_handler_that_woke_a_task_makes_way_for_it_at_once(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    poller, woken, handled = Poller(), trio.Event(), 0

    def readable() -> None:
        nonlocal handled
        os.write(writing, os.read(reading, 1))
        handled += 1
        if handled == 3:
            woken.set()
            poller.give_way()

    poller.add(reading, readable, linger=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run, lambda: None)
        os.write(writing, b"x")
        with trio.fail_after(5):
            await woken.wait()
        assert handled == 3
        nursery.cancel_scope.cancel()


async def test_a_removed_descriptor_is_not_handled_even_in_the_same_round(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    other, other_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    poller, calls = Poller(), []

    def first() -> None:
        calls.append(1)
        poller.remove(reading)
        poller.remove(other)

    poller.add(reading, first)
    poller.add(other, first)
    os.write(writing, b"x")
    os.write(other_end, b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run, lambda: None)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert calls == [1]
    poller.remove(reading)
    os.close(other)
    os.close(other_end)
