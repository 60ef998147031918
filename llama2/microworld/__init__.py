"""A small synthetic world with ground truth, so that the whole recipe can be proved on a laptop.

`World` holds what is true, `documents` writes the pretraining text, `prompts` asks,
`demonstrations` answers the way vendors would (§3.1), `rater` knows the truth, and `annotators` see
it through noise: nothing that trains learns of it in another way. This package imports no torch.
"""
