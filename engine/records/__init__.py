"""What is kept of a volume outside of its nodes: its record, the lease of whoever serves it, and who stands by.

messages.py   what is asked and answered
channel.py    how a message travels: a keyed handshake, then every message with a proof of its own
ledger.py     what the server knows, and what of it is on disk
server.py     the server's side, `share-manager records serve`
client.py     the nodes' side; each call has a deadline
"""

from engine.records.client import ORPHANED, RecordsClient, RemoteRecordStore, release_lease
from engine.records.ledger import Ledger
from engine.records.messages import Lease, Presence
from engine.records.server import serve_records

__all__ = [
    "ORPHANED",
    "Lease",
    "Ledger",
    "Presence",
    "RecordsClient",
    "RemoteRecordStore",
    "release_lease",
    "serve_records",
]
