"""What stands between the clients and a share's NFS server: who may come, under which address, and until when."""

from share_manager.share.network.gate import (
    ClientAddress,
    GatedNetwork,
    HostNetwork,
    NetworkMode,
    NetworkOptions,
    ShareNetwork,
    remove_rules,
    share_network,
)

__all__ = [
    "ClientAddress",
    "GatedNetwork",
    "HostNetwork",
    "NetworkMode",
    "NetworkOptions",
    "ShareNetwork",
    "remove_rules",
    "share_network",
]
