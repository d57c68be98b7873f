"""Frozen prefixes: the embedding and the first layers stay as they are, and cost no backward pass."""

from __future__ import annotations

from posttrain.core import ModelError
from posttrain.models.decoder import Decoder


def freeze_layers(model: Decoder, num_layers: int) -> Decoder:
    """Freeze the embedding, learned positions and the first layers, in place. Where the output head is the embedding,
    it is frozen too.

    Args:
        model: the decoder. Weights above the prefix are left as they are, learning or not.
        num_layers: how many, counted from the embedding up; 0 freezes the embedding alone.

    Raises:
        ModelError: the model has fewer layers.
    """
    if not 0 <= num_layers <= len(model.layers):
        raise ModelError(f"cannot freeze {num_layers} layers of a model that has {len(model.layers)}")
    model.embed.requires_grad_(False)
    if model.positions is not None:
        model.positions.requires_grad_(False)
    for layer in model.layers[:num_layers]:
        layer.requires_grad_(False)
    return model
