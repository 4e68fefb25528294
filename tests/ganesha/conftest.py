import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ganesha import Export, ServerConfig


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., ServerConfig]:
    """A configuration with one export, `/vol1`, of `tmp_path/data`, on a free loopback port."""

    def make(**changes: object) -> ServerConfig:
        export = {"export_id": 1, "path": tmp_path / "data", "pseudo": "/vol1"}
        export |= {name: changes.pop(name) for name in list(changes) if name in Export.__struct_fields__}
        Path(str(export["path"])).mkdir(exist_ok=True)
        recovery = tmp_path / "recovery"
        recovery.mkdir(exist_ok=True)
        values = {
            "identity": "volume-1",
            "port": free_port(),
            "recovery_root": recovery,
            "lease_lifetime": 2,
            "grace_period": 3,
            "exports": (Export(**export),),  # type: ignore[arg-type]
        }
        return ServerConfig(**{**values, **changes})  # type: ignore[arg-type]

    return make
