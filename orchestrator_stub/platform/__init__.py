"""Speaks to Supabase: the database pool, Storage, tokens and their keys, migrations; hosted and local are the same
code with other URLs. Also what several rooms need of this machine: `redaction` for logs, `source_files` for a
project's files in a directory. May import `config` alone.
"""
