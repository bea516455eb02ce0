"""A Qwen2 causal LM small enough to be built and run on a CPU in moments, without any model hub.

The directory written here is an ordinary Hugging Face model directory. ms-swift loads it by path with
``--model_type qwen2 --template chatml``; `MODEL_TYPE` and `TEMPLATE` name these two once for everybody.
"""
from pathlib import Path
from typing import TYPE_CHECKING, Union

from ..quiet import silenced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_TYPE = 'qwen2'
# Qwen's own template prepends a system prompt, which a byte-level tokenizer would turn into 28 tokens per sample.
TEMPLATE = 'chatml'
# Like Qwen: <|endoftext|> pads, <|im_end|> ends a turn and so a generation.
SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')


def build_byte_tokenizer() -> 'PreTrainedTokenizerFast':
    """Builds a byte-level BPE tokenizer without merges: one token per UTF-8 byte.

    Returns:
        A tokenizer of 259 tokens, the 256 bytes and Qwen's three special tokens, with a ChatML chat template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token='<|im_end|>',
        pad_token='<|endoftext|>',
        # Decoding must give back exactly the bytes that were generated.
        clean_up_tokenization_spaces=False,
        chat_template=("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
                       "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
                       '{% endif %}'))


def build_tiny_qwen2(path: Union[str, Path],
                     *,
                     hidden_size: int = 64,
                     num_layers: int = 8,
                     num_heads: int = 4,
                     num_kv_heads: int = 2,
                     intermediate_size: Union[int, None] = None,
                     max_position_embeddings: int = 512,
                     seed: int = 0) -> str:
    """Writes a Qwen2 causal LM with random float32 weights and a byte-level tokenizer.

    Args:
        path: The directory to write into; it is created where it does not exist.
        hidden_size: The width of the residual stream.
        num_layers: The number of decoder layers, each with the seven projections that LoRA targets.
        num_heads: The number of attention heads.
        num_kv_heads: The number of key and value heads; `num_heads` must be a multiple of it.
        intermediate_size: The width of the MLP, `2 * hidden_size` where it is None.
        max_position_embeddings: The longest sequence the model is made for.
        seed: Seeds the weights. The global random state is left as it was.

    Returns:
        `path` as a string.

    Raises:
        ValueError: If a size is not positive or the heads do not divide evenly.
    """
    sizes = {
        'hidden_size': hidden_size,
        'num_layers': num_layers,
        'num_heads': num_heads,
        'num_kv_heads': num_kv_heads,
        'max_position_embeddings': max_position_embeddings,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f'`{name}` must be positive, got {size}.')
    # Rotary embeddings rotate pairs, so a head needs an even width.
    if hidden_size % (2 * num_heads) != 0:
        raise ValueError(f'`hidden_size` must be a multiple of 2 * `num_heads` = {2 * num_heads}, got {hidden_size}.')
    if num_heads % num_kv_heads != 0:
        raise ValueError(f'`num_heads` must be a multiple of `num_kv_heads` = {num_kv_heads}, got {num_heads}.')

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype='float32')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    with silenced():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)
