"""C++ for the processor: what builds and loads it, and the operations of the network that it
replaces."""
