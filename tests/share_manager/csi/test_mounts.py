"""What mountinfo says, also in odd words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from share_manager.csi.mounts import mounts, parse_mountinfo

TEXT = (
    "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
    "412 99 0:51 / /var/lib/kubelet/plugins/a\\040b/globalmount rw,relatime shared:7 - nfs4 10.96.0.7:/pvc-1 "
    "rw,vers=4.2,rsize=65536,hard,proto=tcp,port=2050,timeo=600,addr=10.96.0.7\n"
    "413 99 0:51 / /pod ro,relatime shared:7 master:9 - nfs4 [fd00::7]:/pvc-2 rw,vers=4.0,hard\n"
    "nonsense\n"
)


def test_lines_of_the_manual_page_and_of_nfs() -> None:
    plain, staged, pod = parse_mountinfo(TEXT)
    assert (plain.device, plain.root, plain.place, plain.kind, plain.is_nfs) == (
        "98:0",
        "/mnt1",
        "/mnt2",
        "ext3",
        False,
    )
    assert plain.shown == {"rw": "", "errors": "continue"}
    assert staged.place == "/var/lib/kubelet/plugins/a b/globalmount"
    assert (staged.is_nfs, staged.server, staged.share, staged.read_only) == (True, "10.96.0.7", "pvc-1", False)
    assert staged.shown["port"] == "2050"
    assert (pod.server, pod.share, pod.read_only, pod.device) == ("fd00::7", "pvc-2", True, staged.device)


def test_this_machine_has_a_root() -> None:
    assert any(mount.place == "/" for mount in mounts())


@given(st.text(st.characters(exclude_characters="\x00\x85\u2028\u2029", codec="utf-8"), min_size=1, max_size=40))
def test_any_place_is_read_back(name: str) -> None:
    # as the kernel writes it: show_mountinfo, seq_path with " \t\n\\"
    escaped = "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in name)
    lines = f"1 2 0:5 / /{escaped} rw - nfs4 a:/b rw"
    assert len(lines.splitlines()) != 1 or next(parse_mountinfo(lines)).place == f"/{name}"
