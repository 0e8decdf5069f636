"""The small control plane: sessions, snapshots, tokens, machines, and a local stand-in for Supabase."""

__version__ = "0.1.0"
