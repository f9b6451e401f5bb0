"""How the help of a command is laid out."""

import textwrap

import jsonargparse

__all__ = ["ParagraphFormatter"]


class ParagraphFormatter(jsonargparse.DefaultHelpFormatter):
    """Wraps a description by paragraphs; indented lines, which are examples, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(
            paragraph if paragraph.startswith("    ") else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )
