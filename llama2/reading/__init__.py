"""Data files as rows; `files` is the way in."""
