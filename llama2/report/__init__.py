"""One page about a recipe: whether each stage did its job, beside the paper's own figures."""
