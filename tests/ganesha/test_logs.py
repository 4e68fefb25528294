import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganesha.logs import EventKind, LogTail, failure_reason, parse_line, previous

HEAD = "20/11/2026 13:35:30 : epoch 0000004d : vm : ganesha.nfsd-6522[main] "


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("nfs_start :NFS STARTUP :EVENT :             NFS SERVER INITIALIZED", EventKind.INITIALIZED),
        ("nfs_start_grace :STATE :EVENT :NFS Server Now IN GRACE, duration 30", EventKind.GRACE_STARTED),
        ("nfs_lift_grace_locked :STATE :EVENT :NFS Server Now NOT IN GRACE", EventKind.GRACE_ENDED),
        ("f :STATE :EVENT :check grace:reclaim complete(1) clid count(4)", EventKind.RECLAIM_PROGRESS),
        ("f :DISP :FATAL :Error binding to V6 interface. Cannot continue.", EventKind.BIND_FAILED),
        ("f :DISP :WARN :Cannot bind NFS tcp6 socket, error 98 (Address already in use)", EventKind.BIND_FAILED),
        ("do_shutdown :MAIN :EVENT :NFS EXIT: stopping NFS service", EventKind.STOPPING),
        ("f :CONFIG :CRIT :Config File (/x:46): Syntax error in statement", EventKind.CONFIG_FAILED),
        ("f :EXPORT :CRIT :Lookup failed on path, ExportId=1 Path=/x", EventKind.EXPORT_FAILED),
        ("f :CLIENT ID :EVENT :Failed to create client in recovery dir (/x), errno: x (28)", EventKind.RECORD_FAILED),
        ("f :MAIN :FATAL :out of memory", EventKind.FATAL),
        ("f :MAIN :EVENT :hello", EventKind.OTHER),
    ],
)
def test_lines_are_told_apart(line: str, kind: EventKind) -> None:
    event = parse_line(HEAD + line)
    assert event.kind is kind
    assert event.function
    assert event.level
    assert event.component


def test_a_line_is_taken_apart() -> None:
    event = parse_line(HEAD + "nfs_start_grace :NFS STARTUP :EVENT :NFS Server Now IN GRACE, duration 30")
    assert (event.function, event.component, event.level) == ("nfs_start_grace", "NFS STARTUP", "EVENT")
    assert event.grace_seconds == 30
    assert event.time > 1e9
    assert parse_line(HEAD + "f :S :EVENT :check grace:reclaim complete(1) clid count(4)").reclaimed == (1, 4)


@given(st.text())
def test_any_line_is_an_event(line: str) -> None:
    assert parse_line(line).message is not None
    parse_line(HEAD + line)


def test_the_most_telling_line_is_the_reason() -> None:
    lines = [
        "f :NFS CB :CRIT :ERROR: gssd_refresh_krb5_machine_credential: no usable keytab entry",
        "f :DISP :WARN :Cannot bind NFS tcp6 socket, error 98 (Address already in use)",
        "f :DISP :FATAL :Error binding to V6 interface. Cannot continue.",
        "f :MAIN :FATAL :Fatal errors.  Server exiting...",
    ]
    events = [parse_line(HEAD + line) for line in lines]
    assert "Address already in use" in str(failure_reason(events))
    assert failure_reason(events[:1]) is None
    assert failure_reason([]) is None
    lines = [
        "f :NFS STARTUP :CRIT :Error while parsing core configuration",
        "f :CONFIG :CRIT :Config File (/x:4): No IP address found for 127.0.0.1 because:Name or service not known",
        "f :CONFIG :CRIT :Config File (/x:1): 1 errors while processing parameters for NFS_Core_Param",
    ]
    assert "bring up an interface" in str(failure_reason([parse_line(HEAD + line) for line in lines]))


def test_only_whole_lines_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    assert tail.read() == []
    with log.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert [event.message for event in tail.read()] == ["one"]
        file.write(b"o\n\xff\n")
        assert [event.message for event in tail.read()] == ["two", "\ufffd"]
    tail.close()


def test_a_long_log_is_replaced_and_no_line_is_lost(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log, max_bytes=1000)
    found = []
    for number in range(500):
        old = log.open("ab") if number == 250 else None
        with log.open("ab") as file:
            file.write(b"%d\n" % number * 1)
        found += tail.read()
        if old is not None:  # a writer that opened the log before it was replaced
            old.write(b"late\n")
            old.close()
    while events := tail.read():
        found += events
    numbers = [int(event.message) for event in found if event.message != "late"]
    assert numbers == list(range(500))
    assert "late" in [event.message for event in found]
    assert log.stat().st_size <= 1100
    assert previous(log).exists()
    tail.close()


def test_a_filesystem_is_read_from_its_line() -> None:
    line = (
        "posix_create_file_system :FSAL :INFO :Added filesystem 0x55881afc5540 /mnt/a b namelen=255 dev=7.0 "
        "fsid=0x5342e4930db47a73.0xa94c77938f1ee5a3 5999608973852179059.12199256966284895651 type=ext4"
    )
    assert parse_line(HEAD + line).filesystem == ("/mnt/a b", uuid.UUID("737ab40d-93e4-4253-a3e5-1e8f93774ca9"))
    assert parse_line(HEAD + "f :FSAL :INFO :something else").filesystem is None
