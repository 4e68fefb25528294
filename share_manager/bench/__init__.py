"""`share-manager bench`: every layer of the data path, measured side by side in one run."""

from share_manager.bench.command import app

__all__ = ["app"]
