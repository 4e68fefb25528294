"""A Kubernetes cluster with a real API server, and stand-ins for kubelet, scheduler and kube-proxy.

Nodes and pods are network namespaces on the lab's bridge. What a pod's container would run is run as a process, with
the rights of the pod's service account. A Service's address is routed to where its Endpoints say, which are the real
controller-manager's.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from share_manager.kube.resources import VOLUME_LABEL, Resource
from share_manager.paths import VolumePaths
from tests.lab import leftovers
from tests.lab.control_plane import ControlPlane
from tests.lab.network import CLONE_NEWNET, SERVER, SUBNET, Lab
from tests.lab.nodes import PROGRAM, _run
from tests.lab.workloads import relay
from tests.project.common import ROOT

API = "/apis/share-manager.io/v1beta1/namespaces"
LOOK = 0.1
_addresses = itertools.count(140)
_libc = ctypes.CDLL(None, use_errno=True)


class Space:
    """A network namespace with an address on the lab's bridge."""

    def __init__(self, lab: Lab, name: str) -> None:
        number = next(_addresses)
        self.address = f"{SUBNET}.{number}"
        self.namespace = f"{lab.namespace}-{name}"
        self._lab = lab
        self._link = f"k{number}"
        _run("ip", "netns", "add", self.namespace)
        veth = ("type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _run("ip", "-n", lab.namespace, "link", "add", self._link, *veth)
        self.plug()
        self.inside("link", "set", "lo", "up")
        self.inside("address", "add", f"{self.address}/24", "dev", "eth0")
        self.inside("link", "set", "eth0", "up")

    def inside(self, *arguments: str) -> None:
        _run("ip", "-n", self.namespace, *arguments)

    def plug(self) -> None:
        _run("ip", "-n", self._lab.namespace, "link", "set", self._link, "master", "br0", "up")

    def unplug(self) -> None:
        _run("ip", "-n", self._lab.namespace, "link", "set", self._link, "nomaster")

    def popen(self, argv: list[str], log: Path, token: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._lab.environment({leftovers.TOKEN: str(token), **environment}),
                cwd="/",
                start_new_session=True,
            )

    def close(self) -> None:
        if Path("/run/netns", self.namespace).exists():
            _run("ip", "-n", self._lab.namespace, "link", "delete", self._link)
            _run("ip", "netns", "delete", self.namespace)


class Pod:
    """One that was started on a node."""

    def __init__(self, body: dict[str, Any], node: KubeNode, space: Space) -> None:
        self.body = body
        self.name: str = body["metadata"]["name"]
        self.node = node
        self.space = space
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = -1
        self.start_after = 0.0
        self.asked_to_leave: float | None = None
        self.service_address = ""


class KubeNode:
    """`alive`: its kubelet and agent run."""

    def __init__(self, cluster: KubeCluster, name: str) -> None:
        self.name = f"{name}{cluster.lab.mark}"
        self.place = cluster.place / name
        self.data_dir = self.place / "data"
        self.alive = True
        self.space = Space(cluster.lab, f"n{name}")
        self.agent: subprocess.Popen[bytes] | None = None
        self.data_dir.mkdir(parents=True)


class KubeCluster:
    """`close` leaves nothing of it, but for what the API server has in its namespace."""

    def __init__(self, lab: Lab, plane: ControlPlane, name: str, nodes: tuple[str, ...] = ("a", "b", "c")) -> None:
        self.lab = lab
        self.plane = plane
        self.place = lab.directory / f"kube-{name}"
        self.place.mkdir()
        self.namespace = plane.new_namespace()
        self.nodes = {one: KubeNode(self, one) for one in nodes}
        self.controllers: dict[str, subprocess.Popen[bytes]] = {}
        self.pods: dict[str, Pod] = {}
        self.problems: list[str] = []
        self._tokens: dict[str, str] = {}
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._relayed: list[socket.socket] = []
        self._pod_numbers = itertools.count(1)

    def __enter__(self) -> KubeCluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # what a person does

    def _start(self) -> None:
        self._relay()
        for sysctl in (
            "net.ipv4.ip_forward=1",
            "net.ipv4.conf.all.send_redirects=0",
            "net.ipv4.conf.br0.send_redirects=0",
        ):
            key, value = sysctl.split("=")
            path = f"/proc/sys/{key.replace('.', '/')}"
            done = self.lab.run(["sh", "-c", f"echo {value} > {path}"])
            assert done.returncode == 0, done.stderr
        self.plane.apply_roles(self.namespace)
        for node in self.nodes.values():
            self.call("POST", "/api/v1/nodes", {"metadata": {"name": node.name}})
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            self.merge(f"/api/v1/nodes/{node.name}/status", {"status": ready})
        for identity in ("one", "two"):
            self.start_controller(identity)
        self.wait(lambda: self.find(f"/api/v1/namespaces/{self.namespace}/secrets/share-manager-cluster"), "a secret")
        for node in self.nodes.values():
            self.start_agent(node)
        for work in (self._kubelet, self._proxy):
            thread = threading.Thread(target=self._loop, args=(work,), name=work.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def start_controller(self, identity: str) -> None:
        argv = [PROGRAM, "controller", "--identity", identity, "--namespace", self.namespace]
        argv += ["--kubeconfig", str(self._kubeconfig("share-manager-controller", near=True))]
        with (self.place / f"controller-{identity}.log").open("ab") as log:
            self.controllers[identity] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.lab.environment(), cwd="/"
            )

    def kill_leader(self) -> str:
        lease = self.call(
            "GET", f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/share-manager-controller"
        )
        leader: str = lease["spec"]["holderIdentity"]
        process = self.controllers.pop(leader)
        process.kill()
        process.wait(20)
        return leader

    def start_agent(self, node: KubeNode) -> None:
        daemon = _document("node.yaml", "DaemonSet")["spec"]["template"]["spec"]
        environment = {"NODE_NAME": node.name, "HOST_IP": node.space.address}
        argv = [PROGRAM, *_substituted(daemon["containers"][0]["args"], environment)]
        argv = self._local(argv, daemon, node.place)
        argv += ["--data-dir", str(node.data_dir), "--namespace", self.namespace]
        argv += ["--kubeconfig", str(self._kubeconfig(daemon["serviceAccountName"]))]
        node.agent = node.space.popen(argv, node.place / "agent.log", node.place, {})

    def power_cut(self, name: str) -> float:
        """Everything on the node ends, and nobody hears of it; when. (Its page cache stays: it is this machine's.)"""
        node = self.nodes[name]
        node.alive = False
        node.space.unplug()
        pods = [pod for pod in self.pods.values() if pod.node is node]
        for pod in pods:
            pod.space.unplug()
        now = time.time()
        for process in leftovers.processes(node.place):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        for process_ in [node.agent, *(pod.process for pod in pods)]:
            if process_ is not None:
                process_.wait(20)
        return now

    def power_on(self, name: str) -> None:
        node = self.nodes[name]
        for pod in [pod for pod in self.pods.values() if pod.node is node]:
            self._gone(pod)
        node.space.plug()
        node.alive = True
        self.start_agent(node)

    def kill_pod(self, name: str) -> float:
        """SIGKILL to all that runs in it; its container starts anew."""
        pod = self.pods[name]
        assert pod.process is not None
        now = time.time()
        os.killpg(pod.process.pid, signal.SIGKILL)
        data = pod.node.place / name
        for process in leftovers.processes(data):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        return now

    # the API

    def call(self, method: str, path: str, body: Any = None) -> Any:
        return self.plane.call(method, path, body)

    def make(self, kind: type[Resource], body: Any) -> Any:
        """One of our objects."""
        head = {"apiVersion": kind.GROUP_VERSION, "kind": kind.__name__}
        return self.call("POST", self.of(kind.PLURAL), head | body)

    def merge(self, path: str, body: Any) -> Any:
        return self.plane.call("PATCH", path, body, content_type="application/merge-patch+json")

    def find(self, path: str) -> Any:
        with contextlib.suppress(OSError):
            return self.call("GET", path)
        return None

    def of(self, plural: str, name: str = "") -> str:
        """Path of our objects."""
        return f"{API}/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def wait(self, what: Callable[[], Any], name: str, budget: float = 90.0) -> Any:
        end = time.monotonic() + budget
        while True:
            if found := what():
                return found
            assert time.monotonic() < end, f"never {name}\n{self.said()}"
            time.sleep(0.1)

    def share(self, volume: str) -> Any:
        found = self.find(self.of("sharemanagers", volume)) or {}
        return found.get("status", {})

    def wait_state(self, volume: str, state: str, but: str = "", budget: float = 120.0) -> Any:
        """Status of the share, in that state, by another pod than `but`."""

        def look() -> Any:
            status = self.share(volume)
            return status if status.get("state") == state and (not but or status.get("pod") != but) else None

        return self.wait(look, f"{state}: {self.share(volume)}", budget)

    def said(self) -> str:
        parts = [f"== {path}\n{path.read_text(errors='replace')[-2500:]}" for path in self.place.rglob("*.log")]
        return "\n".join([*parts, *self.problems])

    # what a cluster does

    def _loop(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except OSError as error:
                # the API server is away: a kubelet goes on with what it has
                self.problems.append(f"{work.__name__}: {error}")
                del self.problems[:-20]
            self._stop.wait(LOOK)

    def _kubelet(self) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        try:
            listed = {one["metadata"]["name"]: one for one in self.call("GET", path)["items"]}
        finally:
            for pod in list(self.pods.values()):
                self._keep_running(pod)
        for name, body in listed.items():
            node = next((one for one in self.nodes.values() if one.name == body["spec"].get("nodeName")), None)
            if node is None:
                self._schedule(body)
                continue
            if not node.alive:
                continue
            if name not in self.pods:
                if body["metadata"].get("deletionTimestamp"):
                    self.call("DELETE", f"{path}/{name}", {"gracePeriodSeconds": 0})
                else:
                    self._run_pod(body, node)
                continue
            self.pods[name].body = body
            if body["metadata"].get("deletionTimestamp"):
                self._leave(self.pods[name])
        for name in [name for name in self.pods if name not in listed]:
            # deleted by force
            pod = self.pods[name]
            if pod.node.alive:
                if pod.process is not None and pod.process.poll() is None:
                    self.kill_pod(name)
                self._gone(pod)

    def _schedule(self, body: dict[str, Any]) -> None:
        affinity = body["spec"].get("affinity", {}).get("nodeAffinity", {})
        terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
        fields = terms[0]["matchFields"] if terms else []
        near = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
        preferred = [one["preference"]["matchFields"][0]["values"][0] for one in near]

        def fits(name: str) -> bool:
            return all((name in one["values"]) == (one["operator"] == "In") for one in fields)

        # what the scheduler does not know to be dead it may choose
        fit = sorted(
            (one.name for one in self.nodes.values() if fits(one.name)), key=lambda name: name not in preferred
        )
        if fit:
            name, namespace = body["metadata"]["name"], self.namespace
            binding = {"metadata": {"name": name}, "target": {"kind": "Node", "name": fit[0]}}
            self.call("POST", f"/api/v1/namespaces/{namespace}/pods/{name}/binding", binding)

    def _run_pod(self, body: dict[str, Any], node: KubeNode) -> None:
        pod = Pod(body, node, Space(self.lab, f"p{next(self._pod_numbers)}"))
        self.pods[pod.name] = pod
        self._keep_running(pod)
        containers = [{"name": "share-manager", "ready": True, "restartCount": 0, "image": "", "imageID": ""}]
        address = pod.space.address
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "containerStatuses": containers}
        self.merge(f"/api/v1/namespaces/{self.namespace}/pods/{pod.name}/status", {"status": status})

    def _keep_running(self, pod: Pod) -> None:
        """As restartPolicy Always does."""
        if not pod.node.alive or pod.asked_to_leave is not None:
            return
        if pod.process is not None:
            if pod.process.poll() is None:
                return
            pod.process = None
            pod.start_after = time.monotonic() + min(pod.restarts * 2.0, 20.0)
        if time.monotonic() < pod.start_after:
            return
        pod.restarts += 1
        place = pod.node.place / pod.name
        place.mkdir(exist_ok=True)
        spec = pod.body["spec"]
        argv = _substituted(spec["containers"][0]["command"], {"NODE_NAME": pod.node.name})
        argv = self._local([PROGRAM, *argv[1:]], spec, place)
        argv += ["--data-dir", str(place / "data"), "--namespace", self.namespace]
        argv += ["--kubeconfig", str(self._kubeconfig(spec["serviceAccountName"]))]
        pod.process = pod.space.popen(argv, pod.node.place / f"{pod.name}.log", place, {"DM_DISABLE_UDEV": "1"})

    def _leave(self, pod: Pod) -> None:
        now = time.monotonic()
        if pod.asked_to_leave is None:
            pod.asked_to_leave = now
            if pod.process is not None and pod.process.poll() is None:
                pod.process.send_signal(signal.SIGTERM)
        grace = pod.body["metadata"].get("deletionGracePeriodSeconds", 30)
        if pod.process is not None and pod.process.poll() is None:
            if now - pod.asked_to_leave < grace:
                return
            self.kill_pod(pod.name)
            pod.process.wait(20)
        self.call("DELETE", f"/api/v1/namespaces/{self.namespace}/pods/{pod.name}", {"gracePeriodSeconds": 0})
        self._gone(pod)

    def _gone(self, pod: Pod) -> None:
        self.pods.pop(pod.name, None)
        place = pod.node.place / pod.name
        run = VolumePaths(place / "data", pod.body["metadata"]["labels"][VOLUME_LABEL]).run
        # its name is the mark of what it mounted, which is nowhere else on this machine
        leftovers.remove(place, run.name)
        pod.space.close()

    def _local(self, argv: list[str], spec: dict[str, Any], place: Path) -> list[str]:
        """`argv` with the paths of mounted Secrets as they are on this machine."""
        kinds = {one["name"]: one for one in spec["volumes"]}
        for mount in spec["containers"][0]["volumeMounts"]:
            secret = kinds[mount["name"]].get("secret")
            if secret is None:
                continue
            found = self.call("GET", f"/api/v1/namespaces/{self.namespace}/secrets/{secret['secretName']}")
            directory = place / f"secret-{mount['name']}"
            directory.mkdir(exist_ok=True, mode=0o700)
            for key, value in found["data"].items():
                (directory / key).write_bytes(b64decode(value))
            argv = [one.replace(mount["mountPath"], str(directory)) for one in argv]
        return argv

    def _proxy(self) -> None:
        """A Service's address is on the pod that its endpoints name, and routed there."""
        base = f"/api/v1/namespaces/{self.namespace}"
        for service in self.call("GET", f"{base}/services")["items"]:
            address = service["spec"]["clusterIP"]
            endpoints = self.find(f"{base}/endpoints/{service['metadata']['name']}") or {}
            there = [
                one["ip"]
                for subset in endpoints.get("subsets") or ()
                for part in ("addresses", "notReadyAddresses")
                for one in subset.get(part) or ()
            ]
            for pod in list(self.pods.values()):
                if pod.space.address not in there:
                    continue
                if pod.service_address != address:
                    pod.service_address = address
                    with contextlib.suppress(RuntimeError):
                        pod.space.inside("address", "add", f"{address}/32", "dev", "lo")
                    _run("ip", "-n", self.lab.namespace, "route", "replace", address, "via", pod.space.address)
                    for other in self.pods.values():
                        if other is not pod and other.service_address == address:
                            other.service_address = ""

    def _kubeconfig(self, account: str, *, near: bool = False) -> Path:
        """`near`: for a process that is on this machine, and not in a namespace."""
        if account not in self._tokens:
            self._tokens[account] = self.plane.token_of(self.namespace, account)
        server = "" if near else f"https://{SERVER}:{self.plane.port}"
        return self.plane.kubeconfig(self._tokens[account], self.namespace, server)

    def _relay(self) -> None:
        """The API server, which is on this machine's loopback, at the bridge's address."""
        made: list[socket.socket] = []

        def listen() -> None:
            # setns moves the calling thread only, and this one ends here
            with open(f"/run/netns/{self.lab.namespace}") as namespace:
                assert _libc.setns(namespace.fileno(), CLONE_NEWNET) == 0
            made.append(socket.create_server((SERVER, self.plane.port)))

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        self._listener = made[0]
        threading.Thread(target=self._accept, daemon=True, name="relay").start()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                try:
                    there = socket.create_connection(("127.0.0.1", self.plane.port), timeout=5)
                except OSError:
                    here.close()
                    continue
                there.settimeout(None)
                self._relayed += [here, there]
                for source, target in ((here, there), (there, here)):
                    threading.Thread(target=relay.pump, args=(source, target), daemon=True).start()

    def close(self) -> None:
        print(self.said())
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        for process in self.controllers.values():
            process.kill()
            process.wait(20)
        for node in self.nodes.values():
            for found in leftovers.processes(node.place):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(found.name), signal.SIGKILL)
        for pod in list(self.pods.values()):
            self._gone(pod)
            if pod.process is not None:
                pod.process.wait(20)
        for node in self.nodes.values():
            # of no namespace: the next cluster has nodes of these names
            with contextlib.suppress(OSError):
                self.call("DELETE", f"/api/v1/nodes/{node.name}")
            if node.agent is not None:
                node.agent.wait(20)
            leftovers.remove(node.place, node.name)
            node.space.close()
        if self._listener is not None:
            # a thread that waits in accept wakes up
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for one in self._relayed:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _document(name: str, kind: str) -> Any:
    documents = yaml.safe_load_all((ROOT / "deploy/manifests" / name).read_text())
    return next(one for one in documents if one["kind"] == kind)


def _substituted(words: list[str], environment: dict[str, str]) -> list[str]:
    for name, value in environment.items():
        words = [word.replace(f"$({name})", value) for word in words]
    return words
