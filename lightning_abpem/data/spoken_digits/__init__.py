"""Spoken digits, synthesised; see `make` for how and the README beside it for what."""
