"""The model of the paper (§2.2): the network, the scalar head, keys and values, likelihoods."""
