"""Stands in for Supabase on a laptop: real PostgreSQL, and the REST, Realtime and Storage endpoints that the agent
and the official clients use. `app.stand_in` gives their routes. Imports `platform` alone; production imports none of
it.
"""
