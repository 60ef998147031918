"""Judging versions of a model: ground truth, reward models, win rates, Ghost Attention (§3.3, §3.4,
§4)."""
