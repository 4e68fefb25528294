"""A Kubernetes control plane of its own: etcd, kube-apiserver, kube-controller-manager, all on loopback.

The API server is real, with TLS, tokens and RBAC. There are no nodes and no scheduler: tests say what those would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from share_manager.kube.access import Access
from share_manager.kube.resources import RESOURCES
from share_manager.kube.schema import definition
from tests.lab.network import SERVER as LAB_SERVER
from tests.project.common import ROOT

ADMIN = "admin-of-the-tests"
START_TIMEOUT = 120.0
CONTROLLERS = (
    "namespace",
    "serviceaccount",
    "serviceaccount-token",
    "endpoint",
    "endpointslice",
    "garbagecollector",
    "daemonset",
    "deployment",
    "replicaset",
    "persistentvolume-binder",
    "pvc-protection",
    "pv-protection",
)


def binaries() -> Path:
    """Directory of kube-apiserver and kube-controller-manager."""
    printed = subprocess.run([ROOT / "scripts/kube.sh", "--print"], capture_output=True, text=True, check=True)
    return Path(printed.stdout.strip())


class ControlPlane:
    """A context manager. `version` is the API server's, as (major, minor)."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"sm-kube-{os.getpid()}-", dir="/tmp"))
        self.port, self._etcd_port, self._peer_port, self._manager_port = _free_ports(4)
        self.server = f"https://127.0.0.1:{self.port}"
        self._binaries = binaries()
        self._etcd = shutil.which("etcd", path=f"{self._binaries}:{os.environ['PATH']}")
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.version = (0, 0)
        self._namespaces = 0

    def __enter__(self) -> ControlPlane:
        try:
            self._begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def admin(self) -> Access:
        return self.access(ADMIN)

    def access(self, token: str, namespace: str = "default") -> Access:
        authority = (self.directory / "tls/apiserver.crt").read_bytes()
        return Access(server=self.server, authority_data=authority, token=token, namespace=namespace)

    def kubeconfig(self, token: str = ADMIN, namespace: str = "default", server: str = "") -> Path:
        """A file that gives this access; one for each token. `server`: another way to it."""
        path = self.directory / f"kubeconfig-{abs(hash((token, namespace, server)))}.yaml"
        authority = str(self.directory / "tls/apiserver.crt")
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "contexts": [{"name": "tests", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
            "clusters": [
                {"name": "c", "cluster": {"server": server or self.server, "certificate-authority": authority}}
            ],
            "users": [{"name": "u", "user": {"token": token}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def apply_roles(self, namespace: str) -> None:
        """The service accounts and roles of deploy/, in this namespace."""
        rbac = "/apis/rbac.authorization.k8s.io/v1"
        paths = {
            "ServiceAccount": f"/api/v1/namespaces/{namespace}/serviceaccounts",
            "Role": f"{rbac}/namespaces/{namespace}/roles",
            "RoleBinding": f"{rbac}/namespaces/{namespace}/rolebindings",
            "ClusterRole": f"{rbac}/clusterroles",
            "ClusterRoleBinding": f"{rbac}/clusterrolebindings",
        }
        for path in (*sorted((ROOT / "deploy/manifests").glob("*-rbac.yaml")), ROOT / "deploy/csi/rbac.yaml"):
            for one in yaml.safe_load_all(path.read_text()):
                if one["kind"].startswith("Cluster"):
                    one["metadata"]["name"] += f"-{namespace}"
                    if "roleRef" in one:
                        one["roleRef"]["name"] += f"-{namespace}"
                else:
                    one["metadata"]["namespace"] = namespace
                for subject in one.get("subjects", ()):
                    subject["namespace"] = namespace
                self.call("POST", paths[one["kind"]], one)
        # they count a moment after they were made
        end = time.monotonic() + START_TIMEOUT
        for account in ("controller", "node", "share"):
            while not self._may_make_leases(f"system:serviceaccount:{namespace}:share-manager-{account}", namespace):
                assert time.monotonic() < end, f"{account} has no rights"
                time.sleep(0.1)

    def _may_make_leases(self, user: str, namespace: str) -> bool:
        what = {"namespace": namespace, "verb": "create", "group": "coordination.k8s.io", "resource": "leases"}
        head = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
        asked = head | {"spec": {"user": user, "resourceAttributes": what}}
        answer = self.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", asked)
        return bool(answer["status"]["allowed"])

    def token_of(self, namespace: str, account: str) -> str:
        """A token of a service account, with just its rights."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 36000}}
        made = self.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", body)
        token: str = made["status"]["token"]
        return token

    def new_namespace(self) -> str:
        self._namespaces += 1
        name = f"test-{self._namespaces}"
        self.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        return name

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        accept: str = "application/json",
        content_type: str = "application/json",
    ) -> Any:
        """As the administrator, with nothing of the product in between. Raises HTTPError."""
        context = ssl.create_default_context(cafile=str(self.directory / "tls/apiserver.crt"))
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": content_type, "Accept": accept}
        request = urllib.request.Request(self.server + path, data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=20, context=context) as answer:
            return json.loads(answer.read())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The API server answers nothing, and ends no connection."""
        process = self._running["kube-apiserver"]
        process.send_signal(signal.SIGSTOP)
        while not _stopped(process.pid):
            time.sleep(0.005)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The API server is killed, and started again at the end."""
        self._stop("kube-apiserver", signal.SIGKILL)
        try:
            yield
        finally:
            self.start_api()

    def revision(self) -> int:
        """Counts all writes, of everybody."""
        return int(self._ask_etcd("range", {"key": "AA=="})["header"]["revision"])

    def compact(self) -> None:
        """Have etcd forget all but the newest version. With a restart of the API server, which remembers some of them,
        older watches and lists get 410."""
        self._ask_etcd("compaction", {"revision": self.revision(), "physical": True})

    def _ask_etcd(self, what: str, body: Any) -> Any:
        url = f"http://127.0.0.1:{self._etcd_port}/v3/kv/{what}"
        with urllib.request.urlopen(urllib.request.Request(url, data=json.dumps(body).encode()), timeout=20) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        for name in ("kube-controller-manager", "kube-apiserver", "etcd"):
            self._stop(name, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _begin(self) -> None:
        assert self._etcd is not None, "there is no etcd: run `make setup-test`"
        where = self.directory
        (where / "tls").mkdir()
        (where / "tokens.csv").write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        key = ["openssl", "genrsa", "-out", str(where / "accounts.key"), "2048"]
        subprocess.run(key, check=True, capture_output=True)
        # nothing here has to survive a power failure
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        self._start(
            "etcd",
            [
                *(self._etcd, "--data-dir", str(where / "etcd"), "--unsafe-no-fsync"),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *(
                    "--listen-peer-urls",
                    peer,
                    "--initial-advertise-peer-urls",
                    peer,
                    "--initial-cluster",
                    f"default={peer}",
                ),
            ],
        )
        self.start_api()
        version = self.call("GET", "/version")
        self.version = int(version["major"]), int(re.sub(r"\D.*", "", version["minor"]))
        self._start_manager()
        self._define()

    def start_api(self) -> None:
        where = self.directory
        self._start(
            "kube-apiserver",
            [
                *(str(self._binaries / "kube-apiserver"), f"--etcd-servers=http://127.0.0.1:{self._etcd_port}"),
                *(f"--secure-port={self.port}", "--bind-address=127.0.0.1", f"--cert-dir={where / 'tls'}"),
                *("--service-cluster-ip-range=10.96.0.0/16", "--endpoint-reconciler-type=none"),
                # its certificate is good for this one, too: the lab relays it
                f"--advertise-address={LAB_SERVER}",
                *("--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC"),
                f"--service-account-key-file={where / 'accounts.key'}",
                f"--service-account-signing-key-file={where / 'accounts.key'}",
                *(f"--token-auth-file={where / 'tokens.csv'}", "--allow-privileged=true", "--profiling=false"),
            ],
        )
        self._wait_ready()

    def _start_manager(self) -> None:
        program = str(self._binaries / "kube-controller-manager")
        where = self.directory
        argv = [
            *(program, f"--kubeconfig={self.kubeconfig()}", f"--controllers={','.join(CONTROLLERS)}"),
            *(f"--service-account-private-key-file={where / 'accounts.key'}", "--leader-elect=false"),
            *(f"--root-ca-file={where / 'tls/apiserver.crt'}", "--bind-address=127.0.0.1"),
            *(f"--secure-port={self._manager_port}", f"--cert-dir={where / 'manager-tls'}"),
            # how long it takes to notice what it watches is up to it; how often it looks at its claims is not
            *("--pvclaimbinder-sync-period=1s", "--min-resync-period=12h"),
        ]
        if self.version < (1, 24):
            # an insecure port, at a number that others may have
            argv.append("--port=0")
        self._start("kube-controller-manager", argv)

    def _define(self) -> None:
        base = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for kind in RESOURCES:
            self.call("POST", base, definition(kind))
        end = time.monotonic() + START_TIMEOUT
        for kind in RESOURCES:
            while not self._served(kind.GROUP_VERSION, kind.PLURAL):
                assert time.monotonic() < end, f"{kind.PLURAL} are not served"
                time.sleep(0.1)

    def _served(self, group_version: str, plural: str) -> bool:
        try:
            self.call("GET", f"/apis/{group_version}/{plural}?limit=1")
        except urllib.error.HTTPError:
            return False
        return True

    def _start(self, name: str, argv: Sequence[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            # it ends with this process, whatever ends that
            self._running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _stop(self, name: str, number: signal.Signals) -> None:
        process = self._running.pop(name, None)
        if process is not None:
            process.send_signal(number)
            process.wait(20)

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_TIMEOUT
        while True:
            process = self._running["kube-apiserver"]
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"kube-apiserver does not start:\n{self.log('kube-apiserver')}")
            try:
                context = ssl.create_default_context(cafile=str(self.directory / "tls/apiserver.crt"))
                request = urllib.request.Request(f"{self.server}/readyz", headers={"Authorization": f"Bearer {ADMIN}"})
                with urllib.request.urlopen(request, timeout=5, context=context):
                    return
            except OSError:
                time.sleep(0.1)

    def log(self, name: str, lines: int = 30) -> str:
        text = (self.directory / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def _stopped(pid: int) -> bool:
    """All of its threads."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
