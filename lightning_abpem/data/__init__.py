"""Data sets and corruptions. They need the `demo` extra: ``pip install 'lightning_abpem[demo]'``."""
