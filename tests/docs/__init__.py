"""The documents say what the code does: their commands are run, their names exist, their tables are the code's."""
