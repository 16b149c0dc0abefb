"""What other libraries can use of perilune by name; each is imported only when it is asked for."""

from perilune.integrations.transformers import register_moba

__all__ = ["register_moba"]
