"""Mixtures of experts: what routing, sums and solves cost, against a dense model of equal active size and a loop over experts.

    python benchmarks/bench_experts.py

One block with 64 experts, 8 a token, random weights and tokens, float32. The dense block has an MLP as wide as the experts that a
token goes to, so that a token takes as many multiplications in both.

- `forward`: the block on all tokens, over that of the dense block; at most 1.3.
- `solve`: all experts of a stage at once, over a loop that calls the ordinary solver for each, compiled once; at most 0.5.
- `products`: routed rows times their kernels, over `jax.lax.ragged_dot`, which on a CPU multiplies every row with every expert.
- `quantize`: a whole run of one block over that of the dense block. It has no limit: experts have 64 Hessians of their own, and
  8 times as many weights to solve.

Rounds alternate; quoted are the median of the ratios and every round. Nothing is left to compile.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import circumstances, write_result
from flax import nnx

import jgptq
from jgptq.models import Decoder, ExpertsConfig, ModelConfig
from jgptq.models.mixture.routing import dispatch, grouped_product
from jgptq.run.experts.solve import Chunk, solve_chunk
from jgptq.solver import solve
from jgptq.solver.statistics.experts import ExpertSums

EXPERTS, CHOSEN, WIDTH, INNER, VOCAB = 64, 8, 512, 128, 512
LIMITS = {"forward": 1.3, "solve": 0.5}
CONFIG = jgptq.QuantizeConfig(group_size=128, target_shift=0.0, residual_shift=0.0)


def model(sparse: bool) -> Decoder:
    """One block with experts, or with an MLP of their active width."""
    experts = ExpertsConfig(num_experts=EXPERTS, experts_per_token=CHOSEN, width=INNER, sparse_layers=(True,), normalized=True)
    config = ModelConfig(
        model_type="qwen3_moe" if sparse else "qwen3",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=CHOSEN * INNER,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=WIDTH // 8,
        qk_norm="head",
        experts=experts if sparse else None,
        layer_windows=(None,),
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def seconds(call: Callable[[], Any]) -> float:
    """The time until a result is there."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def ratios(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Our time over theirs, in rounds that alternate, after one that is not counted."""
    seconds(ours), seconds(theirs)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    each = [mine / its for mine, its in pairs]
    return {"ratio": statistics.median(each), "ratios": each, "seconds": pairs}


def forward(rounds: int, tokens: int) -> dict[str, Any]:
    """The blocks on a batch of tokens."""
    x = jax.random.normal(jax.random.key(0), (tokens // 256, 256, WIDTH))
    run = jax.jit(lambda block, x: block(x))
    sparse, dense = model(True).layers[0], model(False).layers[0]
    return ratios(lambda: run(sparse, x), lambda: run(dense, x), rounds)


def products(rounds: int, tokens: int) -> dict[str, Any]:
    """The rows of one linear of all experts."""
    block = model(True).layers[0]
    x = jax.random.normal(jax.random.key(0), (1, tokens, WIDTH))
    routing = jax.jit(block.mlp.route)(x)
    rows = dispatch(x, routing)
    kernels = jnp.asarray(block.mlp.experts.gate_proj.kernel.get_value())
    mine = jax.jit(grouped_product)
    theirs = jax.jit(lambda x, w, routing: jax.lax.ragged_dot(x, w, routing.blocks_e * routing.block))
    return ratios(lambda: mine(rows, kernels, routing), lambda: theirs(rows, kernels, routing), rounds)


def solves(rounds: int) -> dict[str, Any]:
    """The down projections of all experts, on Hessians of random inputs."""
    x = jax.random.normal(jax.random.key(1), (EXPERTS, 4 * INNER, INNER))
    hessian = jnp.einsum("etk,etj->ekj", x, x)
    kernels = jax.random.normal(jax.random.key(2), (EXPERTS, INNER, WIDTH))
    total = ExpertSums(hessian, None, jnp.full(EXPERTS, 4.0 * INNER))
    names = [[f"experts.{index}"] for index in range(EXPERTS)]
    chunk = Chunk([kernels], total, np.full(EXPERTS, 4 * INNER), np.zeros(EXPERTS, bool), names)
    one = jax.jit(lambda w_kn, h_kk: solve(w_kn, h_kk, CONFIG.solver))
    each = [(kernels[index], hessian[index] * (2 / (4 * INNER))) for index in range(EXPERTS)]

    def loop() -> list[Any]:
        return [jax.device_get(one(w_kn, h_kk)) for w_kn, h_kk in each]

    def at_once() -> Any:
        return solve_chunk(chunk, CONFIG, jnp.dtype(jnp.float32), allow_rtn=False).kernels

    return ratios(at_once, loop, rounds)


def quantize(rounds: int, tokens: int) -> dict[str, Any]:
    """Whole runs of one block."""
    calib = np.random.default_rng(0).integers(0, VOCAB, (tokens // 256, 256)).astype(np.int32)
    sparse, dense = model(True), model(False)

    def run(params: Decoder) -> Any:
        return jgptq.quantize(params, calib, config=CONFIG, progress=False)[1].seconds

    return ratios(lambda: run(sparse), lambda: run(dense), rounds)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    result: dict[str, Any] = {
        **circumstances(),
        "sizes": {"experts": EXPERTS, "chosen": CHOSEN, "width": WIDTH, "inner": INNER, "tokens": args.tokens},
        "limits": LIMITS,
    }
    measured = {
        "forward": lambda: forward(args.rounds, args.tokens),
        "products": lambda: products(args.rounds, args.tokens),
        "solve": lambda: solves(args.rounds),
        "quantize": lambda: quantize(1, args.tokens),
    }
    for name, measure in measured.items():
        result[name] = measure()
        limit = f" (limit {LIMITS[name]})" if name in LIMITS else ""
        print(f"{name}: {result[name]['ratio']:.2f}{limit}", flush=True)
    write_result("experts_cpu" if jax.default_backend() == "cpu" else "experts_gpu", result)


if __name__ == "__main__":
    main()
