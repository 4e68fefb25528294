"""How a mapping goes, with a device-mapper that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio.testing

from share_manager.errors import CommandError, TimeoutProblem
from share_manager.paths import VolumePaths
from share_manager.share import cryptsetup
from share_manager.share.mapping import close_mapping, mapping_name, mappings_of

NAME = "sm-v-01234567-1"


class Kernel:
    """One mapping. `busy` attempts to remove it fail; `hangs` until the requests below are failed."""

    def __init__(self, *, busy: float = 0, hangs: bool = False) -> None:
        self.exists = True
        self.busy = busy
        self.hangs = hangs
        self.cut_off = False
        self.given_up: list[str] = []

    def give_up(self, reason: str) -> None:
        self.given_up.append(reason)
        self.hangs = False

    async def remove(self, name: str, timeout: float = 10.0) -> None:
        assert name == NAME
        if self.hangs:
            raise TimeoutProblem("dmsetup", timeout)
        self.busy -= 1
        if self.busy >= 0:
            raise CommandError(["dmsetup", "remove", name], 1, "Device or resource busy")
        self.exists = False

    async def cut(self, name: str) -> None:
        assert not self.hangs
        self.cut_off = True
        self.exists = self.busy > 0


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> type[Kernel]:
    def install(kernel: Kernel) -> None:
        monkeypatch.setattr(cryptsetup, "mapping_exists", lambda name: kernel.exists)
        monkeypatch.setattr(cryptsetup, "remove_mapping", kernel.remove)
        monkeypatch.setattr(cryptsetup, "cut_off_mapping", kernel.cut)

    class Installed(Kernel):
        def __init__(self, *, busy: float = 0, hangs: bool = False) -> None:
            super().__init__(busy=busy, hangs=hangs)
            install(self)

    return Installed


async def test_it_goes(pretend: type[Kernel]) -> None:
    kernel = pretend()
    assert await close_mapping(NAME, kernel.give_up) is None
    assert (kernel.exists, kernel.cut_off, kernel.given_up) == (False, False, [])
    # a second time there is nothing to do
    assert await close_mapping(NAME, kernel.give_up) is None


async def test_a_last_user_is_waited_for(pretend: type[Kernel], autojump_clock: trio.testing.MockClock) -> None:
    kernel = pretend(busy=5)
    assert await close_mapping(NAME, kernel.give_up) is None
    assert (kernel.exists, kernel.cut_off) == (False, False)


async def test_one_that_stays_in_use_is_cut_off(pretend: type[Kernel], autojump_clock: trio.testing.MockClock) -> None:
    kernel = pretend(busy=float("inf"))
    said = await close_mapping(NAME, kernel.give_up)
    assert said is not None
    assert "busy" in said
    assert (kernel.cut_off, kernel.given_up) == (True, [])


async def test_what_hangs_is_failed_first(pretend: type[Kernel]) -> None:
    kernel = pretend(hangs=True)
    assert await close_mapping(NAME, kernel.give_up) is None
    assert len(kernel.given_up) == 1
    assert not kernel.exists


def test_only_its_own_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = VolumePaths(tmp_path, "v")
    token = paths.run.name
    other = VolumePaths(tmp_path, f"{token}-w")
    own = [mapping_name(paths, 3), mapping_name(paths, 12)]
    names = [*own, mapping_name(other, 3), f"sm-{token}", f"sm-{token}-x", f"luks-{token}-1", "vg-root"]
    gone = mapping_name(paths, 4)
    monkeypatch.setattr(cryptsetup, "mappings", lambda: dict.fromkeys(names, "dm-0") | {gone: "dm-1"})
    monkeypatch.setattr(cryptsetup, "is_cut_off", lambda kernel_name: kernel_name == "dm-1")
    assert mappings_of(paths) == sorted(own)
