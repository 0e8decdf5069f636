"""Gives files that tools in the container made back to the project: watch, record, offer, apply the answer.

`states` decides (pure), `flow` does it, `watch` sees, `store` keeps what is on its way, `pace` waits, `wire` writes and
reads what travels. The loop above asks it before it replaces a file; below it are the disk and the session API
(docs/write-back.md).
"""
