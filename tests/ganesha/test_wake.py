from __future__ import annotations

from pathlib import Path

import pytest

from ganesha import wake


def test_it_is_said_why_a_ganesha_cannot_be_woken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "_wake.so"
    monkeypatch.setattr(wake, "LIBRARY", library)
    assert "not built" in wake.hindrance("/bin/true")
    library.touch()
    assert wake.hindrance("/bin/true") == "/bin/true does not export reaper_wake"
    spaced = tmp_path / "with space.so"
    spaced.touch()
    monkeypatch.setattr(wake, "LIBRARY", spaced)
    assert "space" in wake.hindrance("/bin/true")
    assert wake.environment(tmp_path, {}) == {}
