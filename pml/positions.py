"""How many positions a model has."""

from typing import Any

__all__ = ["max_positions"]


def max_positions(config: Any) -> int | None:
    """Longest sequence in tokens that a certificate can be given for; None where the configuration names none.

    With `longrope`, longer sequences than those of the original training get other rotary factors, from their first
    token on. A target that crosses the limit would be decoded with one kind, token by token, and scored with the other.

    Args:
        config: Of a text model of transformers.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One for all layers, or one for each kind of layer.
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type", parameters.get("type")) == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
            limits.append(getattr(config, "original_max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=None)
