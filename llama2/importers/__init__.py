"""Public data sets as records (§3.1, §3.2.1): one table of formats, one reader of conversations."""
