"""Rooms: several people in one file, their keys merged by a CRDT and saved as ordinary versions ([rooms.md](rooms.md)).

One orchestrator has a file's room at a time, by a lease. `state` decides and `merge` compares (both pure), `document`
holds the text (pycrdt, of the extra `collab`), `room` does what `state` says, `service` keeps the rooms of this
process, `connection` serves one browser, `store` asks the database, and `routes` lets people in.
"""
