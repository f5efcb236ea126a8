"""Same text, sooner: lossless speculative decoding with drafters trained by CTC."""

__version__ = "0.1.0"
