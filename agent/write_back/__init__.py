"""What a tool in the container made, given back to the project: seen, put on record, offered, answered.

`states` decides (pure), `flow` does it, `watch` sees, `store` keeps what is on its way, `pace` waits, `wire` writes and
reads what travels. The loop above asks it before it replaces a file; below it are the disk and the session API
(docs/write-back.md).
"""
