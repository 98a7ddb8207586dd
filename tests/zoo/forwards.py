"""The zoo: all entries by name."""

from tests.zoo import arguments, buffers, containers, derived, modes, objects, state, structure  # noqa: F401  (they register entries)
from tests.zoo.nets import ENTRIES, Entry

__all__ = ["ENTRIES", "Entry"]
