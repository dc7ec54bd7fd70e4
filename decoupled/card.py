"""Cards: what a reader wants to know of a method; what can be generated comes from the method itself.

A card is `<method>.md` beside the method's module, with the headings of `HEADINGS` in this order; under a generated
heading the file may add words, the facts come from the code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from decoupled.method import Described
from decoupled.specs import positive

HEADINGS = (
    "In one sentence", "Paper", "Flow", "Equations", "What is truncated", "Staleness", "Memory", "Bytes",
    "Locks removed", "Requires", "When to use, when not", "Differences from the paper", "Results",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """The card of one method.

    Attributes:
        name, family: of the method.
        text: the markdown as written.
        method: the method, with its default options where nothing else was asked for.
        options: its options with their values.
    """

    name: str
    family: str
    text: str
    method: Described
    options: dict[str, Any]

    @property
    def sections(self) -> dict[str, str]:
        """Text under each heading, as written."""
        parts = re.split(r"^## (.+)$", self.text, flags=re.MULTILINE)
        return {heading.strip(): body.strip() for heading, body in zip(parts[1::2], parts[2::2], strict=True)}

    @property
    def summary(self) -> str:
        """The one sentence."""
        return self.sections.get("In one sentence", "")

    def facts(self, K: int = 4) -> dict[str, Any]:
        """The facts of the method for `K` blocks, at least 1, as plain data."""
        positive("facts", K=K)
        return {"family": self.family, "options": self.options, **self.method.describe(K)}

    def render(self, K: int = 4) -> str:
        """The card as markdown, with the generated facts for `K` blocks at its end."""
        lines = [f"- {key}: {value}" for key, value in self.facts(K).items()]
        return f"{self.text.rstrip()}\n\n## Generated from the code ({K} blocks)\n\n" + "\n".join(lines) + "\n"
