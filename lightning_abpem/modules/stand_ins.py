"""Stand-ins for a module's forward while a model adapts."""

from __future__ import annotations

from collections.abc import Callable
from functools import WRAPPER_ASSIGNMENTS, partial, update_wrapper
from typing import Any, NoReturn

__all__ = [
    "MISSING",
    "StandIn",
    "StandInForOwn",
    "Uncopied",
    "hides_attribute",
    "log_nothing",
    "put_back",
    "state_without",
]

MISSING: Any = object()


class Uncopied:
    """Mixin that forbids copying or pickling a model while it adapts."""

    def __reduce__(self) -> Any:
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise TypeError(
            "A model cannot be copied or pickled while it adapts: copy it before (a method does in `collect`), or take "
            "its state_dict()."
        )


class _Original:
    """An object's attribute as it is called without a stand-in: its own, or else that of its class of the moment.

    Args:
        owner: the object.
        attribute: the attribute's name.
    """

    __slots__ = ("_attribute", "_found", "_kind", "_owner", "own")

    def __init__(self, owner: Any, attribute: str) -> None:
        self._owner, self._attribute = owner, attribute
        self.own = owner.__dict__.get(attribute, MISSING)
        self._found, self._kind = getattr(owner, attribute), type(owner)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self.own is MISSING and type(self._owner) is not self._kind:
            self._find()
        return self._found(*args, **kwargs)

    def _find(self) -> None:
        """Find it in a class that the object was given."""
        kind = type(self._owner)
        found = next(own.__dict__[self._attribute] for own in kind.__mro__ if self._attribute in own.__dict__)
        self._found = found.__get__(self._owner, kind) if hasattr(type(found), "__get__") else found
        self._kind = kind


class StandIn(Uncopied, partial):  # type: ignore[type-arg]
    """Has calls of an object's attribute go to `wrapper(*first, original, ...)`; the signature stays visible.

    Users' code may put something else in its place, which stays there, or keep it elsewhere. There it calls the
    original, of which it becomes a copy when it is copied after its time.
    """

    original: _Original
    _owner: Any
    _attribute: str
    _is_over: bool

    def __new__(cls, owner: Any, attribute: str, wrapper: Callable[..., Any], *first: Any) -> StandIn:
        original = _Original(owner, attribute)
        kind = cls if original.own is MISSING else StandInForOwn
        self = super().__new__(kind, wrapper, *first, original)
        update_wrapper(self, getattr(owner, attribute), [*WRAPPER_ASSIGNMENTS], [])
        self.original, self._owner, self._attribute, self._is_over = original, owner, attribute, False
        return self

    def __getattr__(self, name: str) -> Any:
        """Give what the original has besides, such as the function of a method."""
        if name in StandIn.__annotations__:  # not set yet
            raise AttributeError(name)
        return getattr(self.original._found, name)

    def renewed(self) -> StandIn:
        """Return one for what is in its place by now."""
        return StandIn(self._owner, self._attribute, self.func, *self.args[:-1])

    @property
    def is_in_place(self) -> bool:
        return self._owner.__dict__.get(self._attribute) is self

    def is_of(self, owner: Any, attribute: str) -> bool:
        """Return True if it stands in the place of this attribute, and for no other stand-in."""
        return self._owner is owner and self._attribute == attribute and not isinstance(self.original.own, StandIn)

    def place(self) -> None:
        """Put it into the place of the attribute."""
        self._owner.__dict__[self._attribute] = self

    def put_back(self) -> None:
        """Put the original back, unless something else is there by now."""
        put_back(self._owner.__dict__, self._attribute, self, self.original.own)
        self._is_over = True

    def __reduce__(self) -> Any:
        return (getattr, (self._owner, self._attribute)) if self._is_over else self._refuse()


class StandInForOwn(StandIn):
    """One for an attribute that was the object's own: what that holds can be reached in a call."""


def state_without(owner: Any, original: Callable[[], Any]) -> Any:
    """Return an object's state for a copy of it, which has no stand-ins: they would call the original object.

    It stands in for the object's `__getstate__`, by which `copy` and `pickle` get the state.
    """
    state = original()
    if not isinstance(state, dict):
        return state
    own = {name: value for name, value in state.items() if isinstance(value, StandIn) and value.is_of(owner, name)}
    kept = {name: own[name].original.own if name in own else value for name, value in state.items()}
    return {name: value for name, value in kept.items() if value is not MISSING}


def put_back(place: dict[str, Any], name: str, ours: Any, before: Any) -> None:
    """Put back what was in a place before, unless something else than ours is there by now."""
    if place.get(name, MISSING) is not ours:
        return
    if before is MISSING:
        place.pop(name, None)
    else:
        place[name] = before


def hides_attribute(owner: Any, attribute: str) -> bool:
    """Return True if an attribute cannot be stood in for: a property of the class hides that of the instance."""
    return hasattr(getattr(type(owner), attribute, None), "__set__")


def log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a LightningModule's `log` and `log_dict`."""
