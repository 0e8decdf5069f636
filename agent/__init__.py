"""The daemon in the preview container: keeps a directory equal to the database's current tree."""

__version__ = "0.1.0"
