"""Reads and writes the project's directory, never following a link.

Nothing outside this room opens a path under the project root for writing. May import `core`, `telemetry` and `config`.
Promises that a file appears by rename or exchange alone, and that a transaction is applied whole or undone whole.
"""
