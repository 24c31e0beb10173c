"""Which parameter goes to which optimizer, and on which manifold.

The partition is total and disjoint: a parameter of unknown kind, or a kind that matches nothing,
is an error and never a silent default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainers.config import ModuleAssignment, RunConfig, module_weight_decay

_KINDS = (
    ("attn", re.compile(r"\.attn\.(c_attn|c_proj)\.weight$")),
    ("mlp", re.compile(r"\.mlp\.(c_fc|c_proj|w1|w2|w3)\.weight$")),
    ("embedding", re.compile(r"^(wte|wpe)\.weight$")),
    ("norm", re.compile(r"(^|\.)ln_(1|2|f)\.weight$")),
)
MATRIX_KINDS = ("attn", "mlp")


@dataclass(frozen=True, slots=True)
class NamedParameter:
    name: str
    parameter: nn.Parameter
    kind: str
    layer: int | None


def kind_of(name: str) -> str:
    """Module kind of a parameter's name: attn, mlp, embedding or norm.

    Raises:
        ValueError: no kind, or more than one, claims it.
    """
    kinds = [kind for kind, pattern in _KINDS if pattern.search(name)]
    if len(kinds) != 1:
        raise ValueError(f"parameter {name!r} belongs to {len(kinds)} kinds {kinds}, not to one")
    return kinds[0]


def classify(model: nn.Module) -> list[NamedParameter]:
    """Every parameter of the model with its kind, in the model's order.

    Raises:
        ValueError: a parameter that belongs to no kind, or a kind without parameters.
    """
    named = []
    for name, parameter in model.named_parameters():
        layer = re.match(r"h\.(\d+)\.", name)
        named.append(NamedParameter(name, parameter, kind_of(name), int(layer.group(1)) if layer else None))
    missing = {kind for kind, _ in _KINDS} - {p.kind for p in named}
    if missing:
        raise ValueError(f"no parameter of kind {', '.join(sorted(missing))}")
    return named


def optimizer_groups(
    named: list[NamedParameter], run: RunConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for `ManifoldMuon` and for AdamW; each carries `peak_lr`, the base of its schedule."""
    muon, adamw = run.optimizer.muon, run.optimizer.adamw
    muon_groups: list[dict[str, Any]] = []
    adamw_groups: list[dict[str, Any]] = []
    for kind in MATRIX_KINDS:
        module: ModuleAssignment = getattr(run.assignment, kind)
        members = [(p.name, p.parameter) for p in named if p.kind == kind]
        options: dict[str, Any] = {
            "weight_decay": module_weight_decay(module, run.optimizer),
            "manifold": module.manifold,
            "retraction": muon.retraction if module.manifold == "dgram" else None,
        }
        if module.optimizer == "muon":
            groups, peak_lr = muon_groups, muon.lr * module.lr_multiplier
            options["solver"] = muon.solver
        else:
            groups, peak_lr = adamw_groups, adamw.lr * module.lr_multiplier
        stacked = [m for m in members if m[0].endswith(".c_attn.weight") and muon.qkv != "fused"]
        whole = [m for m in members if m not in stacked]
        groups.append(_group(kind, whole, peak_lr, row_blocks=1, **options))
        if stacked:
            groups.append(_group(kind, stacked, peak_lr, row_blocks=run.qkv_blocks, **options))
    for kind, decay in (("embedding", adamw.weight_decay), ("norm", 0.0)):
        members = [(p.name, p.parameter) for p in named if p.kind == kind]
        adamw_groups.append(_group(kind, members, adamw.lr, weight_decay=decay))
    _check_partition(named, muon_groups + adamw_groups)
    return muon_groups, adamw_groups


def _group(
    kind: str, members: list[tuple[str, nn.Parameter]], peak_lr: float, **options: Any
) -> dict[str, Any]:
    return {
        "kind": kind,
        "params": [parameter for _, parameter in members],
        "names": [name for name, _ in members],
        "lr": peak_lr,
        "peak_lr": peak_lr,
        **options,
    }


def _check_partition(named: list[NamedParameter], groups: list[dict[str, Any]]) -> None:
    placed = [name for group in groups for name in group["names"]]
    if sorted(placed) != sorted(p.name for p in named):
        raise ValueError("the optimizer groups are not a partition of the parameters")
