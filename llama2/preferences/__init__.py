"""Comparisons of two answers (§3.2.1): who makes them and how they are kept."""
