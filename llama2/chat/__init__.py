"""Talk to a checkpoint in the terminal (appendix A.7)."""
