"""What a node runs beside its shares: the replicas that it holds, and what ends connections to a share that moved."""
