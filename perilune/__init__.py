"""perilune: Moonshot AI's published systems, end to end, as one library and one command line."""

__version__ = "0.1.0"
