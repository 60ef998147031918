"""A small synthetic world with ground truth, so that the whole recipe can be proved on a laptop.

`World` holds what is true, `documents` writes the pretraining text, `prompts` asks,
`demonstrations` answers the way vendors would (§3.1), `rater` knows the truth. Nothing that trains
may import the rater: preferences come from `llama2.preferences.simulated`, who see it through
noise. This package imports no torch.
"""
