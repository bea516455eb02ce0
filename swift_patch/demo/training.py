"""Make what the demo merges: a pretrained tiny base model and LoRAs trained and saved by ms-swift itself."""
import contextlib
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple, Union

from ..quiet import silenced
from ..synthetic.tiny_model import MODEL_TYPE, TEMPLATE

if TYPE_CHECKING:
    import torch

TARGET_MODULES = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


def pretrain_base(model_dir: Union[str, Path],
                  samples: Sequence[Dict[str, Any]],
                  *,
                  target_loss: float = 0.2,
                  max_steps: int = 1000,
                  batch_size: int = 16,
                  learning_rate: float = 3e-3,
                  seed: int = 0) -> float:
    """Trains all weights of the model in `model_dir` on `samples` and saves them in place.

    A plain torch loop: what comes out is a base model like any other, so nothing is gained by the trainer's machinery.

    Args:
        model_dir: A directory written by `build_tiny_qwen2`.
        samples: ``{'messages': [user, assistant]}`` each, at least `batch_size` of them.
        target_loss: Training ends when the loss of the answers, smoothed over some 10 steps, is below this. A base
            model that is less than certain is easier to turn by a LoRA of which a merge leaves only a part.
        max_steps: Training ends after this many optimizer steps at the latest.
        batch_size: The number of samples in a step.
        learning_rate: The learning rate, after a warm-up over 20 steps.
        seed: Decides the order of the samples. The global random state is neither read nor changed.

    Returns:
        The smoothed loss of the answers, in nats per token.

    Raises:
        ValueError: If `max_steps` is not positive or there are fewer samples than `batch_size`.
    """
    if max_steps < 1:
        raise ValueError(f'`max_steps` must be positive, got {max_steps}.')
    if not 1 <= batch_size <= len(samples):
        raise ValueError(f'`batch_size` must be between 1 and the number of samples, {len(samples)}, got {batch_size}.')

    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with silenced():
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir).float()
    rows = [_encode(tokenizer, sample) for sample in samples]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    rng = random.Random(seed)
    smoothed_loss = math.inf
    model.train()
    for _ in range(max_steps):
        input_ids, question, answer = _collate(rng.sample(rows, batch_size), tokenizer.pad_token_id)
        logits = model(input_ids=input_ids).logits[:, :-1]
        targets = input_ids[:, 1:]
        # An answer has 3 tokens, the rest some 40: one average of all would drown the answers. Without the rest the
        # model learns to tell the words apart far more slowly.
        answer_loss = cross_entropy(logits[answer], targets[answer])
        loss = answer_loss + cross_entropy(logits[question], targets[question])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        smoothed_loss = _smooth(smoothed_loss, answer_loss.item())
        if smoothed_loss < target_loss:
            break
    with silenced():
        model.save_pretrained(model_dir)
    return smoothed_loss


def train_adapter(model_dir: Union[str, Path],
                  dataset_file: Union[str, Path],
                  output_dir: Union[str, Path],
                  *,
                  use_swift_lora: bool = False,
                  steps: int = 40,
                  batch_size: int = 16,
                  learning_rate: float = 1e-2,
                  rank: int = 8,
                  alpha: int = 16,
                  seed: int = 42,
                  quiet: bool = True) -> str:
    """Trains one LoRA on all seven projections with ``swift sft``, in this process.

    LoRAs trained with the same `seed` start from the same A matrices. That is ms-swift's default, and what makes an
    average of their parameters meaningful.

    Args:
        model_dir: The directory of the base model.
        dataset_file: A ``.jsonl`` file of samples.
        output_dir: Where ms-swift puts its log and the checkpoint.
        use_swift_lora: Whether the LoRA is ms-swift's own tuner (`SwiftModel`) or PEFT's (`PeftModel`). The two are
            saved in different formats.
        steps: The number of optimizer steps.
        batch_size: The number of samples in a step.
        learning_rate: The peak learning rate.
        rank: The rank of the LoRA.
        alpha: Its alpha; the scaling is ``alpha / rank``.
        seed: Decides the initial A matrices and the order of the samples.
        quiet: Whether to keep ms-swift's logs, below warnings, and progress bars from the terminal.

    Returns:
        The checkpoint directory, ``output_dir/checkpoint-<steps>``.

    Raises:
        ValueError: If `steps` is not positive.
        FileNotFoundError: If there is no `dataset_file`.
    """
    if steps < 1:
        raise ValueError(f'`steps` must be positive, got {steps}.')
    # ms-swift takes an unknown path for a data set's name and asks the hub for it.
    if not Path(dataset_file).is_file():
        raise FileNotFoundError(f'`dataset_file` does not exist: {dataset_file}')

    # Outside of `silenced`: a log handler made inside would keep writing to the redirected stderr for ever.
    from ..ms_swift import TUNER_OPTION, sft_main

    with silenced() if quiet else contextlib.nullcontext():
        result = sft_main(
            dict(
                model=str(model_dir),
                model_type=MODEL_TYPE,
                template=TEMPLATE,
                torch_dtype='float32',
                dataset=[str(dataset_file)],
                output_dir=str(output_dir),
                add_version=False,
                **{TUNER_OPTION: 'lora'},
                use_swift_lora=use_swift_lora,
                target_modules=list(TARGET_MODULES),
                lora_rank=rank,
                lora_alpha=alpha,
                lora_dropout=0.0,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=1,
                learning_rate=learning_rate,
                seed=seed,
                data_seed=seed,
                # What follows makes it fast: nothing here is worth a worker process, a second forward pass, a report,
                # or the optimizer's state on disk. The model check asks the hub.
                gradient_checkpointing=False,
                dataloader_num_workers=0,
                # ms-swift 4.5 would ask PyTorch to keep the workers that there are none of, which it refuses.
                dataloader_persistent_workers=False,
                save_strategy='steps',
                save_steps=steps,
                save_only_model=True,
                eval_strategy='no',
                logging_steps=steps,
                logging_first_step=False,
                report_to=['none'],
                check_model=False,
                disable_tqdm=quiet))
    checkpoint: str = result['last_model_checkpoint']
    return checkpoint


def _encode(tokenizer: Any, sample: Dict[str, Any]) -> Tuple[List[int], List[int]]:
    """Returns the token ids of the question, up to where the answer starts, and those of the answer."""
    question, answer = (message['content'] for message in sample['messages'])
    prompt = f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n'
    return tokenizer(prompt).input_ids, tokenizer(f'{answer}<|im_end|>').input_ids


def _collate(rows: Sequence[Tuple[List[int], List[int]]],
             pad_token_id: int) -> Tuple['torch.Tensor', 'torch.Tensor', 'torch.Tensor']:
    """Pad to one batch.

    Padding is on the right: in a causal model nothing before it sees it, so no attention mask is needed.

    Returns:
        The token ids, of shape (batch, length), and two masks of shape (batch, length - 1): which next tokens belong
        to a question, and which to an answer.
    """
    import torch

    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    question = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    answered = torch.zeros_like(question)
    for i, (prompt, answer) in enumerate(rows):
        start, end = len(prompt) - 1, len(prompt) + len(answer) - 1
        input_ids[i, :end + 1] = torch.tensor(prompt + answer)
        question[i, :start] = True
        answered[i, start:end] = True
    return input_ids, question, answered


def _smooth(average: float, value: float) -> float:
    """Returns the exponential moving average after `value`, over some 10 values; infinity is none yet."""
    return value if math.isinf(average) else 0.9 * average + 0.1 * value
