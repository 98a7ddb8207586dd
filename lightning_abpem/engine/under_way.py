"""The calls of a target that are under way: a model adapts to one batch at a time, in one thread at a time."""

from __future__ import annotations

import threading
import weakref

__all__ = ["CallUnderWay", "CallsUnderWay"]


class CallUnderWay:
    """Mark of a call: it is under way as long as its frame holds this, also if an interrupt ends it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class CallsUnderWay:
    """The calls of one target, by their marks. The first of them is let through.

    Args:
        name: the target's, for an error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._marks: list[weakref.ref[CallUnderWay]] = []

    def begin(self, call: CallUnderWay) -> None:
        """Note a call, whose frame has made the mark.

        Raises:
            RuntimeError: naming both threads, if a call of another thread is under way.
        """
        self._marks.append(weakref.ref(call, self._marks.remove))  # atomic: of two threads at once one is the first
        first = self._first()
        if first is None or first is call:
            return
        own, other = call.thread, first.thread
        del call, first  # also if somebody keeps the error
        raise RuntimeError(
            f"{self._name} is called from thread {own} while its call in thread {other} is under way. "
            "It adapts to one batch at a time: use one thread, or a lock."
        )

    def has_own(self) -> bool:
        """Return True if a call of this thread is under way; no frame holds its mark for longer than that."""
        first = self._first()
        return first is not None and first.thread == threading.get_ident()

    def _first(self) -> CallUnderWay | None:
        calls = (mark() for mark in tuple(self._marks))
        return next((call for call in calls if call is not None), None)
