"""Builds a project's archive at a revision, stores it, and keeps the signed URL while it is good. May import
`platform` and `config`. Promises that the same revision gives the same bytes.
"""
