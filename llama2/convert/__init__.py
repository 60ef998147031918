"""Checkpoints in and out: import any format, export to it, verify that two are the same model."""
