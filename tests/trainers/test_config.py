"""Identity of runs: what names them, and what must not."""

import re
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from trainers import config as config_module
from trainers import manifold
from trainers.config import RUN_ID, MuonConfig, RunConfig, run_id
from trainers.optim import UPDATE_SCALES

DIGEST = "sha256:" + "0" * 64

ARMS = {
    "unconstrained": ("none", "none"),
    "all_stiefel": ("stiefel", "stiefel"),
    "all_dgram": ("dgram", "dgram"),
    "hetero": ("stiefel", "dgram"),
    "hetero_inv": ("dgram", "stiefel"),
}


def config(**fields):
    """A run from dotted paths; attention on DGram and plain MLPs, so that most options are read."""
    data = {"data": {"digest": DIGEST}, "assignment": {"attn": {"manifold": "dgram"}, "mlp": {}}}
    for path, value in fields.items():
        *parents, last = path.split(".")
        inner = data
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return RunConfig.model_validate(data)


def digest(run):
    return run_id(run).rsplit("-", 1)[1]


# Never change these. They are the names of runs in every store that exists: a different id means
# that no finished run is found again and every grid trains from the start. If a change of meaning
# is intended, raise SCHEMA_VERSION and add new pins.
PINNED = [
    "unconstrained-s1337-19beb868",
    "all_stiefel-s1337-8972b203",
    "all_dgram-s1337-afcd32f7",
    "hetero-s1337-2348d48f",
    "hetero_inv-s1337-dff79804",
    "quick-s7-da4cd760",
]


@pytest.mark.parametrize("pinned", PINNED)
def test_pinned_ids(pinned):
    if pinned.startswith("quick"):
        fields = {
            "arm": "quick", "seed": 7, "optimizer.muon.solver": "projected", "optimizer.muon.polish": True,
            "stability.stop": True, "assignment.mlp": {"optimizer": "adamw", "lr_multiplier": 0.5},
        }  # fmt: skip
        assert run_id(config(**fields)) == pinned
    else:
        arm = pinned.split("-")[0]
        attn, mlp = ARMS[arm]
        fields = {"arm": arm, "precision": "bfloat16", "assignment.attn": attn, "assignment.mlp": mlp}
        assert run_id(config(**fields)) == pinned


# What a run means where its config says nothing. Changing a value needs a new SCHEMA_VERSION; adding
# a field needs a line here.
DEFAULTS = {
    "precision": "float32",
    "model.n_layer": 12,
    "model.n_head": 12,
    "model.d_model": 768,
    "model.context": 1024,
    "model.vocab_size": 50304,
    "model.dropout": 0.0,
    "model.family": "gpt2",
    "model.d_ff": None,
    "model.attention": "softmax",
    "model.qk_norm": False,
    "optimizer.adamw.lr": 0.0006,
    "optimizer.adamw.betas": [0.9, 0.95],
    "optimizer.adamw.weight_decay": 0.1,
    "optimizer.adamw.eps": 1e-08,
    "optimizer.muon.lr": 0.02,
    "optimizer.muon.momentum": 0.95,
    "optimizer.muon.weight_decay": 0.1,
    "optimizer.muon.solver": "dual_ascent",
    "optimizer.muon.dual_steps": 20,
    "optimizer.muon.dual_alpha": 0.1,
    "optimizer.muon.polish": False,
    "optimizer.muon.retraction": "svd_sorted",
    "optimizer.muon.dual_impl": "published",
    "optimizer.muon.exact_steps": None,
    "optimizer.muon.cg_steps": 16,
    "optimizer.muon.qkv": "fused",
    "optimizer.muon.update_scale": "unit",
    "optimizer.muon.msign": "polar_express",
    "optimizer.muon.msign_steps": None,  # was 10, which is what it means for polar_express
    "optimizer.muon.msign_dtype": None,
    "optimizer.grad_clip": 1.0,
    "assignment.attn.manifold": "none",
    "assignment.attn.optimizer": "muon",
    "assignment.attn.lr_multiplier": 1.0,
    "assignment.attn.weight_decay": None,
    "assignment.mlp.manifold": "none",
    "assignment.mlp.optimizer": "muon",
    "assignment.mlp.lr_multiplier": 1.0,
    "assignment.mlp.weight_decay": None,
    "schedule.steps": 50000,
    "schedule.warmup_steps": 1000,
    "schedule.min_lr_ratio": 0.1,
    "schedule.batch_size": 64,
    "evaluation.every": 1000,
    "evaluation.batches": 200,
    "stability.stop": False,
    "stability.style": "scale_free",
    "stability.spike_after": 0.1,
    "stability.spike_loss": 5.0,
    "stability.spike_rise": 1.0,
}


def test_defaults_never_change():
    """Ids leave defaults out, so a default that changes would give an old id to other numbers."""
    values = {path: default_at(path) for path in sorted(SCIENCE) if path not in ("seed", "data.digest")}
    assert values == DEFAULTS


def default_at(path):
    value = RunConfig().model_dump(mode="json")
    for key in path.split("."):
        value = value[key]
    return value


def test_ids_have_their_form():
    assert all(RUN_ID.match(pinned) for pinned in PINNED)
    assert re.fullmatch(r"x-s0-[0-9a-f]{8}", run_id(config(arm="x", seed=0)))


# --- every field is classified ------------------------------------------------------------------

TEXT_FILE = {"data.source": "text", "data.path": "a.txt"}
HUB = {"data.source": "hf", "data.dataset": "a/b", "data.revision": "1"}
STOP = {"stability.stop": True}
EXACT = {"optimizer.muon.solver": "exact"}

# Path: (another value, the setting in which it is read). Changing it is another run.
SCIENCE = {
    "seed": (7, {}),
    "precision": ("bfloat16", {}),
    "model.n_layer": (2, {}),
    "model.n_head": (6, {}),
    "model.d_model": (384, {}),
    "model.context": (64, {}),
    "model.vocab_size": (512, {}),
    "model.dropout": (0.1, {}),
    "model.family": ("llama", {}),
    "model.d_ff": (1024, {}),
    "model.attention": ("sigmoid", {}),
    "model.qk_norm": (True, {}),
    "data.digest": ("sha256:" + "1" * 64, {}),
    "optimizer.adamw.lr": (1e-3, {}),
    "optimizer.adamw.betas": ((0.9, 0.99), {}),
    "optimizer.adamw.weight_decay": (0.0, {}),
    "optimizer.adamw.eps": (1e-6, {}),
    "optimizer.muon.lr": (0.3, {}),
    "optimizer.muon.momentum": (0.9, {}),
    "optimizer.muon.weight_decay": (0.0, {}),
    "optimizer.muon.solver": ("projected", {}),
    "optimizer.muon.dual_steps": (10, {}),
    "optimizer.muon.dual_alpha": (0.2, {}),
    "optimizer.muon.polish": (True, {"optimizer.muon.solver": "projected"}),
    "optimizer.muon.retraction": ("column_norm", {}),
    "optimizer.muon.dual_impl": ("reduced", {}),
    "optimizer.muon.exact_steps": (4, EXACT),
    "optimizer.muon.cg_steps": (8, EXACT),
    "optimizer.muon.qkv": ("split", {}),
    "optimizer.muon.update_scale": ("rows_over_cols", {}),
    "optimizer.muon.msign": ("gram", {}),
    "optimizer.muon.msign_steps": (8, {}),
    "optimizer.muon.msign_dtype": ("bfloat16", {}),
    "optimizer.grad_clip": (2.0, {}),
    "assignment.attn.manifold": ("stiefel", {}),
    "assignment.attn.optimizer": ("adamw", {"assignment.attn.manifold": "none"}),
    "assignment.attn.lr_multiplier": (0.5, {}),
    "assignment.attn.weight_decay": (0.3, {}),
    "assignment.mlp.manifold": ("stiefel", {}),
    "assignment.mlp.optimizer": ("adamw", {}),
    "assignment.mlp.lr_multiplier": (0.5, {}),
    "assignment.mlp.weight_decay": (0.3, {}),
    "schedule.steps": (60_000, {}),
    "schedule.warmup_steps": (10, {}),
    "schedule.min_lr_ratio": (0.0, {}),
    "schedule.batch_size": (32, {}),
    "evaluation.every": (500, {}),
    "evaluation.batches": (20, {}),
    "stability.stop": (True, {}),
    "stability.style": ("paper", STOP),
    "stability.spike_after": (0.2, STOP),
    "stability.spike_loss": (6.0, {**STOP, "stability.style": "paper"}),
    "stability.spike_rise": (2.0, STOP),
}

# Changing it is the same run. The data counts by its digest alone.
INFRASTRUCTURE = {
    "arm": ("other", {}),
    "stability.drift_window": (0.2, STOP),
    "stability.drift_rise": (0.2, STOP),
    "stability.recovery_rise": (0.1, STOP),
    "stability.recovery_by": (0.9, STOP),
    "data.source": ("bin", TEXT_FILE),
    "data.path": ("b.txt", TEXT_FILE),
    "data.dataset": ("c/d", HUB),
    "data.revision": ("2", HUB),
    "data.subset": ("sample-10BT", HUB),
    "data.rows": (100, HUB),
    "data.text_column": ("body", {}),
    "data.tokenizer": ("gpt2", {}),
    "data.val_fraction": (0.2, {}),
    "probes.spectra": (False, {}),
    "probes.updates": (False, {}),
    "probes.updates_every": (5, {}),
    "probes.heads": (False, {}),
    "probes.attention": (False, {}),
    "probes.attention_every": (5, {}),
    "probes.flow": (False, {}),
    "probes.flow_every": (5, {}),
    "probes.costs": (False, {}),
    "probes.costs_every": (5, {}),
    "probes.sequences": (4, {}),
    "runtime.activation_checkpointing": (True, {}),
    "runtime.fetch_every": (5, {}),
    "runtime.slots": (4, {}),
    "runtime.device": ("cpu", {}),
    "runtime.micro_batch": (4, {}),
    "runtime.compile": (True, {}),
    "runtime.threads": (2, {}),
    "runtime.checkpoint_every": (10, {}),
    "runtime.keep_checkpoints": (3, {}),
    "runtime.part_seconds": (1.0, {}),
}


def leaves(model, prefix=""):
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


ALL = list(leaves(RunConfig))


@pytest.mark.parametrize("path", ALL)
def test_every_field_is_classified_once(path):
    """A new field belongs in one of the tables above: does it change a run's numbers or not?"""
    assert sum(path in table for table in (SCIENCE, INFRASTRUCTURE)) == 1


def test_no_field_is_classified_that_is_gone():
    assert {*SCIENCE, *INFRASTRUCTURE} <= set(ALL)


@pytest.mark.parametrize("path", SCIENCE)
def test_science_changes_the_hash(path):
    value, setting = SCIENCE[path]
    assert digest(config(**{**setting, path: value})) != digest(config(**setting))


@pytest.mark.parametrize("path", INFRASTRUCTURE)
def test_infrastructure_keeps_the_hash(path):
    value, setting = INFRASTRUCTURE[path]
    changed, same = config(**{**setting, path: value}), config(**setting)
    assert changed != same
    assert digest(changed) == digest(same)


# --- options that a run never reads -------------------------------------------------------------

PLAIN = {"assignment.attn.manifold": "none"}
STIEFEL = {"assignment.attn.manifold": "stiefel"}
ADAMW = {"assignment.attn": {"optimizer": "adamw"}, "assignment.mlp": {"optimizer": "adamw"}}
BOTH = {"assignment.mlp.manifold": "stiefel"}
PROJECTED = {"optimizer.muon.solver": "projected"}


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        (PLAIN, "optimizer.muon.solver", "projected"),
        (PLAIN, "optimizer.muon.dual_steps", 5),
        (PLAIN, "optimizer.muon.retraction", "column_norm"),
        (STIEFEL, "optimizer.muon.retraction", "column_norm"),
        (ADAMW, "optimizer.muon.lr", 0.5),
        (BOTH, "optimizer.muon.weight_decay", 0.5),
        ({}, "optimizer.muon.polish", True),
        (PROJECTED, "optimizer.muon.dual_steps", 5),
        (PROJECTED, "optimizer.muon.dual_alpha", 0.5),
        (PROJECTED, "optimizer.muon.dual_impl", "reduced"),
        ({}, "optimizer.muon.exact_steps", 4),
        (PROJECTED, "optimizer.muon.cg_steps", 4),
        ({"assignment.attn": {"optimizer": "adamw"}}, "optimizer.muon.qkv", "split"),
        ({}, "optimizer.muon.msign_dtype", "float32"),
        ({}, "optimizer.muon.msign_steps", 10),
        ({"optimizer.muon.msign": "gram"}, "optimizer.muon.msign_steps", 8),
        ({}, "assignment.attn.weight_decay", 0.0),
        ({}, "stability.spike_rise", 3.0),
    ],
)
def test_an_option_that_is_never_read_keeps_the_hash(setting, path, value):
    changed = config(**{**setting, path: value})
    assert changed != config(**setting)
    assert digest(changed) == digest(config(**setting))


@pytest.mark.parametrize(
    ("manifold", "path", "value"),
    [("dgram", "optimizer.muon.retraction", "column_norm"), ("stiefel", "optimizer.muon.qkv", "split")],
)
def test_a_manifold_under_adamw_reads_how_its_weights_return(manifold, path, value):
    setting = {f"assignment.{kind}": {"optimizer": "adamw", "manifold": manifold} for kind in ("attn", "mlp")}
    assert digest(config(**{**setting, path: value})) != digest(config(**setting))
    unread = {**setting, "optimizer.muon.solver": "exact", "optimizer.muon.lr": 0.5}
    assert digest(config(**unread)) == digest(config(**setting))


def test_an_unknown_digest_has_no_id():
    with pytest.raises(ValueError, match="digest"):
        run_id(RunConfig())


def test_whole_numbers_and_reals_are_one_value():
    assert run_id(config(**{"optimizer.grad_clip": 1})) == run_id(config(**{"optimizer.grad_clip": 1.0}))


@pytest.mark.parametrize("arm", ["", "A", "a/b", "..", "a..b", "-a", ".a", "a b", "a" * 65, "a\n"])
def test_arms_are_safe_names(arm):
    with pytest.raises(ValidationError):
        RunConfig(arm=arm)


def test_defaults_are_the_papers_preset():
    run = RunConfig()
    assert run.tokens_per_step == 65_536
    assert (run.schedule.steps, run.schedule.warmup_steps, run.schedule.min_lr_ratio) == (50_000, 1_000, 0.1)
    assert (run.optimizer.adamw.lr, run.optimizer.muon.lr) == (6e-4, 0.02)


@pytest.mark.parametrize(
    ("allowed", "known"),
    [
        (config_module.ManifoldName, manifold.MANIFOLDS),
        (config_module.SolverName, manifold.SOLVERS),
        (config_module.MsignName, manifold.METHODS),
        (config_module.DgramRetraction, manifold.RETRACTIONS["dgram"]),
        (MuonConfig.model_fields["dual_impl"].annotation, manifold.DUAL_IMPLS),
        (MuonConfig.model_fields["update_scale"].annotation, UPDATE_SCALES),
    ],
)
def test_the_schema_knows_what_the_optimizer_knows(allowed, known):
    """The schema is free of torch and so writes the names again."""
    assert set(get_args(allowed)) == set(known)
