"""The replica server: one directory, one process, one engine at a time (docs/wire-protocol.md)."""

from engine.replica.listener import Listener, ListenError, listen
from engine.replica.server import Server

__all__ = ["ListenError", "Listener", "Server", "listen"]
