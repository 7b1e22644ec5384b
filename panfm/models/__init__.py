"""Tokenizers, backbone, heads: any subset of streams in, one embedding out."""

from panfm.models.pan import PanModel, build_model, describe_model

__all__ = ["PanModel", "build_model", "describe_model"]
