"""Layers: packed, unpacked, fetched, sent."""
