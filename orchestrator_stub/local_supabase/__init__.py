"""The local stand-in for Supabase: real PostgreSQL, and the endpoints our agent and the official clients use."""

from orchestrator_stub.local_supabase.app import StandIn, stand_in
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime.limits import Limits
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options

__all__ = ["Limits", "ProjectKeys", "StandIn", "stand_in", "uvicorn_options"]
