"""C++ for the processor: what builds and loads it, and `install`, which lets it compute parts of a
network."""

from llama2.kernels.modules import install, is_known

__all__ = ["install", "is_known"]
