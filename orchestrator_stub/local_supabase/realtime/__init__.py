"""The local Realtime server: both serializers, authorization by row level security, faults on request."""
