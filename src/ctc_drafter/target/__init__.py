"""The frozen Hugging Face model: `Target`, and what its passes are made of."""

from .model import CHUNK, EMBEDDED, LAST, Target, stop_ids

__all__ = ["CHUNK", "EMBEDDED", "LAST", "Target", "stop_ids"]
