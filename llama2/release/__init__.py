"""A model with the papers that a responsible release needs (§5.3, appendix A.7)."""
