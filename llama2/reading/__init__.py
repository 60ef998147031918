"""How the bytes of a data file become rows; `files` is the way in."""
