"""`preview-orchestrator doctor`: asks everything that `serve` will stand on, and says what is right and what is not.

One module for each neighbour (database, Supabase's services, machines and whoever reaches us), each a list of findings.
Nothing is changed but one object of a few bytes, stored and removed again. Imports the rooms below; only the command
imports it.
"""
