"""Builds a project's archive at a revision, stores it, and caches its signed URL while it is good; clears away old
archives and what deleted projects left. May import `machines`, `platform` and `config`. Promises that one revision
gives the same bytes, in every thread and process of one version of the compressor and one family of processors.
"""
