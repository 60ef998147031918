"""The model of the paper (§2.2): one file for the network, one for the scalar head, one for files on disk."""
