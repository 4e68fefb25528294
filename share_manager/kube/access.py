"""Where the API server is, and who we are: from a pod's service account, or from a kubeconfig file."""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from share_manager.kube.errors import AccessError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """`server` is a URL. A token in a file is read anew for every request, as kubelet replaces it before it expires."""

    server: str
    authority: Path | None = None
    authority_data: bytes = b""
    token: str = ""
    token_file: Path | None = None
    certificate_data: bytes = b""
    key_data: bytes = b""
    namespace: str = "default"

    def headers(self) -> dict[str, str]:
        """Raises AccessError."""
        token = self.token
        if self.token_file is not None:
            try:
                token = self.token_file.read_text().strip()
            except OSError as error:
                raise AccessError(str(self.token_file), error.strerror or str(error)) from error
        return {"Authorization": f"Bearer {token}"} if token else {}

    def tls(self) -> ssl.SSLContext:
        """Raises AccessError."""
        context = ssl.create_default_context()
        # roots are what we were told, and nobody else
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if self.authority or self.authority_data else context
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if self.authority is not None:
                context.load_verify_locations(cafile=self.authority)
            if self.authority_data:
                context.load_verify_locations(cadata=self.authority_data.decode())
            if self.certificate_data:
                with tempfile.TemporaryDirectory(prefix="share-manager-") as directory:
                    pair = Path(directory, "pair.pem")
                    pair.touch(mode=0o600)
                    pair.write_bytes(self.certificate_data + b"\n" + self.key_data)
                    context.load_cert_chain(pair)
        except (OSError, ValueError) as error:
            raise AccessError(self.server, f"its certificates cannot be used: {error}") from error
        return context

    def __repr__(self) -> str:
        return f"Access({self.server!r})"


def in_cluster(directory: Path = SERVICE_ACCOUNT, environment: Mapping[str, str] = os.environ) -> Access:
    """That of the pod we are in. Raises AccessError."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise AccessError("KUBERNETES_SERVICE_HOST", "it is not set, so this is no pod: name a file with --kubeconfig")
    try:
        namespace = (directory / "namespace").read_text().strip()
    except OSError as error:
        raise AccessError(str(directory / "namespace"), error.strerror or str(error)) from error
    return Access(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        authority=directory / "ca.crt",
        token_file=directory / "token",
        namespace=namespace,
    )


def from_kubeconfig(path: Path, context: str = "") -> Access:
    """The current context, or the one named. Raises AccessError."""
    try:
        config = yaml.safe_load(path.read_text())
        return _read_kubeconfig(path, config, context)
    except OSError as error:
        raise AccessError(str(path), error.strerror or str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccessError(str(path), f"it is no YAML: {' '.join(str(error).split())}") from error
    except (AttributeError, KeyError, TypeError, binascii.Error) as error:
        raise AccessError(str(path), f"it is no kubeconfig file: {error}") from error


def _read_kubeconfig(path: Path, config: Any, wanted: str) -> Access:
    name = wanted or config["current-context"]
    context = _named(path, config, "context", name)
    cluster = _named(path, config, "cluster", context["cluster"])
    user = _named(path, config, "user", context["user"])
    if "exec" in user or "auth-provider" in user:
        raise AccessError(
            str(path), f"user {context['user']} logs in with a program, which is not supported: use a token"
        )
    if cluster.get("insecure-skip-tls-verify"):
        raise AccessError(str(path), "insecure-skip-tls-verify is not supported: name the certificate authority")

    def content(of: dict[str, Any], key: str) -> bytes:
        if data := of.get(f"{key}-data"):
            return base64.b64decode(data, validate=True)
        return (path.parent / of[key]).read_bytes() if of.get(key) else b""

    token_file = user.get("tokenFile")
    return Access(
        server=str(cluster["server"]).rstrip("/"),
        authority_data=content(cluster, "certificate-authority"),
        token=user.get("token") or "",
        token_file=path.parent / token_file if token_file else None,
        certificate_data=content(user, "client-certificate"),
        key_data=content(user, "client-key"),
        namespace=context.get("namespace") or "default",
    )


def _named(path: Path, config: Any, kind: str, name: str) -> dict[str, Any]:
    for one in config.get(f"{kind}s") or ():
        if one["name"] == name:
            found: dict[str, Any] = one[kind]
            return found
    raise AccessError(str(path), f"it has no {kind} {name!r}")


def find_access(kubeconfig: Path | None = None, context: str = "") -> Access:
    """As kubectl does: the file that was named, that of KUBECONFIG, the pod's service account, ~/.kube/config.

    Raises AccessError.
    """
    if kubeconfig is not None:
        return from_kubeconfig(kubeconfig, context)
    if named := os.environ.get("KUBECONFIG"):
        return from_kubeconfig(Path(named), context)
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return in_cluster()
    return from_kubeconfig(Path.home() / ".kube/config", context)
