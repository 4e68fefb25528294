"""What a client of a volume can ask for. The numbers are those of the data connection's frames (engine.wire)."""

from __future__ import annotations

from typing import Final

READ: Final = 4
WRITE: Final = 5
FLUSH: Final = 6
UNMAP: Final = 7
