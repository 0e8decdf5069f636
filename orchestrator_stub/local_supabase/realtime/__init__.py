"""Serves Realtime as Supabase does: both serializers, row level security at each join, the limits and their words,
and faults on request. `server` takes the sockets, `hub` knows who joined what, `feed` follows the database's
messages.
"""
