"""Brings the channel's messages to the sync loop over a socket that is replaced whenever it fails. `source` is
the seam that every transport fits; `channel` and `types` are pure. May import `core`, `telemetry`, `config`,
`tokens`, `retry`. Promises that a lost connection is always reported, never that a message arrives.
"""
