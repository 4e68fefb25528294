"""Mount options: which are taken, what a node gets, and when a mount has others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_manager.csi.errors import InvalidArgumentError
from share_manager.csi.options import DEFAULTS, asked, differs, parse
from share_manager.csi.options import resolve as resolve_asked

OLD, NEW = "6.1.0-13-amd64", "6.19.2"


def resolve(text: str, flags: tuple[str, ...], *, kernel: str, read_only: bool) -> str:
    return resolve_asked(asked(text, flags), kernel=kernel, read_only=read_only)


def test_without_options_a_mount_waits_for_a_failover() -> None:
    assert resolve("", (), kernel=OLD, read_only=False) == "vers=4.2,hard,noresvport,retrans=2,sec=sys,timeo=600"


def test_what_is_said_later_goes_before() -> None:
    found = resolve("vers=4.1,timeo=300", ("timeo=100", "noatime"), kernel=OLD, read_only=True).split(",")
    assert {"vers=4.1", "timeo=100", "noatime", "ro"} <= set(found)
    assert "vers=4.2" not in found
    assert "timeo=300" not in found


def test_a_kernel_with_directory_delegations_gets_the_version_without_them() -> None:
    assert resolve("", (), kernel=NEW, read_only=False).startswith("vers=4.0,")
    assert resolve("vers=4.2", (), kernel=NEW, read_only=False).startswith("vers=4.2,")
    assert resolve("", (), kernel="7.0.0-rc1", read_only=False).startswith("vers=4.0,")
    assert resolve("", (), kernel="", read_only=False).startswith("vers=4.2,")


@pytest.mark.parametrize(
    "text",
    [
        *("vers=3", "nfsvers=2", "vers=4.3", "vers=", "hard=1", "timeo", "timeo=0", "timeo=abc", "timeo=-1"),
        *("port=2050", "addr=192.0.2.1", "clientaddr=192.0.2.1", "bg", "fg", "nolock", "proto=udp", "sec=krb5"),
        *("nconnect=17", "remount", "bind", "rbind", "move", "loop", "user", "x-systemd.automount", "context=a"),
        *("hard,soft", "rw,ro", "vers=4.1,vers=4.2", "rsize=12", "a b", "vers=4.2\nhard", "vers=4.2 ,port =1"),
        *("mountport=1", "minorversion=1", "retry=5", "fsc", "noauto", "xprtsec=tls", "hard\x00"),
    ],
)
def test_options_that_lead_elsewhere_or_would_be_ignored_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse(text, "nfsOptions")


def test_the_value_of_what_is_no_option_of_ours_is_not_repeated() -> None:
    with pytest.raises(InvalidArgumentError, match="'password'") as caught:
        parse("password=hunter2", "mount_flags")
    assert "hunter2" not in str(caught.value)


def test_a_long_list_is_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        parse(",".join(["hard"] * 1000), "nfsOptions")


@given(st.text(max_size=200))
def test_nothing_else_than_an_answer_or_a_refusal_comes_of_any_text(text: str) -> None:
    try:
        found = parse(text, "nfsOptions")
    except InvalidArgumentError:
        return
    assert parse(",".join(found.values()), "again") == found


def test_what_was_resolved_can_be_resolved_again() -> None:
    once = resolve("soft,rsize=65536,nconnect=4", (), kernel=OLD, read_only=True)
    assert resolve(once, (), kernel=NEW, read_only=True) == once
    assert len(parse(",".join(DEFAULTS), "defaults")) == len(DEFAULTS)


SHOWN = {
    "rw": "",
    "relatime": "",
    "vers": "4.2",
    "rsize": "65536",
    "wsize": "65536",
    "namlen": "255",
    "hard": "",
    "proto": "tcp",
    "timeo": "600",
    "retrans": "2",
    "sec": "sys",
    "local_lock": "none",
    "addr": "192.0.2.1",
}


@pytest.mark.parametrize(
    ("wanted", "differing"),
    [
        ("vers=4.2,hard,timeo=600,retrans=2,noresvport", ""),
        ("vers=4", ""),
        ("rsize=1048576", ""),
        ("rsize=32768", "rsize=32768"),
        ("vers=4.1", "vers=4.1"),
        ("soft", "soft"),
        ("softerr,vers=4.2", "softerr"),
        ("timeo=100", "timeo=100"),
        ("retrans=3", "retrans=3"),
        ("ro", "ro"),
        ("rw", ""),
    ],
)
def test_a_mount_with_other_options_is_noticed(wanted: str, differing: str) -> None:
    assert differs(wanted, SHOWN) == differing
