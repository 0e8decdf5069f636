"""Several databases, each with orchestrators of its own: which of them has a project, and what the others answer.

`placement` reads it from an id (pure); `misdirected` answers what is asked of the wrong one. It stands on `http`;
the server puts it in front of its routes, the doctor asks the others. A deployment of one database has no use for it.
"""
