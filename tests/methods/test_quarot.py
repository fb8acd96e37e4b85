"""Rotated blocks compute what they did; spikes spread; what cannot be rotated is refused."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pytest_qlab import Method
from pytest_qlab.errors import MethodError
from pytest_qlab.hadamard import hadamard_matrix, random_signs
from pytest_qlab.methods.blocks import BlockContext
from pytest_qlab.methods.composed import Composed
from pytest_qlab.methods.identity import Identity
from pytest_qlab.methods.pipeline import Pass, quantize_model
from pytest_qlab.methods.preprocessing import Preprocessing
from pytest_qlab.methods.quarot import QuaRot
from pytest_qlab.methods.rtn import Rtn
from pytest_qlab.models.experts import unfuse_experts
from pytest_qlab.models.rotation import attach
from pytest_qlab.models.structure import all_linears, decoder_blocks, quantizable_linears
from pytest_qlab.solvers.grid import GridRule, fake_quantize
from tests.architectures import ARCHITECTURES, SHAPE, build, llama, token_ids

# Every block of them can be rotated.
ROTATABLE = ["llama", "llama-tied", "qwen2", "qwen3", "gemma", "mixtral"]


class ExactNorm(nn.Module):
    """RMSNorm in the type of its inputs; transformers' compute in float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps
        self.one_plus = type(norm).__name__.startswith("Gemma")

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight if self.one_plus else self.weight
        scaled: Tensor = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * weight
        return scaled


def built(architecture: str) -> Any:
    model = ARCHITECTURES[architecture]()
    unfuse_experts(model)
    return model


def exact(model: Any) -> Any:
    """The model in float64, its norms too."""
    model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, ExactNorm(module))
    return model


def rotated(model: Any, **options: Any) -> tuple[Any, list[BlockContext]]:
    """A copy of a model with every block rotated by hand, nothing quantized, in its own dtype."""
    method = Composed(preprocessings=(QuaRot(**options),), method=Identity())
    work = Pass(copy.deepcopy(model), method, (), None, 1, lambda line: None)
    contexts = []
    for index, (name, block) in enumerate(work.blocks):
        context = work._context(index, name, block)
        method.transform_block(context)
        contexts.append(context)
    for context in contexts:
        assert context.rotation is not None
        assert context.module is not None
        attach(context.module, context.rotation, first=context.index == 0, last=context.last)
    return work.model, contexts


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=token_ids(24), use_cache=False).logits
    return found


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("architecture", ROTATABLE)
def test_the_model_computes_the_same(architecture: str, heads: bool) -> None:
    model = exact(built(architecture))
    before = {name: each.clone() for name, each in model.named_parameters()}
    work, _ = rotated(model, heads=heads)
    expected, found = logits(model), logits(work)
    # Mixtral's router makes probabilities in float32.
    limit = 1e-6 if architecture == "mixtral" else 1e-10
    assert float((found - expected).norm() / expected.norm()) < limit
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    # Outside of the blocks nothing has changed, inside everything that is a matrix.
    inside = {name for name, _ in decoder_blocks(work)}
    for name, parameter in work.named_parameters():
        same = torch.equal(parameter, before[name])
        if not any(name.startswith(f"{block}.") for block in inside):
            assert same, name
        elif parameter.dim() == 2:
            assert not same, name


@pytest.mark.parametrize("architecture", ROTATABLE)
def test_hidden_states_between_blocks_are_rotated(architecture: str) -> None:
    """x becomes x diag(signs) H^T / sqrt(n) behind the first block; norms have no weights left."""
    model = exact(built(architecture))
    work, _ = rotated(model, seed=5)
    states = []
    for each in (model, work):
        kept: list[Tensor] = []
        block = decoder_blocks(each)[0][1]

        def keep(_: nn.Module, __: Any, output: Any, kept: list[Tensor] = kept) -> None:
            kept.append(output if isinstance(output, Tensor) else output[0])

        block.register_forward_hook(keep)
        logits(each)
        states.append(kept[0])
    hadamard = hadamard_matrix(32)
    assert hadamard is not None
    matrix = torch.diag(random_signs(32, 5)) @ hadamard.T / 32**0.5
    torch.testing.assert_close(states[1], states[0] @ matrix, atol=1e-10, rtol=0)
    for _, block in decoder_blocks(work):
        for name, module in block.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.shape == (32,):
                ones = weight + 1 if architecture == "gemma" else weight
                assert bool((ones == 1).all()), name


def test_values_are_rotated_head_by_head_with_shared_heads() -> None:
    """Two key-value heads for four heads; every head's values by the same matrix."""
    model = exact(built("llama"))
    work, contexts = rotated(model, seed=3)
    hadamard = hadamard_matrix(8)
    assert hadamard is not None
    head, signs = (hadamard.T / 8**0.5).contiguous(), random_signs(32, 3)
    stream = hadamard_matrix(32)
    assert stream is not None
    q = torch.diag(signs) @ stream.T / 32**0.5
    for before, after in zip(model.model.layers, work.model.layers, strict=True):
        norm = torch.diag(before.input_layernorm.weight)
        values = (
            torch.kron(torch.eye(2).double(), head).T @ before.self_attn.v_proj.weight @ norm @ q
        )
        torch.testing.assert_close(after.self_attn.v_proj.weight, values, atol=1e-12, rtol=0)
        output = q.T @ before.self_attn.o_proj.weight @ torch.kron(torch.eye(4).double(), head)
        torch.testing.assert_close(after.self_attn.o_proj.weight, output, atol=1e-12, rtol=0)
        down = q.T @ before.mlp.down_proj.weight
        torch.testing.assert_close(after.mlp.down_proj.weight, down, atol=1e-12, rtol=0)
        keys = before.self_attn.k_proj.weight @ norm @ q
        torch.testing.assert_close(after.self_attn.k_proj.weight, keys, atol=1e-12, rtol=0)
    assert all(layer.rotation is not None for each in contexts for layer in each.layers)


@pytest.mark.parametrize("architecture", ROTATABLE)
def test_heads_are_found_in_every_block(architecture: str) -> None:
    for heads in (True, False):
        _, contexts = rotated(built(architecture), heads=heads)
        for context in contexts:
            both = [
                layer.name.rpartition(".")[2]
                for layer in context.layers
                if layer.rotation and layer.rotation.inputs and layer.rotation.outputs
            ]
            assert both == (["v_proj", "o_proj"] if heads else [])


def test_seeds_make_other_weights_of_the_same_model() -> None:
    model = exact(built("llama"))
    (first, _), (again, _), (other, _) = (rotated(model, seed=seed) for seed in (0, 0, 1))
    one, same, another = (each.model.layers[0].mlp.up_proj.weight for each in (first, again, other))
    assert torch.equal(one, same)
    assert not torch.allclose(one, another)
    torch.testing.assert_close(logits(other), logits(first), atol=1e-9, rtol=0)


def test_widths_without_a_hadamard_matrix_are_rotated_too() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=18,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
    )
    model = exact(LlamaForCausalLM(config).train(False))
    work, contexts = rotated(model)
    assert contexts[0].rotation is not None
    assert not contexts[0].rotation.hadamard
    expected = logits(model)
    assert float((logits(work) - expected).norm() / expected.norm()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_other_types_compute_the_same_but_for_rounding(
    architecture: str, dtype: torch.dtype
) -> None:
    model = built(architecture).to(dtype)
    work, _ = rotated(model)
    expected = logits(built(architecture).to(dtype).double())
    own = float((logits(model).double() - expected).norm() / expected.norm())
    found = float((logits(work).double() - expected).norm() / expected.norm())
    if architecture == "llama":  # A mixture may route a token elsewhere.
        assert found < 5 * own + 1e-6
    else:
        assert found < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [30.0, 1e4])
@pytest.mark.parametrize("architecture", ROTATABLE)
def test_outliers_of_the_stream_hide_nothing(
    architecture: str, factor: float, dtype: torch.dtype
) -> None:
    """What a block adds may be little beside what is in the stream already."""
    model = built(architecture)
    model.model.embed_tokens.weight[:, 7] *= factor
    work, contexts = rotated(model.to(dtype))
    for context in contexts:
        names = [each.name for each in context.layers if each.rotation is None]
        assert names == []
        heads = [
            each.name.rpartition(".")[2]
            for each in context.layers
            if each.rotation and each.rotation.inputs and each.rotation.outputs
        ]
        assert heads == ["v_proj", "o_proj"]
    if dtype == torch.float32:
        expected = logits(model)
        assert float((logits(work) - expected).norm() / expected.norm()) < 1e-5


def _olmoe() -> Any:
    """Norms of all queries and of all keys at once."""
    return build(OlmoeForCausalLM, OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2), 1)


def _one_head() -> Any:
    """Norms of queries and keys of a single head as wide as the hidden state."""
    one = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    return build(Qwen3ForCausalLM, Qwen3Config(**{**SHAPE, **one}), 2)


@pytest.mark.parametrize("make", [_olmoe, _one_head])
def test_norms_of_queries_as_wide_as_the_stream_stay_as_they_are(make: Any) -> None:
    model = make()
    unfuse_experts(model)
    model = exact(model)
    work, contexts = rotated(model)
    expected, found = logits(model), logits(work)
    # The router makes probabilities in float32.
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    for context in contexts:
        norm = f"{context.name}.self_attn.q_norm.weight"
        assert torch.equal(work.get_parameter(norm), model.get_parameter(norm))
        assert work.get_parameter(norm).shape == (32,)


# What cannot be rotated


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gpt2", "adds a bias, as LayerNorm does"),
        ("opt", "adds a bias, as LayerNorm does"),
        ("phi", "adds a bias, as LayerNorm does"),
        ("falcon", "adds a bias, as LayerNorm does"),
        ("gemma2", "post_attention_layernorm puts out does not go into linear layers alone"),
    ],
)
def test_architectures_that_cannot_be_rotated_are_refused(architecture: str, reason: str) -> None:
    with pytest.raises(MethodError, match=f"cannot rotate block 0.*{reason}.*without quarot"):
        rotated(built(architecture))


def test_a_norm_that_subtracts_the_mean_is_refused_without_a_bias() -> None:
    model = built("llama")
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = nn.LayerNorm(32, bias=False)
            norm.weight.data.copy_(getattr(layer, name).weight)
            setattr(layer, name, norm.requires_grad_(False))
    with pytest.raises(MethodError, match="input_layernorm does not commute with rotations"):
        rotated(model)


class Clipped(nn.Module):
    """A block that works on single channels of the residual stream."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self.block(hidden, *args, **kwargs)
        return found + 0.01 * hidden.relu()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def test_a_block_that_does_something_else_to_its_states_is_refused() -> None:
    model = built("llama")
    model.model.layers[1] = Clipped(model.model.layers[1])
    with pytest.raises(MethodError, match=r"block 1: on rotated hidden states.*off by"):
        rotated(model)


def test_a_block_without_norms_is_refused() -> None:
    model = built("llama")
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    with pytest.raises(MethodError, match="no norm in it is read by linear layers alone"):
        rotated(model)


def test_channels_of_a_rotated_layer_are_not_scaled() -> None:
    class Late(Preprocessing):
        name: ClassVar[str] = "late"
        summary: ClassVar[str] = "scales after the rotation"

        def transform_block(self, block: BlockContext) -> None:
            for fold in block.folds:
                fold.apply(torch.full((fold.fold.channels,), 2.0))

    method = Composed(preprocessings=(QuaRot(), Late()), method=Identity())
    with pytest.raises(MethodError, match=r"_proj is rotated already.*in front of the rotation"):
        quantize_model(built("llama"), method, (), None)


# What it is for


def spiky(seed: int = 0) -> Any:
    """A Llama some of whose residual channels are read and written by far larger weights."""
    model = llama(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, [3, 17]] *= 12
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight[:, [5]] *= 15
    return model


def kurtosis(weight: Tensor) -> float:
    centred = weight.double() - weight.double().mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean() ** 2)


def test_spikes_of_the_weights_spread() -> None:
    model = spiky()
    work, _ = rotated(model, seed=0)
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for before, after in zip(all_linears(model), all_linears(work), strict=True):
        if not before.name.endswith(readers):
            continue
        old, new = before.weight(), after.weight()
        assert kurtosis(new) < 0.5 * kurtosis(old)
        peaks = [float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean()) for w in (old, new)]
        assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounding_of_whole_rows_hurts_less_on_rotated_spikes(seed: int) -> None:
    model = spiky(seed)
    expected = logits(model)

    def damage(work: Any) -> float:
        with torch.no_grad():
            for site in all_linears(work):
                site.set_weight(fake_quantize(site.weight(), GridRule(4), -1))
        return float((logits(work) - expected).norm() / expected.norm())

    plain, turned = damage(copy.deepcopy(model)), damage(rotated(model, seed=seed)[0])
    assert turned < 0.8 * plain


# In the pipeline


def test_what_is_recorded_and_changed() -> None:
    model = built("mixtral")
    method: Method = Composed(preprocessings=(QuaRot(seed=2),), method=Rtn(group_size=-1))
    found = quantize_model(model, method, (), None)
    assert found.rotation is not None
    assert (found.rotation.width, found.rotation.seed) == (32, 2)
    assert set(found.rotations) == set(found.layers)
    work, _ = rotated(model, seed=2)
    for site in all_linears(work):
        expected = fake_quantize(site.weight(), GridRule(4), -1)
        assert torch.equal(found.layers[site.name].weight.dequantize(), expected), site.name
    routers = [name for name in found.changed if ".gate." in name]
    assert len(routers) == 2
    norms = [name for name in found.changed if name.endswith("layernorm.weight")]
    assert len(norms) == 4
    assert len(found.changed) == 6
    for name, value in found.changed.items():
        assert torch.equal(value, work.get_parameter(name)), name


def test_scales_behind_norms_are_undone() -> None:
    """What a column was multiplied by in all is the norm's weight, so nothing is left of them."""
    model = built("llama")

    class Twos(Preprocessing):
        name: ClassVar[str] = "twos"
        summary: ClassVar[str] = "scales by powers of two"

        def transform_block(self, block: BlockContext) -> None:
            for fold in block.folds:
                if fold.fold.kind == "norm":
                    fold.apply(torch.exp2(torch.arange(fold.fold.channels) % 3))

    method = Composed(preprocessings=(Twos(), QuaRot()), method=Identity())
    found = quantize_model(model, method, (), None)
    alone = quantize_model(model, Composed(preprocessings=(QuaRot(),), method=Identity()), (), None)
    for name, block in decoder_blocks(model):
        for site in quantizable_linears(block, name):
            ours, theirs = found.layers[site.name].weight, alone.layers[site.name].weight
            torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), atol=1e-6, rtol=0)
            scales = found.scales.get(site.name, {})
            assert set(scales) == set(alone.scales.get(site.name, {}))
            if scales:
                torch.testing.assert_close(scales["column"], alone.scales[site.name]["column"])


def test_a_channel_that_a_norm_mutes_stays_muted() -> None:
    model = exact(built("llama"))
    model.model.layers[0].input_layernorm.weight[4] = 0
    work, contexts = rotated(model)
    expected = logits(model)
    assert float((logits(work) - expected).norm() / expected.norm()) < 1e-10
    column = contexts[0].layers[0].column_scale
    assert column is not None
    assert column[4] == 0
