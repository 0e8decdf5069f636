"""What production runs: `control_plane` puts one control plane together, `processes` serves it, the door alone or the
relay alone until they are told to stop. May import every room but the stand-in for Supabase, `dev` and `doctor`.
"""
