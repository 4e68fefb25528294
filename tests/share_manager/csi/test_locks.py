from __future__ import annotations

import pytest

from share_manager.csi.errors import AbortedError
from share_manager.csi.locks import Locks


def test_an_operation_on_a_volume_keeps_others_off_it() -> None:
    locks = Locks()
    with locks.alone("a"):
        with pytest.raises(AbortedError), locks.alone("a"):
            pass
        with pytest.raises(AbortedError), locks.place("a", "/x"):
            pass
        with locks.alone("b"):
            pass
    with locks.alone("a"):
        pass


def test_operations_on_different_places_of_a_volume_go_side_by_side() -> None:
    locks = Locks()
    with locks.place("a", "/x"), locks.place("a", "/y"):
        with pytest.raises(AbortedError), locks.place("a", "/x"):
            pass
        with pytest.raises(AbortedError), locks.alone("a"):
            pass
    with locks.alone("a"):
        pass


def test_a_failure_gives_the_volume_free() -> None:
    locks = Locks()
    with pytest.raises(ZeroDivisionError), locks.alone("a"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), locks.place("a", "/x"):
        raise ZeroDivisionError
    with locks.alone("a"):
        pass
