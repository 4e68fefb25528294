"""What speaks to Kubernetes: the objects, a client for its API, and what the controllers have in common.

meta.py        what every object has
resources.py   our own objects, the source of deploy/crds
core.py        those of Kubernetes that we touch
schema.py      custom resource definitions, made of those
patch.py       what changed between two of an object
access.py      where the API server is, and who we are
wire.py        requests and answers, without I/O
http.py        HTTP/1.1, for trio
client.py      the API server, for trio
blocking.py    the API server, for worker threads
records.py     a volume's record as an object of the API
engine.py      the engine process of such a volume
informer.py    what there is of one kind, kept up to date
queue.py       names of what has to be looked at
leader.py      one leader among several processes
events.py      events of Kubernetes
crds.py        writes deploy/crds
errors.py

The process of a volume needs none of it where there is no Kubernetes.
"""
