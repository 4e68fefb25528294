"""What makes the cluster as it is wanted: for each kind, observe, decide, apply. Safe to kill at any line.

actions.py        what a decision may ask for, and how that is carried out
conditions.py     what is told of an object
placement.py      where replicas go
volume.py         Volume: replicas, record, share, deletion
replica.py        Replica: what becomes of those whose node is gone
storage_node.py   StorageNode: whether a node is alive
share_manager.py  ShareManager: the states, and the epoch before every start
service.py        Service: the address of a share, and which pod it leads to
pod.py            the pod of a share
world.py          what is observed
manager.py        informers, queues, workers; only the leader has them

The `decide` of a module is a function of what was observed. It has no clock, no luck and no I/O.
"""
