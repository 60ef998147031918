"""The Llama 2 recipe (arXiv 2307.09288), end to end: raw text in, a safety-aligned chat model
out."""

__version__ = "0.1.0"
