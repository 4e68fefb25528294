from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from share_manager.kube.access import Access, find_access, from_kubeconfig, in_cluster
from share_manager.kube.errors import AccessError


def kubeconfig(path: Path, **user: Any) -> Path:
    cluster = {"server": "https://127.0.0.1:1/", "certificate-authority-data": "Y2E="}
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "ns"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
    }
    file = path / "config"
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_kubeconfig_with_a_token(tmp_path: Path) -> None:
    access = from_kubeconfig(kubeconfig(tmp_path, token="t"))
    assert access.server == "https://127.0.0.1:1"
    assert (access.namespace, access.authority_data) == ("ns", b"ca")
    assert access.headers() == {"Authorization": "Bearer t"}
    assert "Bearer" not in repr(access)


def test_a_kubeconfig_with_files(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    access = from_kubeconfig(kubeconfig(tmp_path, tokenFile="token"))
    assert access.headers() == {"Authorization": "Bearer first"}
    (tmp_path / "token").write_text("second\n")
    assert access.headers() == {"Authorization": "Bearer second"}
    pair = {"client-certificate-data": base64.b64encode(b"cert").decode(), "client-key-data": "a2V5"}
    assert from_kubeconfig(kubeconfig(tmp_path, **pair)).key_data == b"key"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no kubeconfig"),
        ("[1", "no YAML"),
        ("a: b", "no kubeconfig"),
        ("current-context: x", "no context 'x'"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(AccessError, match=says) as caught:
        from_kubeconfig(path)
    assert "\n" not in str(caught.value)


def test_programs_and_blind_trust_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="use a token"):
        from_kubeconfig(kubeconfig(tmp_path, exec={"command": "x"}))
    path = kubeconfig(tmp_path, token="t")
    path.write_text(path.read_text().replace("certificate-authority-data: Y2E=", "insecure-skip-tls-verify: true"))
    with pytest.raises(AccessError, match="insecure"):
        from_kubeconfig(path)


def test_a_pod(tmp_path: Path) -> None:
    (tmp_path / "namespace").write_text("sm\n")
    (tmp_path / "token").write_text("tok")
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    access = in_cluster(tmp_path, environment)
    assert access.server == "https://[fd00::1]:443"
    assert access.namespace == "sm"
    assert access.headers() == {"Authorization": "Bearer tok"}
    with pytest.raises(AccessError, match="KUBERNETES_SERVICE_HOST"):
        in_cluster(tmp_path, {})
    (tmp_path / "token").unlink()
    with pytest.raises(AccessError, match="token"):
        access.headers()


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, token="t")))
    assert find_access().headers() == {"Authorization": "Bearer t"}
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AccessError, match="no way to a Kubernetes API server"):
        find_access()


def test_certificates_that_are_none() -> None:
    with pytest.raises(AccessError, match="certificates"):
        Access(server="https://127.0.0.1:1", authority_data=b"x").tls()
