"""Measures what a number of sessions costs an orchestrator and its database: `make capacity SESSIONS=100000`.

Light sessions, the agent's own link and session client without a disk, are held at several sizes and at real rates
against a real orchestrator, the stand-in and PostgreSQL. What each part needs for one session more is measured with its
interval, and carried on to the size that was asked for: processor time, bytes of the database's log and memory, never
the time that something takes. What does not grow in a straight line is said and not carried on.
"""
