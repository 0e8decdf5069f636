"""Speaks to Supabase: the database pool, Storage, tokens and their keys, migrations. Hosted and local are the
same code with other URLs. May import `config` alone.
"""
