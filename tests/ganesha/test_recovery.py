from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganesha import RecoveryError, consolidate, drop_all, list_records, make_durable, prune_records
from ganesha.recovery import parse_name, record_parts


def put(top: Path, address: str, client_id: str) -> Path:
    path = top.joinpath(*record_parts(address, client_id))
    path.mkdir(parents=True)
    return path


def seen(root: Path) -> set[tuple[str, str, bool]]:
    return {(record.address, record.client_id, record.old) for record in list_records(root)}


@given(st.ip_addresses(), st.binary(max_size=900).filter(lambda raw: b"/" not in raw and b"\0" not in raw))
def test_a_name_is_cut_and_read_back(address: object, raw: bytes) -> None:
    client_id = raw.decode("utf-8", "surrogateescape")
    parts = record_parts(str(address), client_id)
    whole = "".join(parts).encode("utf-8", "surrogateescape")
    assert all(len(part.encode("utf-8", "surrogateescape")) <= 255 for part in parts)
    assert parse_name(whole) == (str(address), client_id)
    assert parse_name(whole[:-1]) is None


@pytest.mark.parametrize(
    "name", [b"", b"x", b"1.2.3.4-(3:ab)", b"1.2.3.4-(2:abc)", b"1.2.3.4-(x:ab)", b"1.2.3.4(2:ab)"]
)
def test_what_is_no_record_is_none(name: bytes) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize("node", ["", "node0"])
def test_records_are_found_wherever_ganesha_puts_them(tmp_path: Path, node: str) -> None:
    put(tmp_path / "v4recov" / node, "10.0.0.1", "Linux NFSv4.2 a")
    put(tmp_path / "v4recov" / node, "fd00::1", "x" * 700)
    put(tmp_path / "v4old" / node, "10.0.0.1", "Linux NFSv4.2 a")
    put(tmp_path / "v4old" / node, "10.0.0.2", "Linux NFSv4.2 b")
    (tmp_path / "v4recov" / node / "10.0.0.3-(30:cut short by a crash").mkdir()
    assert seen(tmp_path) == {
        ("10.0.0.1", "Linux NFSv4.2 a", False),
        ("fd00::1", "x" * 700, False),
        ("10.0.0.2", "Linux NFSv4.2 b", True),
    }


def test_two_long_ids_with_one_beginning_are_told_apart(tmp_path: Path) -> None:
    for end in "ab":
        put_parts = record_parts("10.0.0.1", "x" * 400 + end)
        (tmp_path / "v4recov").joinpath(*put_parts).mkdir(parents=True)
    removed = prune_records(tmp_path, lambda record: record.client_id.endswith("a"))
    assert [record.client_id[-1] for record in removed] == ["a"]
    assert {record.client_id[-1] for record in list_records(tmp_path)} == {"b"}


def test_pruning_takes_both_copies_and_nothing_else(tmp_path: Path) -> None:
    leaf = put(tmp_path / "v4recov" / "node0", "10.0.0.1", "gone")
    (leaf / "\x01revoked").touch()
    put(tmp_path / "v4old" / "node0", "10.0.0.1", "gone")
    put(tmp_path / "v4recov" / "node0", "10.0.0.2", "stays")
    assert len(prune_records(tmp_path, lambda record: record.address == "10.0.0.1")) == 1
    assert seen(tmp_path) == {("10.0.0.2", "stays", False)}


def test_consolidating_keeps_every_client_once(tmp_path: Path) -> None:
    for top, address in (
        ("v4old", "10.0.0.1"),
        ("v4old", "10.0.0.2"),
        ("v4recov", "10.0.0.2"),
        ("v4recov", "10.0.0.3"),
    ):
        put(tmp_path / top / "node0", address, "x" * 300)
    consolidate(tmp_path)
    assert seen(tmp_path) == {(f"10.0.0.{number}", "x" * 300, False) for number in (1, 2, 3)}
    assert not list((tmp_path / "v4old" / "node0").iterdir())
    consolidate(tmp_path)
    assert len(list_records(tmp_path)) == 3


def test_records_follow_the_form_in_which_the_server_sees_addresses(tmp_path: Path) -> None:
    for address, client_id in (("10.0.0.1", "a"), ("::ffff:10.0.0.2", "b-(1:.)"), ("fd00::1", "c.")):
        put(tmp_path / "v4recov", address, client_id)
    put(tmp_path / "v4old", "::ffff:10.0.0.1", "a")
    consolidate(tmp_path, mapped=True)
    mapped = {("::ffff:10.0.0.1", "a", False), ("::ffff:10.0.0.2", "b-(1:.)", False), ("fd00::1", "c.", False)}
    assert seen(tmp_path) == mapped
    consolidate(tmp_path, mapped=False)
    assert seen(tmp_path) == {(address.removeprefix("::ffff:"), name, old) for address, name, old in mapped}


def test_no_directory_has_no_records(tmp_path: Path) -> None:
    assert list_records(tmp_path / "none") == []
    assert prune_records(tmp_path / "none") == []
    consolidate(tmp_path / "none")
    drop_all(tmp_path / "none")


def test_everything_is_dropped(tmp_path: Path) -> None:
    make_durable(tmp_path / "recovery")
    put(tmp_path / "recovery" / "v4recov", "10.0.0.1", "x")
    make_durable(tmp_path / "recovery")
    drop_all(tmp_path / "recovery")
    assert list_records(tmp_path / "recovery") == []


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "recovery").touch()
    with pytest.raises(RecoveryError, match="recovery"):
        make_durable(tmp_path / "recovery")
    with pytest.raises(RecoveryError, match="recovery"):
        drop_all(tmp_path / "recovery")
