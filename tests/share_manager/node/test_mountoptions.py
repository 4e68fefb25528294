"""Which version of NFS a client's kernel should speak."""

from __future__ import annotations

import pytest

from share_manager.errors import InvalidValueError
from share_manager.node.mountoptions import choose
from tests.share_manager.conftest import run_command


@pytest.mark.parametrize(
    ("release", "delegations", "version"),
    [
        ("6.1.0-13-amd64", None, "4.2"),
        ("5.15.0-91-generic", None, "4.2"),
        ("6.18.3", None, "4.2"),
        ("6.19.0-rc1", None, "4.0"),
        ("6.19", "Y\n", "4.0"),
        ("7.0.1", None, "4.0"),
        ("10.2.0", None, "4.0"),
        # one who has switched it off, and one whose distribution has it in an older kernel
        ("6.19.4", "N\n", "4.2"),
        ("6.12.0-el10", "Y\n", "4.0"),
    ],
)
def test_the_version_is_what_kernel_and_server_have_in_common(
    release: str, delegations: str | None, version: str
) -> None:
    chosen = choose(release, delegations)
    assert chosen.version == version
    # never soft: an application must not see an error for a failover
    assert chosen.options == f"vers={version},hard,timeo=600,retrans=2"


@pytest.mark.parametrize("release", ["", "six", "6", "v6.1"])
def test_what_is_no_release_is_refused(release: str) -> None:
    with pytest.raises(InvalidValueError):
        choose(release, None)


def test_the_command_prints_what_mount_takes() -> None:
    assert run_command("mount-options", "--kernel", "6.1.0").stdout == "vers=4.2,hard,timeo=600,retrans=2\n"
    assert '"version": "4.0"' in run_command("mount-options", "--kernel", "6.19.0", "--output", "json").stdout
    assert run_command("mount-options").stdout.startswith("vers=4.")
    refused = run_command("mount-options", "--kernel", "new")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
