"""The number of positions that a model supports."""

from typing import Any

__all__ = ["max_positions"]


def max_positions(config: Any) -> int | None:
    """Longest sequence, in tokens, that a certificate can cover; None if the configuration sets no limit.

    With `longrope`, sequences longer than those of the original training get other rotary factors for all their tokens.
    A target that crosses that length would be decoded with one set of factors and scored with the other.

    Args:
        config: Configuration of a text model of transformers.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # The parameters apply to all layers, or are nested by kind of layer.
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type", parameters.get("type")) == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
            limits.append(getattr(config, "original_max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=None)
