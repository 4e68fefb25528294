"""What runs in Kubernetes beside the controllers, on the nodes.

home.py      a share's process in its pod: record, holder and reports at the API server
allowed.py   whose addresses may mount
agent.py     a node's agent: says that it is alive, what disks it has, and serves its replicas
"""
