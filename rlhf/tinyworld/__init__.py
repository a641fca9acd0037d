"""The built-in world: everything that a full chain needs to learn and be measured on, and the truth about it.

Seeded and deterministic: the same seed gives the same bytes on every machine. Nothing is downloaded.
"""
