"""The engine process of a share whose record is an object of the API: `python -m share_manager.kube.engine CONFIG`."""

from __future__ import annotations

import sys

import msgspec

from engine.__main__ import main
from engine.errors import RecordError
from engine.launch import EngineConfig
from share_manager.kube.blocking import BlockingClient
from share_manager.kube.errors import AccessError
from share_manager.kube.records import KubeRecordStore, StorePlace


def open_store(config: EngineConfig) -> KubeRecordStore:
    """Raises RecordError."""
    place = msgspec.json.decode(config.records, type=StorePlace)
    try:
        return KubeRecordStore(BlockingClient(place.access(), namespace=place.namespace), config.record, place.holder)
    except AccessError as error:
        raise RecordError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv, open_store))
