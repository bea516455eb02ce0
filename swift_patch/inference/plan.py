"""What a run will do: everything that can be read and checked without the model."""
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ..errors import reason_of
from ..patching import why_not_applied
from .arguments import swift_arguments
from .backends import check_backend, import_backend
from .batches import batches, looked_at
from .checkpoints import check_base_model, find_checkpoints
from .config import InferConfig, Stage
from .dataset import DatasetError, Sample
from .generator import to_request
from .metrics import check_metric
from .ranks import Ranks
from .results import check_result_path
from .samples import read_samples

if TYPE_CHECKING:
    from ..lora.checkpoint import AdapterCheckpoint
    from ..ms_swift import InferArguments


@dataclass
class Job:
    """What is asked, checked.

    Attributes:
        config: The run.
        samples: All samples of its datasets.
        checkpoints: The adapters that they name.
        args: ms-swift's arguments.
        template: ms-swift's template, where samples are encoded before the model is loaded.
    """
    config: InferConfig
    samples: List[Sample]
    checkpoints: 'List[AdapterCheckpoint]'
    args: 'InferArguments'
    template: Any

    @property
    def is_continuous(self) -> bool:
        """Whether samples are answered one by one as they come, many at a time, and not in batches."""
        return bool(self.args.infer_backend == 'vllm')

    @property
    def window(self) -> int:
        """How many batches are begun at a time."""
        return int(self.args.vllm_max_num_seqs) if self.is_continuous and not self.args.stream else 1


@dataclass
class Plan:
    """What is left to do.

    Attributes:
        batches: The samples that are answered together, by number. Some of them may be finished, for a batch is
            answered as it was.
        refused: Why samples cannot be asked, by number.
    """
    batches: List[List[int]]
    refused: Dict[int, str]


def make_job(config: InferConfig, ranks: Ranks, stage: Stage) -> Job:
    """Reads and checks samples, adapters and options, on all ranks.

    Raises:
        ValueError: If any of them is wrong.
    """
    samples, checkpoints = ranks.on_all(lambda: _read(config, ranks, stage))

    def arguments() -> 'Tuple[InferArguments, Any]':
        with stage("Reading the model's configuration"):
            args = swift_arguments(
                config.swift_args, checkpoints, val_dataset=config.val_dataset, max_batch_size=config.max_batch_size)
            if args.task_type != 'causal_lm':
                raise ValueError(f'swift-patch infer generates text, but this is a model for {args.task_type}.')
            return args, _template(args)

    # Its own, for ms-swift waits for the other ranks in the middle of it.
    args, template = ranks.on_all(arguments)
    return Job(config, samples, checkpoints, args, template)


def _read(config: InferConfig, ranks: Ranks, stage: Stage) -> 'Tuple[List[Sample], List[AdapterCheckpoint]]':
    reason = why_not_applied()
    if reason is not None:
        raise ValueError(reason)
    check_backend(config)
    for dataset in config.val_dataset if ranks.size > 1 else ():
        if Path(dataset).is_fifo():
            raise ValueError(f'{dataset} is a pipe, of which several processes cannot read all each: give a file.')
    with stage('Reading the samples') as advance:
        samples = read_samples(
            config.val_dataset,
            config.adapters,
            default_adapters=config.default_adapters,
            strict=config.strict,
            options=config.swift_args,
            on_read=advance)
    path = None if config.result_path is None else Path(config.result_path)
    check_result_path(path, config, {sample.dataset for sample in samples})
    if len(config.val_dataset) > 1:
        # Of one dataset, it is the user's own.
        twice = {
            number: "the key 'dataset' is one that result lines of several datasets add; rename it"
            for number, sample in enumerate(samples) if 'dataset' in sample.data
        }
        if twice:
            raise _dataset_error(samples, twice)
    if config.swift_args.get('metric') is not None:
        check_metric(config.swift_args['metric'], samples)
    # The others may be ten thousand, and broken.
    used = {name for sample in samples for name in sample.adapters}
    with stage('Looking at the adapters'):
        checkpoints = find_checkpoints({
            name: path
            for name, path in config.adapters.items() if name in used
        }, config.swift_args)
    with stage('Importing ms-swift'):
        import_backend(config)
        from ..lora.combination import options_of_method
        from ..lora.compiled import compile_merging
    if config.compile_merging:
        compile_merging()
    options_of_method(config.merge_method, **config.composer_args)
    return samples, checkpoints


def _template(args: 'InferArguments') -> Any:
    """Returns the template that encodes samples; None for models of images, of which encoding would load each twice."""
    if args.model_meta.is_multimodal:
        return None
    from ..ms_swift import TEMPLATE_MODE, get_template
    try:
        template = get_template(args)
    except Exception as e:  # a tokenizer that is damaged, or needs a package
        raise ValueError(f'Cannot load the tokenizer of {args.model_dir}: {reason_of(e)}') from e
    template.set_mode(TEMPLATE_MODE)
    return template


def make_plan(job: Job, todo: Sequence[int], stage: Stage) -> Plan:
    """Checks what is left to do.

    Args:
        job: What is asked.
        todo: The samples whose lines are to be written, by number.
        stage: Shows how far it is.

    Raises:
        DatasetError: If there are samples that the template refuses or that leave no room for an answer, and the run is
            strict.
        ValueError: If an adapter does not belong to the model.
    """
    if not todo:
        return Plan([], {})
    check_base_model(job.checkpoints, job.args.model_dir)
    size = 1 if job.is_continuous else job.config.max_batch_size
    near = looked_at(todo, len(job.samples), size)
    with stage('Checking the samples', len(near)) as advance:
        lengths, refused = _check_template(job, near, advance)
    meant = set(todo)
    refused = {number: reason for number, reason in refused.items() if number in meant}
    if refused and job.config.strict:
        raise _dataset_error(job.samples, refused)
    return Plan([batch for batch in batches(lengths, size) if not meant.isdisjoint(batch)], refused)


def _dataset_error(samples: Sequence[Sample], refused: Mapping[int, str]) -> ValueError:
    problems: Dict[Tuple[str, str], List[Tuple[int, str]]] = {}
    for number, reason in refused.items():
        sample = samples[number]
        problems.setdefault((sample.dataset, sample.unit), []).append((sample.line, reason))
    return DatasetError.joined([DatasetError(dataset, found, unit) for (dataset, unit), found in problems.items()])


def _check_template(job: Job, numbers: Sequence[int],
                    advance: Callable[[int], None]) -> Tuple[Dict[int, Optional[int]], Dict[int, str]]:
    """Encodes samples with the model's template, where there is one.

    Returns:
        How many tokens each sample has, None where that is not known, by number; and why the others cannot be asked.
    """
    template = job.template
    if template is None:
        return dict.fromkeys(numbers), {}
    max_model_len = template.model_info.max_model_len
    if job.is_continuous:
        max_model_len = job.args.vllm_max_model_len or max_model_len
    lengths: Dict[int, Optional[int]] = {}
    refused: Dict[int, str] = {}
    for number in numbers:
        advance(1)
        try:
            length = len(template.encode(to_request(job.samples[number]))['input_ids'])
        except Exception as e:  # templates raise whatever comes: assertions, KeyError, ValueError
            refused[number] = f"the model's template refuses it: {type(e).__name__}: {str(e):.300}"
            continue
        if max_model_len is not None and length >= max_model_len:
            refused[number] = f'{length} tokens leave no room for an answer in {max_model_len}'
        else:
            lengths[number] = length
    return lengths, refused
