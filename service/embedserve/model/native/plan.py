"""Which models the compiled pass computes, and where their weights are found.

Decides by architecture and shape, never by name of a checkpoint: BERT and what has its layers (RoBERTa, XLM-RoBERTa,
CamemBERT, ELECTRA, DistilBERT). Everything else runs operation by operation. Must never know a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedserve.model.native.compiler import CannotCompile
from embedserve.model.native.library import ACTIVATIONS, Plan

__all__ = ["plan_for"]

DTYPES = (torch.bfloat16, torch.float32)
WIDTH_STEP = 16
"""Outputs of the narrowest panel of weights that ``encoder.cpp`` makes."""
HEAD_MAX = 1024
"""Floats in one attention head, at most; and an even number, since bfloat16 goes in pairs."""


def plan_for(model: PreTrainedModel, architecture: str, dtype: torch.dtype) -> Plan:
    """The plan of ``model``, whose weights it may share. Raises ``CannotCompile`` with the reason for none."""
    read = _READERS.get(architecture)
    if read is None:
        raise CannotCompile(f"the compiled pass does not know the architecture {architecture!r}")
    if dtype not in DTYPES:
        raise CannotCompile(f"the compiled pass computes in bfloat16 or float32, not in {dtype}")
    plan = read(model, dtype)
    head = plan.hidden // plan.heads
    if plan.hidden % WIDTH_STEP or plan.intermediate % WIDTH_STEP or head % 2 or head > HEAD_MAX:
        raise CannotCompile(
            f"the compiled pass takes widths in steps of {WIDTH_STEP} and even heads up to {HEAD_MAX}; this model has "
            f"{plan.hidden}, {plan.intermediate} and {head}"
        )
    return plan


def _bert(model: Any, dtype: torch.dtype) -> Plan:
    config, embeddings = model.config, model.embeddings
    # What a decoder or a relative position embedding would add, the compiled pass would leave out.
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        raise CannotCompile(f"the compiled pass knows no {config.position_embedding_type} positions")
    if getattr(model, "embeddings_project", None) is not None:
        raise CannotCompile("the compiled pass knows no projection after the embeddings")
    return Plan(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate=config.intermediate_size,
        activation=_activation(config.hidden_act),
        eps=config.layer_norm_eps,
        dtype=dtype,
        words=_copy(embeddings.word_embeddings.weight, dtype),
        positions=_float(embeddings.position_embeddings.weight) + _float(embeddings.token_type_embeddings.weight[0]),
        norm=_norm(embeddings.LayerNorm),
        layers=tuple(_bert_layer(layer, dtype) for layer in model.encoder.layer),
    )


def _bert_layer(layer: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    own, attended = layer.attention.self, layer.attention.output
    return (
        *_joined((own.query, own.key, own.value), dtype),
        *_linear(attended.dense, dtype),
        *_norm(attended.LayerNorm),
        *_linear(layer.intermediate.dense, dtype),
        *_linear(layer.output.dense, dtype),
        *_norm(layer.output.LayerNorm),
    )


def _distilbert(model: Any, dtype: torch.dtype) -> Plan:
    config, embeddings = model.config, model.embeddings
    return Plan(
        hidden=config.dim,
        heads=config.n_heads,
        intermediate=config.hidden_dim,
        activation=_activation(config.activation),
        eps=embeddings.LayerNorm.eps,
        dtype=dtype,
        words=_copy(embeddings.word_embeddings.weight, dtype),
        positions=_float(embeddings.position_embeddings.weight),
        norm=_norm(embeddings.LayerNorm),
        layers=tuple(_distilbert_layer(layer, dtype) for layer in model.transformer.layer),
    )


def _distilbert_layer(layer: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    own = layer.attention
    return (
        *_joined((own.q_lin, own.k_lin, own.v_lin), dtype),
        *_linear(own.out_lin, dtype),
        *_norm(layer.sa_layer_norm),
        *_linear(layer.ffn.lin1, dtype),
        *_linear(layer.ffn.lin2, dtype),
        *_norm(layer.output_layer_norm),
    )


def _activation(name: Any) -> int:
    if name not in ACTIVATIONS:
        raise CannotCompile(f"the compiled pass knows no activation {name!r}")
    return ACTIVATIONS[name]


def _joined(linears: tuple[nn.Linear, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.cat([linear.weight for linear in linears])
    return _copy(weight, dtype), torch.cat([_linear(linear, dtype)[1] for linear in linears])


def _linear(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
    return _copy(linear.weight, dtype), _float(bias)


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return _float(norm.weight), _float(norm.bias)


def _float(tensor: Tensor) -> Tensor:
    return _copy(tensor, torch.float32)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()


_READERS: dict[str, Callable[[Any, torch.dtype], Plan]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "camembert": _bert,
    "electra": _bert,
    "distilbert": _distilbert,
}
"""By ``config.json``'s ``model_type``."""
