"""Whose records are removed before a server starts, and whose never."""

from __future__ import annotations

from pathlib import Path

import pytest

from ganesha import ClientRecord
from share_manager.share.gone import GoneClients, encode, is_one_of, names_for


def record(client_id: str) -> ClientRecord:
    return ClientRecord(address="127.0.0.2", client_id=client_id, path=Path("/x"))


def hexadecimal(client_id: str) -> str:
    return "0x" + client_id.encode().hex()


@pytest.mark.parametrize(
    "client_id",
    [
        "Linux NFSv4.2 worker-3",
        "Linux NFSv4.1 worker-3",
        hexadecimal("Linux NFSv4.2 5f3a-uniquifier/worker-3"),
        hexadecimal("Linux NFSv4.0 worker-3/10.0.0.1"),
    ],
)
def test_a_host_is_found_however_its_kernel_calls_itself(client_id: str) -> None:
    assert is_one_of(record(client_id), frozenset({"worker-3"}))
    assert not is_one_of(record(client_id), frozenset({"worker", "worker-33", "Linux", "NFSv4.2", ""}))


def test_a_client_of_another_kind_is_named_in_full() -> None:
    libnfs = record("Libnfs worker-3")
    assert not is_one_of(libnfs, frozenset({"worker-3"}))
    assert is_one_of(libnfs, frozenset({"Libnfs worker-3"}))
    assert not is_one_of(record("0xnot hexadecimal"), frozenset({"worker-3"}))


def test_it_counts_until_the_volume_is_served_again() -> None:
    text = encode(GoneClients(epoch=7, names=("worker-3",)))
    assert names_for(text, 7) == {"worker-3"}
    # whoever served since may have had it back
    assert [names_for(text, epoch) for epoch in (6, 8, 9)] == [frozenset()] * 3


@pytest.mark.parametrize("text", [None, "", "{}", '{"epoch": "7", "names": 1}', "\x00"])
def test_nonsense_names_nobody(text: str | None) -> None:
    assert names_for(text, 7) == frozenset()
