"""Layout of a command's help."""

import textwrap

import jsonargparse

__all__ = ["ParagraphFormatter"]


class ParagraphFormatter(jsonargparse.DefaultHelpFormatter):
    """Wraps a description paragraph by paragraph; indented paragraphs, which hold examples, keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(
            paragraph if paragraph.startswith("    ") else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )
