"""Folds of a decoder block: exactly those of a hand-written table, and function-preserving."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.folds import Fold, discover_folds
from pytest_qlab.models.structure import decoder_blocks, quantizable_linears
from tests.architectures import ARCHITECTURES, token_ids

Table = dict[str, tuple[str, set[str]]]

_QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
_LLAMA: Table = {
    "input_layernorm": ("norm", _QKV),
    "post_attention_layernorm": ("norm", {"mlp.gate_proj", "mlp.up_proj"}),
    "mlp.up_proj": ("linear", {"mlp.down_proj"}),
}
_V_TO_O: Table = {"self_attn.v_proj": ("linear", {"self_attn.o_proj"})}
# What is right for each architecture, written by hand from its modelling code.
EXPECTED: dict[str, Table] = {
    "llama": _LLAMA,
    "llama-tied": {**_LLAMA, **_V_TO_O},
    "gpt2": {"ln_1": ("norm", {"attn.c_attn"}), "ln_2": ("norm", {"mlp.c_fc"})},
    "opt": {
        "self_attn_layer_norm": ("norm", _QKV),
        "self_attn.v_proj": ("linear", {"self_attn.out_proj"}),
        "final_layer_norm": ("norm", {"fc1"}),
        "fc1": ("linear", {"fc2"}),
    },
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": {
        "input_layernorm": ("norm", _QKV),
        "pre_feedforward_layernorm": ("norm", {"mlp.gate_proj", "mlp.up_proj"}),
        "mlp.up_proj": ("linear", {"mlp.down_proj"}),
    },
    "phi": {
        "input_layernorm": ("norm", {*_QKV, "mlp.fc1"}),
        "self_attn.v_proj": ("linear", {"self_attn.dense"}),
    },
    "falcon": {
        "input_layernorm": (
            "norm",
            {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
        )
    },
    "mixtral": {
        "input_layernorm": ("norm", _QKV),
        "post_attention_layernorm": (
            "norm",
            {
                "mlp.gate",
                *(f"mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up")),
            },
        ),
        **{
            f"mlp.experts.{e}.up_proj": ("linear", {f"mlp.experts.{e}.down_proj"}) for e in range(4)
        },
    },
}


def block_runner(model: PreTrainedModel, name: str, ids: Tensor) -> Callable[[], Tensor]:
    """Runs one block on what it is given in a forward of the model over `ids`."""
    block = model.get_submodule(name)
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append((args, kwargs))

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    args, kwargs = seen[0]

    def run() -> Tensor:
        output = block(*args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    return run


def folds_of(model: PreTrainedModel) -> dict[str, list[Fold]]:
    """The folds of every block, by the block's name."""
    found = {}
    for name, block in decoder_blocks(model):
        run = block_runner(model, name, token_ids(16))
        found[name] = discover_folds(block, run, quantizable_linears(block, name), name)
    return found


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_folds_are_those_of_the_table(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    for block, folds in folds_of(model).items():
        found = {
            fold.previous.removeprefix(f"{block}."): (
                fold.kind,
                {name.removeprefix(f"{block}.") for name in fold.layers},
            )
            for fold in folds
        }
        assert found == EXPECTED[architecture]


@pytest.mark.parametrize("architecture", EXPECTED)
def test_discovery_leaves_every_weight_as_it_was(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folds_of(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", EXPECTED)
def test_folding_random_scales_preserves_the_logits(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    ids = token_ids(32, batch=2, seed=5)
    expected = model(ids).logits
    unfuse_experts(model)
    generator = torch.Generator().manual_seed(3)
    folds = [fold for per_block in folds_of(model).values() for fold in per_block]
    for fold in folds:
        before = fold.sites[0].weight()
        scale = 0.5 + 1.5 * torch.rand(fold.channels, generator=generator)
        fold.apply(scale)
        torch.testing.assert_close(fold.sites[0].weight(), before * scale)
    difference = (model(ids).logits - expected).norm() / expected.norm()
    assert difference < 1e-4


def test_half_a_fold_changes_the_logits() -> None:
    model = ARCHITECTURES["llama"]()
    ids = token_ids(16)
    expected = model(ids).logits
    for fold in folds_of(model)["model.layers.0"]:
        values = {name: value.clone() for name, value in model.state_dict().items()}
        fold.apply_previous(torch.full((fold.channels,), 2.0))
        assert (model(ids).logits - expected).norm() > 1e-2 * expected.norm()
        model.load_state_dict(values)


class _Gated(nn.Module):
    """x + down(relu(up(norm(x)))), with a choice of what else reads the norm, and of the gain."""

    def __init__(self, *, residual_after_norm: bool = False, smooth: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        for parameter in (self.up.weight, self.down.weight):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        self.residual_after_norm = residual_after_norm
        self.smooth = smooth

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        hidden = self.up(y)
        hidden = torch.nn.functional.softplus(hidden) if self.smooth else hidden.relu()
        residual = y if self.residual_after_norm else x
        output: Tensor = residual + self.down(hidden)
        return output


def _previous(block: nn.Module, magnitude: float = 1.0) -> set[str]:
    generator = torch.Generator().manual_seed(1)
    states = magnitude * torch.randn(1, 12, 16, generator=generator)
    sites = quantizable_linears(block, "b")
    return {fold.previous for fold in discover_folds(block, lambda: block(states), sites, "b")}


def test_a_residual_taken_after_the_norm_leaves_no_norm_fold() -> None:
    assert _previous(_Gated()) == {"b.norm", "b.up"}
    assert _previous(_Gated(residual_after_norm=True)) == {"b.up"}


def test_a_smooth_nonlinearity_between_two_linears_is_no_fold() -> None:
    assert _previous(_Gated(smooth=True)) == {"b.norm"}


def test_a_large_residual_does_not_hide_a_wrong_fold() -> None:
    assert "b.up" not in _previous(_Gated(smooth=True), magnitude=1e3)
    assert "b.up" not in _previous(_Gated(smooth=True), magnitude=1e5)


def test_an_expert_that_no_token_visits_blocks_the_norm_fold() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = x + self.experts[0](self.norm(x))
            return output

    assert _previous(Mixture()) == set()


def test_all_experts_take_part_though_few_tokens_visit_few_of_them() -> None:
    model = ARCHITECTURES["mixtral"]()
    unfuse_experts(model)
    name, block = decoder_blocks(model)[0]
    run = block_runner(model, name, token_ids(1))
    folds = discover_folds(block, run, quantizable_linears(block, name), name)
    assert {fold.previous.removeprefix(f"{name}.") for fold in folds} == {*EXPECTED["mixtral"]}


def test_a_fold_whose_effect_cannot_be_seen_is_not_accepted() -> None:
    block = _Gated(smooth=True)
    block.down.weight.data.zero_()
    assert _previous(block) == set()
