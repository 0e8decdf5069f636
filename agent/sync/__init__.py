"""Keeps the directory equal to the database: the one loop in which the tree changes, its questions to the
session API, its ledger, and its watch for changes that others make. May import every room but `health`,
`replay` and `cli`. Promises that the ledger may lag behind the disk and never leads it.
"""
