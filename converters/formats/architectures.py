"""Who does not load quantized files of an architecture whose tensors have the names that transformers gives them."""

from converters.formats.settings import HEAD
from jgptq.models import ModelConfig, checkpoint_name


def architecture_warnings(model: ModelConfig) -> list[str]:
    """Sentences on programs that do not load GPTQ files of an architecture."""
    sentences = []
    if model.gate_up_fused:
        sentences.append(
            "GPTQModel 7.6 refuses a fused gate_up_proj, which is transformers' name; it asks for gate_proj and up_proj"
        )
    head = checkpoint_name(HEAD, model.model_type)
    if head != HEAD and not model.tie_word_embeddings:
        sentences.append(
            f"GPTQModel 7.6 with transformers 5 does not read {head}, and gives logits of zero without an error; it reads these "
            f"tensors under the name {HEAD}"
        )
    return sentences
