"""decoupled: train deep networks without the global backward lock. An algorithm zoo on one asynchronous runtime.

Pick a method by name (`methods()`, `card(name)`), train with `Trainer`, compare with the `decoupled` command.
"""

from decoupled import methods as _folder  # noqa: F401 - bound first, or loading it would replace the function `methods`
from decoupled.errors import OperationError, UserError
from decoupled.partition import split
from decoupled.registry import card, methods
from decoupled.trainer import Trainer

__version__ = "0.1.0"

__all__ = ["OperationError", "Trainer", "UserError", "card", "methods", "split"]
