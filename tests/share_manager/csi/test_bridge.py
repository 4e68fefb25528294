"""Calls over the socket, whatever the handlers and the callers do: each has one answer, and the driver goes on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
import trio

from share_manager.csi import bridge
from share_manager.csi import log as csi_log
from share_manager.csi.bridge import EndpointBusyError, parse_endpoint, serving
from share_manager.csi.errors import AlreadyExistsError
from share_manager.csi.identity import DRIVER, Identity
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.errors import DiskError, InvalidValueError
from tests.share_manager.csi.caller import Caller, Refused, refused


async def ready() -> bool:
    return True


class Scripted(Identity):
    """What `Probe` does is said by the test."""

    def __init__(self, probe: Callable[[], Any]) -> None:
        super().__init__("1", controller=True, ready=ready)
        self._probe = probe

    async def Probe(self, request: pb.ProbeRequest) -> pb.ProbeResponse:  # noqa: N802
        await self._probe()
        return pb.ProbeResponse()


@contextlib.asynccontextmanager
async def driver(tmp_path: Path, probe: Callable[[], Any] = ready) -> AsyncIterator[Caller]:
    path = tmp_path / "csi.sock"
    async with serving(path, {"Identity": Scripted(probe)}):
        with Caller(path) as caller:
            yield caller


async def probe(caller: Caller, timeout: float | None = 10.0) -> Any:
    return await trio.to_thread.run_sync(caller.call, "Probe", pb.ProbeRequest(), timeout)


async def refusal(caller: Caller, timeout: float | None = 10.0) -> Refused:
    return await trio.to_thread.run_sync(caller.refusal, "Probe", pb.ProbeRequest(), timeout)


async def test_the_driver_tells_its_name(tmp_path: Path) -> None:
    async with driver(tmp_path) as caller:
        answer = await trio.to_thread.run_sync(caller.call, "GetPluginInfo", pb.GetPluginInfoRequest())
        assert (answer.name, answer.vendor_version) == (DRIVER, "1")
        answer = await trio.to_thread.run_sync(caller.call, "GetPluginCapabilities", pb.GetPluginCapabilitiesRequest())
        assert [one.service.type for one in answer.capabilities] == [pb.PluginCapability.Service.CONTROLLER_SERVICE]


async def test_the_socket_is_for_root_only_and_goes_with_the_driver(tmp_path: Path) -> None:
    async with driver(tmp_path):
        assert (tmp_path / "csi.sock").stat().st_mode & 0o777 == 0o600
        with pytest.raises(EndpointBusyError):
            async with serving(tmp_path / "csi.sock", {}):
                pass
    assert not (tmp_path / "csi.sock").exists()


async def test_the_socket_of_a_killed_driver_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "csi.sock"))
    async with driver(tmp_path) as caller:
        await probe(caller)


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "csi.sock").write_text("precious")
    with pytest.raises(InvalidValueError):
        async with serving(tmp_path / "csi.sock", {}):
            pass
    assert (tmp_path / "csi.sock").read_text() == "precious"
    with pytest.raises(InvalidValueError, match="no directory"):
        async with serving(tmp_path / "nowhere" / "csi.sock", {}):
            pass


@pytest.mark.parametrize("text", ["unix:///csi/csi.sock", "unix:/csi/csi.sock", "/csi/csi.sock"])
def test_endpoints(text: str) -> None:
    assert parse_endpoint(text) == Path("/csi/csi.sock")


@pytest.mark.parametrize("text", ["", "tcp://127.0.0.1:1", "csi.sock", "unix://csi.sock", "/csi/", f"/{'a' * 107}"])
def test_endpoints_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidValueError):
        parse_endpoint(text)


async def test_an_error_has_its_code_and_its_words(tmp_path: Path) -> None:
    async def fail() -> None:
        raise AlreadyExistsError("it is there, ü")

    async with driver(tmp_path, fail) as caller:
        answer = await refusal(caller)
        assert (answer.code, answer.message) == ("ALREADY_EXISTS", "it is there, ü")


async def test_an_error_of_the_product_is_internal(tmp_path: Path) -> None:
    async def fail() -> None:
        raise DiskError(Path("/x"), OSError(28, "No space left on device"))

    async with driver(tmp_path, fail) as caller:
        answer = await refusal(caller)
        assert answer.code == "INTERNAL"
        assert "No space left" in answer.message


async def test_a_defect_ends_its_call_only_and_its_secrets_stay_inside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "swordfish-77"

    async def fail() -> None:
        raise RuntimeError(secret)

    csi_log.configure()
    try:
        async with driver(tmp_path, fail) as caller:
            answer = await refusal(caller)
            assert answer.code == "INTERNAL"
            assert secret not in answer.message
            info = await trio.to_thread.run_sync(caller.call, "GetPluginInfo", pb.GetPluginInfoRequest())
            assert info.name == DRIVER
    finally:
        structlog.reset_defaults()
    assert any(json.loads(line)["event"] == "defect" for line in capsys.readouterr().err.splitlines())


async def test_calls_of_other_services_and_unknown_ones_are_unimplemented(tmp_path: Path) -> None:
    async with driver(tmp_path) as caller:
        for path in ("/csi.v1.Identity/Nothing", "/csi.v1.Node/NodeGetInfo", "/csi.v0.Identity/Probe", "/x"):
            with pytest.raises(Refused) as caught:
                await trio.to_thread.run_sync(caller.send, path, b"")
            assert caught.value.code == "UNIMPLEMENTED"


async def test_bytes_that_are_no_message_are_refused(tmp_path: Path) -> None:
    async with driver(tmp_path) as caller:
        with pytest.raises(Refused):
            await trio.to_thread.run_sync(caller.send, "/csi.v1.Identity/Probe", b"\xff\xff\xff")
        with pytest.raises(Refused) as caught:
            await trio.to_thread.run_sync(caller.send, "/csi.v1.Identity/Probe", bytes(bridge.MAX_MESSAGE + 1))
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        await probe(caller)


async def test_a_deadline_cancels_the_work_and_leaves_time_to_say_so(tmp_path: Path) -> None:
    ended: list[float] = []

    async def hang() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(time.monotonic())

    async with driver(tmp_path, hang) as caller:
        began = time.monotonic()
        answer = await refusal(caller, 1.0)
        assert answer.code == "DEADLINE_EXCEEDED"
        assert "can be repeated" in answer.message, "the caller's own deadline came first"
        assert 0.8 < ended[0] - began < 1.0


async def test_a_caller_that_goes_away_cancels_the_work(tmp_path: Path) -> None:
    begun, cancelled = trio.Event(), trio.Event()

    async def hang() -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with driver(tmp_path, hang) as caller:
        future = caller.future("Probe", pb.ProbeRequest(), None)
        with trio.fail_after(10):
            await begun.wait()
            future.cancel()
            await cancelled.wait()


async def test_a_call_without_deadline_has_one_of_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "LONGEST", 0.3)
    async with driver(tmp_path, trio.sleep_forever) as caller:
        assert (await refusal(caller, None)).code == "DEADLINE_EXCEEDED"


async def test_calls_go_side_by_side(tmp_path: Path) -> None:
    inside = 0
    all_in = trio.Event()

    async def meet() -> None:
        nonlocal inside
        inside += 1
        if inside == 20:
            all_in.set()
        await all_in.wait()

    async with driver(tmp_path, meet) as caller, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(probe, caller)


async def test_a_flood_is_refused_and_others_are_served_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "MAX_CALLS", 4)
    go = trio.Event()
    inside = 0

    async def hold() -> None:
        nonlocal inside
        inside += 1
        await go.wait()

    async with driver(tmp_path, hold) as caller:
        calls = [caller.future("Probe", pb.ProbeRequest(), 20.0) for _ in range(12)]
        with trio.fail_after(10):
            while inside < 4 or sum(call.done() for call in calls) < 8:
                await trio.sleep(0.01)
        go.set()
        codes = []
        for call in calls:
            try:
                await trio.to_thread.run_sync(call.result, 10)
                codes.append("OK")
            except grpc.RpcError as error:
                codes.append(refused(error).code)
        assert sorted(codes) == ["OK"] * 4 + ["RESOURCE_EXHAUSTED"] * 8
        await probe(caller)


async def test_a_driver_that_is_stopped_answers_what_is_under_way(tmp_path: Path) -> None:
    begun = trio.Event()

    async def hang() -> None:
        begun.set()
        await trio.sleep_forever()

    path = tmp_path / "csi.sock"
    with contextlib.ExitStack() as stack:
        async with serving(path, {"Identity": Scripted(hang)}):
            caller = stack.enter_context(Caller(path))
            future = caller.future("Probe", pb.ProbeRequest(), 60.0)
            with trio.fail_after(10):
                await begun.wait()
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 5
        with pytest.raises(grpc.RpcError) as caught:
            future.result(1)
        assert refused(caught.value).code == "UNAVAILABLE"
        assert "being stopped" in refused(caught.value).message
    assert os.listdir(tmp_path) == []
