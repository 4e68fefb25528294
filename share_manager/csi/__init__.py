"""The Container Storage Interface: what kubelet and the sidecars ask of this driver, over gRPC on a unix socket.

protocol/      csi.v1 on the wire, and the code generated for it
errors.py      what a call is answered with instead of a result
names.py       volume ids made of the names that CSI gives
options.py     which mount options there are, and which of them a node gets
checks.py      what every call must satisfy before anything is done
locks.py       one operation on a thing at a time
bridge.py      gRPC's threads on one side, trio on the other
log.py         a line for each call, without secrets
identity.py    the three services
node.py
mounts.py      mounts of a node: seen without touching them, changed by child processes
"""
