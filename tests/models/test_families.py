"""What the rows of the table and the stages of a block say, against the computation itself."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import twins
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracles import alibi_attention
from twins import ROWS, TOKENS, decoder_of, logits, logits_of, opt_dict, twin

import jgptq
from converters.names import leaves, stored_rule
from jgptq.errors import ArchitectureError, CalibrationError, ConfigError
from jgptq.models import FAMILIES, RESIDUAL, AlibiPositions, Block, Decoder, Head, Linear, checkpoint_name, config_from_hf
from jgptq.models.attention import alibi_slopes
from jgptq.models.layers import LayerNorm, RMSNorm
from jgptq.models.memory import copy_module
from jgptq.models.sublayers import split_qkv
from jgptq.run.batches import embed


@functools.cache
def tensor_names(row: str) -> dict[str, str]:
    """Name in the checkpoint -> path in the decoder, of every leaf."""
    config = config_from_hf(ROWS[row][0])
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    pairs = [
        (f"{checkpoint_name(path, config.model_type)}.{stored_rule(path, leaf, config.model_type).suffix}", f"{path}.{leaf}")
        for path, _, leaf in leaves(decoder)
    ]
    assert len(dict(pairs)) == len(pairs)
    stacked = (
        0 if decoder.config.experts is None else 3 * (decoder.config.experts.num_experts - 1) * sum(decoder.config.sparse_layers)
    )
    assert len(pairs) == len(jax.tree.leaves(decoder)) + stacked
    return dict(pairs)


def test_every_family_has_a_row_that_is_compared_with_transformers():
    assert {config_from_hf(hf).model_type for hf, _ in ROWS.values()} == set(FAMILIES)


@pytest.mark.parametrize("row", ROWS)
def test_the_names_of_all_leaves_are_those_of_transformers(row):
    state = twins.stored_state(twin(row), config_from_hf(ROWS[row][0]).model_type)
    assert tensor_names(row).keys() == state.keys()


@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_a_name_and_a_path_lead_to_each_other(family, data):
    """Of any linear or norm, in any block, two paths never have one name, and the number of the block is kept."""
    rows = [row for row, (hf, _) in ROWS.items() if config_from_hf(hf).model_type == family]
    names = tensor_names(data.draw(st.sampled_from(rows)))
    paths = sorted({path.rpartition(".")[0] for path in names.values()})
    within = [path.split(".", 2)[2] for path in paths if path.startswith("layers.0.")]
    index, path = data.draw(st.integers(0, 200)), data.draw(st.sampled_from(within))
    name = checkpoint_name(f"layers.{index}.{path}", family)
    back = [other for other in within if checkpoint_name(f"layers.{index}.{other}", family) == name]
    assert back == [path]
    assert re.search(rf"\.{FAMILIES[family].blocks}\.(\d+)\.", name).group(1) == str(index)


def test_a_name_in_an_unknown_architecture_is_refused():
    with pytest.raises(ArchitectureError, match="'mamba' is not known; known are llama, "):
        checkpoint_name("layers.0.mlp.up_proj", "mamba")


def rescaled(unit: Block | Head, stage, scale: np.ndarray) -> None:
    """Divides the outputs of a stage's absorber, and multiplies what its linears make of them."""
    absorber = functools.reduce(getattr, stage.absorber.split("."), unit)
    if isinstance(absorber, Linear):
        absorber.kernel.set_value(absorber.kernel.get_value() / scale[None])
    else:
        absorber.scale.set_value((absorber.scale.get_value() + absorber.offset) / scale - absorber.offset)
    if getattr(absorber, "bias", None) is not None:
        absorber.bias.set_value(absorber.bias.get_value() / scale)
    for path in stage.linears:
        linear = unit.linears()[path]
        linear.kernel.set_value(linear.kernel.get_value() * scale[:, None])


@pytest.mark.parametrize(
    "row",
    [
        *("llama", "llama_gqa", "opt", "opt_untied", "stablelm_parallel", "gemma", "gemma2", "olmo2", "qwen3"),
        *(
            "granite_silent",
            "gemma3",
            "cohere_untied",
            "phi",
            "nemotron",
            "olmo_clipped_each",
            "gptj",
            "gpt2",
            "gpt_neox",
            "glm4",
        ),
    ],
)
def test_a_scale_of_a_stages_inputs_that_its_absorber_takes_leaves_the_logits(row):
    decoder, random = copy_module(decoder_of(row)), np.random.default_rng(0)
    absorbers = set()
    for unit in (*decoder.layers, *filter(None, [decoder.head()])):
        for stage in unit.stages():
            if stage.absorber is not None:
                width = unit.linears()[stage.linears[0]].kernel.get_value().shape[0]
                rescaled(unit, stage, random.uniform(0.5, 2.0, width).astype(np.float32))
                absorbers.add(stage.absorber)
    np.testing.assert_allclose(logits(decoder), logits_of(row), rtol=0, atol=2e-4)
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (decoder, decoder_of(row))), strict=True)]
    assert sum(changed) > len(absorbers)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("llama", ["attn_norm", "self_attn.v_proj", "mlp_norm", "mlp.up_proj"]),
        ("llama_gqa", ["attn_norm", None, "mlp_norm", "mlp.up_proj"]),
        ("opt", ["attn_norm", "self_attn.v_proj", "mlp_norm", "mlp.up_proj"]),
        ("opt_bare", [None, "self_attn.v_proj", None, "mlp.up_proj"]),
        ("opt_post_norm_projected", [None, "self_attn.v_proj", None, "mlp.up_proj"]),
        ("stablelm_parallel", ["attn_norm", None, "mlp.up_proj"]),
        ("olmo2", [None, None, None, "mlp.up_proj"]),
        ("gemma2", ["attn_norm", None, "mlp_norm", "mlp.up_proj"]),
        ("olmo_clipped_each", [None, None, None, "mlp.up_proj"]),
        ("granite_silent", ["attn_norm", "self_attn.v_proj", "mlp_norm", "mlp.up_proj"]),
        ("phi", ["attn_norm", None, None]),
        ("jais2", ["attn_norm", None, "mlp_norm", None]),
        ("gpt2", ["attn_norm", None, "mlp_norm", None]),
        ("phi3", ["attn_norm", None, "mlp_norm", None]),
        ("glm4_every_head_its_own", ["attn_norm", "self_attn.v_proj", "mlp_norm", None]),
        ("gpt_neox", ["attn_norm", "mlp_norm", None, None]),
        ("falcon", ["attn_norm", None, None]),
    ],
)
def test_stages_say_what_can_absorb_a_scale(row, expected):
    assert [stage.absorber for stage in decoder_of(row).layers[0].stages()] == expected


def test_an_activation_that_is_not_homogeneous_cannot_pass_a_scale_on():
    config = config_from_hf(opt_dict(activation_function="gelu"))
    block = nnx.eval_shape(lambda: Block(config, config.layers[0], rngs=nnx.Rngs(0)))
    assert [stage.absorber for stage in block.stages()] == ["attn_norm", "self_attn.v_proj", "mlp_norm", None]


@pytest.mark.parametrize(
    ("row", "added"),
    [
        ("llama", [1, 3]),
        ("opt_post_norm_projected", [1, 3]),
        ("stablelm_parallel", [1, 2]),
        ("olmo2", []),
        ("gemma2", []),
        ("granite", []),
        ("granite_silent", [1, 3]),
        ("gptj", [1, 2]),
        ("gpt_neox", [2, 3]),
    ],
)
def test_a_stage_that_adds_changes_the_stream_by_its_output_and_no_other_does(row, added):
    """`adds` is what the shift of targets builds on: before a norm of the stream, the output is added as it is."""
    block = decoder_of(row).layers[0]
    carry = {RESIDUAL: decoder_of(row).embed(jnp.asarray(TOKENS))}
    adding = []
    for number, stage in enumerate(block.stages()):
        h, before = block.inputs(stage, carry), carry[RESIDUAL]
        carry = block.run(stage, carry)
        output = block.linears()[stage.linears[0]](h)
        norms = [block.norms()[path] for path in stage.norms]
        if output.shape == before.shape:
            expected = norms[0](before + output) if norms else before + output
            if np.array_equal(carry[RESIDUAL], expected):
                adding.append(number)
    assert adding == added == [number for number, stage in enumerate(block.stages()) if stage.adds]


@pytest.mark.parametrize("row", ["llama", "opt_post_norm_projected", "stablelm_parallel", "gemma2", "olmo2", "qwen3", "gpt_neox"])
def test_stages_name_every_norm_of_a_block_but_those_of_queries_and_keys(row):
    """By these names norms are tuned, and written again after that."""
    block = decoder_of(row).layers[0]
    every = {".".join(path) for path, module in nnx.iter_modules(block) if isinstance(module, RMSNorm | LayerNorm)}
    assert block.norms().keys() == every - {"self_attn.q_norm", "self_attn.k_norm"}


def test_linears_that_share_a_hessian_and_those_that_readers_fuse_are_two_facts():
    parallel = decoder_of("stablelm_parallel").layers[0].stages()[0]
    qkv, gate_up = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
    assert parallel.linears == qkv + gate_up
    assert [(fusion.name, fusion.linears) for fusion in parallel.fusions] == [
        ("self_attn.qkv_proj", qkv),
        ("mlp.gate_up_proj", gate_up),
    ]
    opening = decoder_of("opt").layers[0].stages()[2]
    assert (opening.linears, opening.fusions) == (("mlp.up_proj",), ())


def test_a_parallel_block_opens_its_mlp_before_attention_adds_to_the_stream():
    """Both sublayers read the stream that the block began with, each through a norm of its own."""
    block = decoder_of("gpt_neox").layers[0]
    start = decoder_of("gpt_neox").embed(jnp.asarray(TOKENS))
    carry, read = {RESIDUAL: start}, {}
    for stage in block.stages():
        read |= {stage.linears: block.inputs(stage, carry)}
        carry = block.run(stage, carry)
    np.testing.assert_array_equal(read["self_attn.qkv_proj",], block.attn_norm(start))
    np.testing.assert_array_equal(read["mlp.up_proj",], block.mlp_norm(start))
    assert carry.keys() == {RESIDUAL}


@pytest.mark.parametrize("row", ["gpt2", "gpt_bigcode", "bloom", "falcon_grouped", "phi3"])
def test_the_layout_of_a_fused_linear_says_which_features_are_whose(row):
    """Three linears made of the columns of the one give the same logits."""
    fused = decoder_of(row)
    config = dataclasses.replace(fused.config, qkv_layout=None)
    parted = copy_module(fused)
    for index, block in enumerate(fused.layers):
        attention, one = Block(config, config.layers[0], rngs=nnx.Rngs(0)).self_attn, block.self_attn.qkv_proj
        for part in ("kernel", "bias"):
            if getattr(one, part) is not None:
                columns = split_qkv(getattr(one, part).get_value().reshape(1, -1, one.kernel.get_value().shape[1]), fused.config)
                for name, column in zip(("q_proj", "k_proj", "v_proj"), columns, strict=True):
                    getattr(getattr(attention, name), part).set_value(column[0] if part == "kernel" else column[0, 0])
        attention.o_proj = block.self_attn.o_proj
        parted.layers[index].config, parted.layers[index].self_attn = config, attention
    assert len(parted.layers[0].stages()[0].linears) == 3
    np.testing.assert_allclose(logits(parted), logits_of(row), rtol=0, atol=1e-4)


def test_rules_that_part_linears_of_a_stage_are_refused_with_the_reason_that_holds():
    params = tiny.decoder(block_form="parallel")
    for pattern, fused in ((".*gate_proj", True), (".*(gate|up)_proj", False)):
        with pytest.raises(ConfigError, match="they read the same activations, so one solve serves them all") as caught:
            jgptq.quantize(params, tiny.tokens(), group_size=32, rules={f"+:{pattern}": {"bits": 8}})
        assert ("readers fuse them into one matrix" in str(caught.value)) == fused


@pytest.mark.parametrize("row", ["opt", "opt_post_norm_projected", "gemma", "gemma2", "gemma3", "granite", "bloom", "gpt2"])
def test_calibration_begins_where_the_model_begins(row):
    decoder = decoder_of(row)
    batch, *others = embed(decoder, [TOKENS], reference=True)
    assert not others
    captured = []
    family = FAMILIES[decoder.config.model_type]
    first = functools.reduce(getattr, (*family.decoder.split("."), family.blocks), twin(row))[0]
    hook = first.register_forward_pre_hook(lambda _, args, kwargs: captured.append(args[0]), with_kwargs=True)
    twins.torch_logits(twin(row))
    hook.remove()
    for carry in (batch.carry, batch.reference):
        assert carry.keys() == {RESIDUAL}
        np.testing.assert_allclose(carry[RESIDUAL], captured[0].detach().numpy(), rtol=0, atol=1e-5)


def test_more_positions_than_the_table_has_are_refused():
    decoder = decoder_of("opt")
    assert decoder(jnp.zeros((1, 64), jnp.int32)).shape == (1, 64, 61)
    with pytest.raises(CalibrationError, match="expected sequences of at most 64 positions, found 65; try a smaller seq_len"):
        decoder(jnp.zeros((1, 65), jnp.int32))


def test_the_slopes_of_alibi_are_those_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])


@pytest.mark.parametrize(("heads", "shared", "window"), [(4, 4, None), (6, 3, None), (4, 2, 5)])
def test_alibi_is_the_textbooks(heads, shared, window):
    config = tiny.config(
        num_attention_heads=heads,
        num_key_value_heads=shared,
        positions=AlibiPositions(max_position_embeddings=16),
        layer_windows=(window,),
    )
    attention = Block(config, config.layers[0], rngs=nnx.Rngs(0)).self_attn
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, 24, count, 16)).astype(np.float32) for count in (heads, shared, shared))
    flat = [jnp.asarray(part.reshape(2, 24, -1)) for part in (q, k, v)]
    np.testing.assert_allclose(attention.mix(*flat), alibi_attention(q, k, v, window), atol=1e-5)
