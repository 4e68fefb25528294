"""Snapshots of an attached volume as read-only files, served by a process of its own (engine/launch.py)."""
