from __future__ import annotations

from pathlib import Path

from tests.powerloss import workload


def test_the_model_knows_what_was_done_and_notices_what_is_not_so(tmp_path: Path) -> None:
    count = 120
    states = workload.states(9, count)
    for done, operation in zip(range(count), workload.operations(9), strict=False):
        workload.perform(tmp_path, operation)
        assert workload.complaints(tmp_path, states[done + 1], states[done + 1]) == []
        # as if the acknowledgement of this operation had not been seen
        assert workload.complaints(tmp_path, states[done], states[done + 1]) == []
    assert {operation.kind for _, operation in zip(range(count), workload.operations(9), strict=False)} == {
        "write",
        "replace",
        "unlink",
    }
    last = states[count]
    name = next(name for name in last if name.startswith("file-"))
    (tmp_path / name).write_bytes(last[name][:-1] + b"?")
    log = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(log[:-1])
    (tmp_path / "stranger").touch()
    (tmp_path / "current").unlink()
    assert len(workload.complaints(tmp_path, last, last)) == 4


def test_a_write_under_way_may_be_there_in_part() -> None:
    old = {"slots": b"a" * 2048, "log": b"xy"}
    new = {"slots": b"b" * 2048, "log": b"xyzzy"}
    mixed = b"a" * 512 + b"b" * 1024 + b"a" * 512
    assert workload._between(mixed, old["slots"], new["slots"])
    assert not workload._between(b"a" * 500 + mixed[500:510] + b"?" + mixed[511:], old["slots"], new["slots"])
    assert workload._between(b"xy\0\0\0", old["log"], new["log"])
    assert workload._between(b"xyz", old["log"], new["log"])
    assert not workload._between(b"x", old["log"], new["log"])
    assert not workload._between(b"xyzzyz", old["log"], new["log"])
