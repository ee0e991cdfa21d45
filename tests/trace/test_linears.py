"""Which linears are found in a traced computation, and why other arrays are none."""

import re
from collections.abc import Callable
from typing import Any

import foreign_plain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq.trace.evaluate import evaluate
from jgptq.trace.linears import Linear
from jgptq.trace.model import Traced, model_of, trace
from jgptq.trace.residual import residual_of

B, S, D, H, F = 2, 3, 32, 4, 8


def array(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = array(B, S, D, seed=1)


def traced(fn: Callable[..., Any], tree: Any, batch: Any = X) -> Traced:
    return trace(model_of(tree, fn), batch)


def twice(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=2)[0]


@jax.custom_vjp
def custom(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].reshape(-1, D).T @ g.reshape(-1, D)))

FORMS: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]] = {
    "matmul": (lambda w, x: x @ w, (D, 64)),
    "transposed": (lambda w, x: x @ w.T, (64, D)),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (D, 64)),
    "several output axes": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (D, H, F)),
    "output axes around": (lambda w, x: jnp.einsum("btd,hdk->bhtk", x, w), (H, D, F)),
    "several contracted axes": (lambda w, x: jnp.einsum("bthk,hkd->btd", x.reshape(B, S, H, F), w), (H, F, 64)),
    "contracted in another order": (lambda w, x: jnp.einsum("bthk,khd->btd", x.reshape(B, S, H, F), w), (F, H, 64)),
    "tokens last": (lambda w, x: jnp.einsum("bdt,dn->bnt", x.transpose(0, 2, 1), w), (D, 64)),
    "weight on the left": (lambda w, x: jax.lax.dot_general(w, x, (((0,), (2,)), ((), ()))), (D, 64)),
    "reshaped": (lambda w, x: x @ w.reshape(D, -1), (D, H, F)),
    "squeezed": (lambda w, x: x @ w[0], (1, D, 64)),
    "jit": (lambda w, x: jax.jit(lambda a, b: jnp.tanh(a) @ b)(x, w), (D, 64)),
    "remat": (lambda w, x: jax.checkpoint(lambda a, b: jnp.tanh(a @ b))(x, w), (D, 64)),
    "custom_vjp": (lambda w, x: custom(x, w), (D, D)),
    "vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), (D, 64)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_is_found_and_its_matrices_multiply_to_its_output(form: str):
    """`x_tk w_kn = y_tn`, each from its own value by its own layout."""
    fn, shape = FORMS[form]
    w = array(*shape)
    found = traced(fn, w)
    (linear,) = found.contents.linears
    assert found.uses[0] == [linear]
    program = found.program
    values = evaluate(program.equations, dict(zip(program.inputs, (w, X), strict=True)) | dict(program.constants))
    x_tk, w_kn, y_tn = (
        layout.forward(value).astype(jnp.float32)
        for layout, value in ((linear.x_tk, values[linear.reads]), (linear.w_kn, w), (linear.y_tn, values[linear.result]))
    )
    atol = 0.2 if form == "cast" else 1e-4
    np.testing.assert_allclose(x_tk @ w_kn, y_tn, atol=atol)
    np.testing.assert_array_equal(linear.w_kn.backward(linear.w_kn.forward(w)), w)


def test_in_features_stand_in_the_order_of_the_weights_axes():
    """So that groups are runs of its entries, whatever the order in which the product lists its axes."""
    fn, shape = FORMS["contracted in another order"]
    (linear,) = traced(fn, array(*shape)).contents.linears
    np.testing.assert_array_equal(linear.w_kn.forward(array(*shape)), array(*shape).reshape(D, 64))


SQUARE = (D, D)
OTHERS: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], str]] = {
    "lookup": (lambda w, x: w[jnp.argmax(x, axis=-1)], (D, 64), "its rows are looked up"),
    "norm": (lambda w, x: x * w[None, None], (D,), "it is read by mul"),
    "scaled": (lambda w, x: x @ (2.0 * w), (D, 64), r"another array is computed from it \(mul\)"),
    "product": (lambda w, x: x @ (w @ w.T), (D, 64), r"another array is computed from it \(dot_general\)"),
    "masked": (lambda w, x: x @ jnp.tril(w), SQUARE, "another array is computed from it"),
    "experts": (lambda w, x: jnp.einsum("btd,bdf->btf", x, w), (B, D, 64), "batched product"),
    "convolution": (
        lambda w, x: jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        (3, D, 64),
        "kernel of a convolution",
    ),
    "cond": (lambda w, x: jax.lax.cond(x[0, 0, 0] > 0, lambda: x @ w, lambda: x), SQUARE, "inside a cond"),
    "while": (lambda w, x: jax.lax.while_loop(lambda h: h[0, 0, 0] > 9.0, lambda h: h @ w, x), SQUARE, "inside a while loop"),
    "every step": (lambda w, x: twice(x, w), SQUARE, "the same at every step"),
    "moved stack": (
        lambda w, x: jax.lax.scan(lambda h, p: (h @ p, None), x, jnp.moveaxis(w, 1, 0))[0],
        (D, 2, D),
        "moved to another axis before the scan",
    ),
    "returned": (lambda w, x: (x, w), SQUARE, "the function returns it"),
}


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_weight_of_a_linear_has_a_reason(form: str):
    fn, shape, reason = OTHERS[form]
    found = traced(fn, array(*shape))
    assert not found.contents.linears
    assert not found.contents.loops
    (use,) = set(found.uses[0])
    assert re.search(reason, use)


def test_what_is_read_twice_has_both_uses():
    found = traced(lambda w, x: jnp.tanh(x @ w) @ w, array(D, D))
    assert [type(use) for use in found.uses[0]] == [Linear, Linear]


def test_the_layers_of_scans_inside_scans_are_found():
    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ w), None

    found = traced(lambda w, x: jax.lax.scan(lambda h, ws: jax.lax.scan(layer, h, ws), x, w)[0], array(2, 3, D, D))
    (outer,) = found.contents.loops.values()
    (inner,) = outer.contents.loops.values()
    assert (outer.length, inner.length, inner.contents.linears[0].shape) == (2, 3, (D, D))


def test_the_residual_stream_is_found_behind_biases_and_reshapes():
    def fn(tree: Any, x: jax.Array) -> jax.Array:
        h = x + (jnp.tanh(x) @ tree["up"] + tree["bias"][None, None])
        return h + jnp.einsum("bthk,hkd->tbd", h.reshape(B, S, H, F), tree["out"]).transpose(1, 0, 2)

    found = traced(fn, {"up": array(D, D), "bias": array(D), "out": array(H, F, D)})
    program = found.program
    up, out = found.contents.linears
    residuals = [residual_of(program, found.contents, linear) for linear in (up, out)]
    assert residuals[0].value == program.inputs[-1]
    values = {residual.value: array(B, S, D) for residual in residuals}
    np.testing.assert_array_equal(residuals[1].y_tn.forward(values[residuals[1].value]), array(B, S, D).reshape(-1, D))


def test_a_sum_that_is_not_there_yet_is_no_residual_stream():
    """In `x + (a(x) + b(x))`, what a is added to is not known before a runs; what b is added to is a's output."""
    found = traced(lambda t, x: x + (x @ t[0] + jnp.tanh(x) @ t[1]), [array(D, D), array(D, D)])
    a, b = found.contents.linears
    assert residual_of(found.program, found.contents, a) is None
    assert residual_of(found.program, found.contents, b).value == a.result


def test_a_scans_stream_is_a_residual_stream():
    found = traced(foreign_plain.forward, foreign_plain.model(), jnp.zeros((2, 4), jnp.int32))
    (loop,) = found.contents.loops.values()
    residuals = [residual_of(loop.body, loop.contents, linear) is not None for linear in loop.contents.linears]
    assert sum(residuals) == 2
    assert residuals[-1]
