"""Shares seen through an NFS client: this kernel's, or one that a program of the user's has (docs/bench.md)."""
