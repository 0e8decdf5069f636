"""Dependency layers: who reads and who writes which, and how long they are kept."""
