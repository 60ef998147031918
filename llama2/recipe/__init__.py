"""Run steps: the table of verbs, one command, a whole recipe, and what either would cost."""
