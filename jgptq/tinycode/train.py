"""Trains the embedded model: `python -m jgptq.tinycode.train OUT` (about an hour on two cores).

A Llama of 3.7 million parameters, every linear dimension a multiple of 128, on the standard library's own source
(`jgptq.tinycode.corpus`), with AdamW on a cosine schedule. One seed and one version of Python give one model.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from converters import save_hf
from converters.output.folders import refuse_existing
from jgptq.models import Decoder, ModelConfig, Origin, config_to_hf
from jgptq.models.rotary import RopeConfig
from jgptq.tinycode import SEQ_LEN
from jgptq.tinycode.corpus import stdlib_documents

CONFIG = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    norm_eps=1e-5,
    positions=RopeConfig(max_position_embeddings=SEQ_LEN),
    tie_word_embeddings=True,
    layer_windows=(None,) * 4,
)


def train_tokenizer(documents: list[str], folder: Path) -> None:
    """Trains a byte-level BPE tokenizer of `CONFIG.vocab_size` tokens and writes it as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": SEQ_LEN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def tokenize(documents: list[str], folder: Path) -> np.ndarray:
    """All documents as one stream of ids, each preceded by the token that starts a document."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = tokenizer.token_to_id("<s>")
    ids = [[start, *encoding.ids] for encoding in tokenizer.encode_batch(documents)]
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32)


def batches(stream: np.ndarray, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Random crops `[batch, SEQ_LEN + 1]` of the stream, an endless iterator."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(stream) - SEQ_LEN - 1, batch)
        yield stream[starts[:, None] + np.arange(SEQ_LEN + 1)]


def loss_of(model: Decoder, rows: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats per token, of each token given those before it in its row."""
    logits = model(rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def train(stream: np.ndarray, held_out: np.ndarray, *, steps: int, batch: int, learning_rate: float, seed: int) -> Decoder:
    """Trains from scratch and prints the loss on both parts every 100 steps.

    Args:
      stream: int32 ids to train on.
      held_out: int32 ids to report the loss on.
      steps: number of updates.
      batch: rows in one update.
      learning_rate: peak of the schedule.
      seed: seed of the initial parameters and of the order of the rows.

    Returns:
      The trained decoder, float32.
    """
    model = Decoder(CONFIG, rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps, learning_rate / 50)
    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=_is_matrix)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    graph, params = nnx.split(model)
    state = optimizer.init(params)

    @jax.jit
    def update(params: nnx.State, state: optax.OptState, rows: jax.Array) -> tuple[nnx.State, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), rows))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(lambda p, rows: loss_of(nnx.merge(graph, p), rows))
    probe = jnp.asarray(next(batches(held_out, 64, seed)))
    started, recent = time.monotonic(), []
    for step, rows in zip(range(1, steps + 1), batches(stream, batch, seed), strict=False):
        params, state, loss = update(params, state, jnp.asarray(rows))
        recent.append(float(loss))
        if step % 100 == 0 or step == steps:
            seen, unseen = float(np.mean(recent)), float(evaluate(params, probe))
            print(f"step {step}: train {seen:.3f}, held out {unseen:.3f} nats, {time.monotonic() - started:.0f} s", flush=True)
            recent = []
    return nnx.merge(graph, params)


def _is_matrix(params: nnx.State) -> nnx.State:
    """Which parameters weight decay applies to: all but the norms' scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def save(model: Decoder, tokenizer: Path, out: Path) -> Path:
    """Writes the model in float16 with its tokenizer as a Hugging Face folder."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model)
    hf_config = config_to_hf(CONFIG, "float16") | {"bos_token_id": 0, "eos_token_id": 1}
    half.origin = Origin(folder=str(tokenizer), hf_config=json.dumps(hf_config))
    return save_hf(half, out, format="float")


def main() -> None:
    """Trains tokenizer and model and writes them as a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("tinycode"), help="folder to write")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    refuse_existing(args.out, overwrite=False)

    with tempfile.TemporaryDirectory() as scratch:
        documents = stdlib_documents("train")
        train_tokenizer(documents, Path(scratch))
        stream, held_out = (tokenize(part, Path(scratch)) for part in (documents, stdlib_documents("held_out")))
        print(f"{len(stream)} tokens to train on, {len(held_out)} held out", flush=True)
        settings = {"steps": args.steps, "batch": args.batch, "learning_rate": args.learning_rate, "seed": args.seed}
        print("wrote", save(train(stream, held_out, **settings), Path(scratch), args.out))


if __name__ == "__main__":
    main()
