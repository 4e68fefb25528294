import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganesha import ConfigError, Export, ServerConfig, render
from ganesha.config import client_list, filesystem_id
from ganesha.render import quote

BASE = ServerConfig(
    identity="vol",
    recovery_root=Path("/vol/.share-manager"),
    exports=(Export(export_id=1, path=Path("/vol/data"), pseudo="/vol"),),
)
RUN_DIR = Path("/run/share")

Block = list[tuple[str, "list[str] | Block"]]


def value_end(text: str, start: int) -> int:
    """Where a quoted value ends, by the rules of ganesha's lexer: flex takes the longest match."""
    mark = text[start]
    ends = [index for index in range(start + 1, len(text)) if text[index] == mark]
    if mark == "'":
        return ends[0]
    for index in ends:
        if text[index - 1] != "\\" or index - 1 == start:
            return index
    return ends[-1]


def parse(text: str) -> Block:
    """ganesha's configuration language, as far as it matters for who ends what."""
    at = 0

    def skip() -> None:
        nonlocal at
        while match := re.compile(r"\s+|#[^\n]*").match(text, at):
            at = match.end()

    def block() -> Block:
        nonlocal at
        items: Block = []
        while True:
            skip()
            if at == len(text) or text[at] == "}":
                at += 1
                return items
            name = re.compile(r"[A-Za-z_][\w-]*").match(text, at)
            assert name, text[at : at + 20]
            at = name.end()
            skip()
            at += 1
            items.append((name[0], block() if text[at - 1] == "{" else values()))

    def values() -> list[str]:
        nonlocal at
        found = []
        while True:
            skip()
            if text[at] in "'\"":
                end = value_end(text, at)
                found.append(text[at + 1 : end])
                at = end + 1
            else:
                word = re.compile(r"[^\s,;{}='\"#]+").match(text, at)
                assert word, text[at : at + 20]
                found.append(word[0])
                at = word.end()
            skip()
            assert text[at] in ",;", text[at : at + 20]
            at += 1
            if text[at - 1] == ";":
                return found

    return block()


def shape(block: object) -> list[object]:
    """The names of everything, without the values."""
    return [(item[0], shape(item[1])) for item in block if isinstance(item, tuple)] if isinstance(block, list) else []


def find(block: Block, *path: str) -> object:
    here: object = block
    for name in path:
        assert isinstance(here, list)
        here = dict(here)[name]
    return here


nasty = st.text(st.sampled_from("ab'\"\\\n#;{}=,$@%*/ é\udcff"), min_size=1, max_size=12) | st.text(min_size=1)


@given(identity=nasty, name=nasty, directory=nasty)
def test_no_value_breaks_out_of_its_string(identity: str, name: str, directory: str) -> None:
    export = msgspec.structs.replace(BASE.exports[0], pseudo="/" + name, path=Path("/" + directory))
    config = msgspec.structs.replace(
        BASE, identity=identity, exports=(export,), recovery_root=Path("/recovery/" + directory)
    )
    try:
        text = render(config, RUN_DIR)
    except ConfigError:
        return
    parsed = parse(text)
    assert shape(parsed) == shape(parse(render(BASE, RUN_DIR)))
    assert find(parsed, "NFSv4", "Server_Owner") == [identity]
    assert find(parsed, "NFSv4", "Server_Scope") == [identity]
    assert find(parsed, "NFSv4", "RecoveryRoot") == [str(config.recovery_root)]
    assert find(parsed, "EXPORT", "Path") == [str(export.path)]
    assert find(parsed, "EXPORT", "Pseudo") == [export.pseudo]


@given(nasty)
def test_quote_gives_the_value_back_or_refuses(value: str) -> None:
    try:
        quoted = quote(value)
    except ConfigError:
        assert "\0" in value or ("'" in value and ('"' in value or "\\" in value))
        return
    # Whatever follows in the file, quotes included, the value ends where it should.
    text = quoted + "; x = \"y\\\"; z = 'w';"
    assert value_end(text, 0) == len(quoted) - 1
    assert quoted[1:-1] == value


@pytest.mark.parametrize(
    ("allow", "forms"),
    [
        (["10.0.0.0/8"], ["10.0.0.0/8"]),
        (["10.1.2.3/8"], ["10.0.0.0/8"]),
        (["10.1.2.3"], ["10.1.2.3"]),
        (["0.0.0.0/0"], ["0.0.0.0/1", "128.0.0.0/1"]),
        (["::/0"], ["::/1", "8000::/1"]),
        (["fd00::/64", "fd00::1"], ["fd00::/64", "fd00::1"]),
        (["fd00::/127"], ["fd00::", "fd00::1"]),
        (["::ffff:10.0.0.0/104"], ["10.0.0.0/8"]),
        (["10.0.0.1", "10.0.0.1/32"], ["10.0.0.1"]),
    ],
)
def test_networks_are_said_as_the_lexer_takes_them(allow: list[str], forms: list[str]) -> None:
    assert client_list(allow) == forms


@pytest.mark.parametrize(
    "network", ["", "*", "10.0.0.0/33", "host", "10.0.0.1;", "fd00::/112", "fe80::1%eth0", "@group"]
)
def test_other_networks_are_refused(network: str) -> None:
    with pytest.raises(ConfigError):
        client_list([network])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"identity": ""}, "identity"),
        ({"bind": "localhost"}, "IP address"),
        ({"bind": "fe80::1%eth0"}, "scope"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"lease_lifetime": 0}, "lease"),
        ({"lease_lifetime": 121, "grace_period": 130}, "lease"),
        ({"grace_period": 19}, "grace"),
        ({"grace_period": 181}, "grace"),
        ({"minor_versions": ()}, "minor"),
        ({"minor_versions": (3,)}, "minor"),
        ({"recovery_root": Path("relative")}, "absolute"),
        ({"cache_entries": 0}, "cache"),
        ({"exports": BASE.exports * 2}, "two exports"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        render(msgspec.structs.replace(BASE, **changes), RUN_DIR)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"export_id": 0}, "export id"),
        ({"path": Path("data")}, "absolute"),
        ({"pseudo": "vol"}, "mount"),
        ({"pseudo": "/"}, "mount"),
        ({"pseudo": "/a//b"}, "mount"),
        ({"pseudo": "/a/.."}, "mount"),
        ({"pseudo": "/" + "a" * 256}, "longer"),
        ({"pseudo": '/it\'s "both"'}, "quote"),
        ({"anonymous_uid": -1}, "user or group"),
        ({"attr_expiration": -2}, "expiration"),
    ],
)
def test_a_bad_export_is_named(changes: dict[str, object], complaint: str) -> None:
    export = msgspec.structs.replace(BASE.exports[0], **changes)
    with pytest.raises(ConfigError, match=complaint):
        render(msgspec.structs.replace(BASE, exports=(export,)), RUN_DIR)


def test_an_access_list_leaves_nothing_to_the_others() -> None:
    export = msgspec.structs.replace(BASE.exports[0], allow=("10.0.0.0/8",), read_only=True, squash="all")
    parsed = parse(render(msgspec.structs.replace(BASE, exports=(export,)), RUN_DIR))
    assert find(parsed, "EXPORT", "Access_Type") == ["None"]
    assert find(parsed, "EXPORT", "CLIENT", "Clients") == ["10.0.0.0/8"]
    assert find(parsed, "EXPORT", "CLIENT", "Access_Type") == ["RO"]
    assert find(parsed, "EXPORT", "CLIENT", "Squash") == ["All_Squash"]


def test_the_filesystem_id_stays_and_differs() -> None:
    # Changing this number makes every mounted client see another filesystem.
    assert filesystem_id("vol1", 1) == "6309419290136876715.1"
    assert filesystem_id("vol2", 1) != filesystem_id("vol1", 1) != filesystem_id("vol1", 2)
