"""Bounds for what is read from others, and what msgspec raises for bytes that are not what they should be."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

# of epochs and incarnations: msgpack and msgspec's bounds take no more
Counter = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]

# the second for text that is not UTF-8, the third for what is nested too deeply
UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
