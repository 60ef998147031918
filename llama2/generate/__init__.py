"""The one engine (§3.2.3, §3.4): token ids or conversations in, samples with log-probabilities out;
and scores."""
