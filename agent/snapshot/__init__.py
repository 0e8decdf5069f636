"""Turns a signed URL into a verified tree in staging. `download` fetches and retries, `unpack` writes,
`zip_reader` and `zip_format` read the archive without I/O. May import `fs`, `session_api` and what is below
them. Promises that a snapshot is taken whole or refused whole: nothing of a refused one reaches the project.
"""
