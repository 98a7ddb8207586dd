"""The zoo: all entries by name."""

from tests.zoo import (  # noqa: F401  (they register entries)
    arguments,
    buffers,
    containers,
    derived,
    given,
    hidden,
    hooks,
    keywords,
    libraries,
    modes,
    objects,
    replayed,
    scripted,
    state,
    structure,
    swaps,
)
from tests.zoo.nets import ENTRIES, Entry

__all__ = ["ENTRIES", "Entry"]
