"""What `swift-patch infer` answers: samples of every kind of dataset that ms-swift reads, chosen as it chooses them.

JSON lines in ms-swift's own form are read by `dataset` alone, without ms-swift. Everything else is made such lines by
ms-swift itself, with the number that each had before.
"""
import codecs
import dataclasses
import datetime
import json
import logging
import math
import os
import stat
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import (TYPE_CHECKING, Any, Callable, Collection, Dict, Iterator, List, Mapping, Optional, Sequence, Set,
                    Tuple, Union)

from ..errors import reason_of
from .dataset import (DatasetError, Line, Problem, Sample, check_default_adapters, check_lines, is_plain, parse,
                      read_dataset)

if TYPE_CHECKING:
    from ..ms_swift import DatasetMeta, HfDataset

logger = logging.getLogger(__name__)

# With them, ms-swift may read a file in another way than its lines say.
_READING_OPTIONS = ('columns', 'custom_dataset_info')
# What ms-swift reads files of. A name that ends so is that of a file, also where there is none: no dataset of a hub.
_SUFFIXES = ('.jsonl', '.json', '.csv', '.txt', '.parquet', '.arrow')
# The column with the numbers of the rows, while ms-swift has them.
_NUMBER = 'swift_patch_number'
# The name of the user's column `dataset` meanwhile: ms-swift 4.6 writes its own over it.
_DATASET = 'swift_patch_dataset'
# The reasons why ms-swift leaves rows out are looked for one by one.
_MAX_REASONS = 20


def read_samples(datasets: Sequence[str],
                 names: Collection[str],
                 *,
                 default_adapters: Optional[Mapping[str, Optional[float]]] = None,
                 strict: bool = True,
                 options: Optional[Mapping[str, Any]] = None,
                 on_read: Callable[[int], Any] = lambda count: None) -> List[Sample]:
    """Reads datasets, checks all of their samples, and takes those that `swift infer` would take.

    Args:
        datasets: Each as `swift infer` takes it: FILE, FILE#N, a folder, the id of a dataset on a hub.
        names: The adapters that a sample may name.
        default_adapters: The adapters, and their weights, of samples that name none. None for all weights is 1/k.
        strict: Rows that ms-swift cannot use are an error; otherwise they are left out, and a warning says how many.
        options: ms-swift's options by name, of which those about datasets are used, and `val_dataset_sample`.
        on_read: Called now and then with the number of lines read since the last call.

    Returns:
        The samples in the order of `swift infer`: of one dataset after the other where nothing is sampled or shuffled.

    Raises:
        DatasetError: If samples are wrong, with all of them. All datasets have been read then.
        ValueError: If a dataset cannot be read, has no samples or fewer than asked for, or if an option is wrong.
    """
    options = options or {}
    if options.get('streaming'):
        raise ValueError('--streaming: the samples of swift-patch infer are read before the first is answered.')
    total = options.get('val_dataset_sample')
    if total is not None and total < 1:
        raise ValueError(f'--val_dataset_sample: expected at least 1, found {total}.')
    default = check_default_adapters(default_adapters, names) if default_adapters else None
    if not datasets or not all(map(str.strip, map(str, datasets))):
        raise ValueError(f'--val_dataset: expected the names of datasets, found {datasets!r}.')
    asked = [_split_count(str(dataset)) for dataset in datasets]
    read: Dict[str, List[Sample]] = {}
    errors: List[ValueError] = []
    with _Reader(options, strict) as reader:
        for dataset in dict.fromkeys(name for name, _ in asked):
            try:
                read[dataset] = reader.read(dataset, names, default, on_read)
            except ValueError as e:
                errors.append(e)
        for dataset, count in asked:
            if count is not None and dataset in read and not 0 < count <= len(read[dataset]):
                errors.append(
                    ValueError(f'{dataset}#{count}: expected 1 to {len(read[dataset])}, which is how many samples it '
                               f'has, after the #.'))
        if errors:
            raise DatasetError.joined(errors)
        samples = [sample for dataset, _ in asked for sample in read[dataset]]
        if total is None and not options.get('val_dataset_shuffle') and all(count is None for _, count in asked):
            return samples
        return [samples[number] for number in reader.choose([(len(read[dataset]), count) for dataset, count in asked])]


def _split_count(dataset: str) -> Tuple[str, Optional[int]]:
    """Splits FILE#N as ms-swift does: not where there is a file of this name."""
    name, _, count = dataset.rpartition('#')
    if not name or os.path.exists(os.path.expanduser(dataset)):
        return dataset, None
    try:
        return name, int(count)
    except ValueError as e:
        raise ValueError(f'{dataset}: expected a number of samples after the #, found {count!r}.') from e


def _is_json_lines(dataset: str) -> bool:
    """Tells whether it is a file for our own reader, by its name or its first line. Raises ValueError without one."""
    path = Path(dataset).expanduser()
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            os.listdir(path)
            return False
        # A pipe can be read once only.
        if path.suffix == '.jsonl' or not stat.S_ISREG(mode):
            return True
        with path.open('rb') as file:
            first = next((line for line in file if line.strip()), b'').removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, FileNotFoundError) and _may_be_id(dataset):
            return False
        raise ValueError(f'Cannot read the dataset {dataset}: {getattr(e, "strerror", None) or e}.') from e
    # An array on one line may be all of a large file.
    if not first.lstrip().startswith(b'{'):
        return False
    try:
        parse(first)
    except ValueError:
        return False
    return True


def _may_be_id(dataset: str) -> bool:
    hub, _, name = dataset.rpartition('::')
    return bool(hub) or name.partition(':')[0].count('/') < 2 and not (name.startswith(
        ('/', '.', '~')) or name.endswith(_SUFFIXES))


class _Reader(ExitStack):
    """Reads datasets, by ms-swift where it must. Within its context, ms-swift knows the user's own datasets.

    Args:
        options: ms-swift's options.
        strict: Whether rows that ms-swift leaves out are an error.
    """

    def __init__(self, options: Mapping[str, Any], strict: bool):
        super().__init__()
        self.options = options
        self.strict = strict
        self._args: Any = None
        self._kwargs: Dict[str, Any] = {}

    def read(self, dataset: str, names: Collection[str], default_adapters: Optional[Mapping[str, float]],
             on_read: Callable[[int], Any]) -> List[Sample]:
        """Reads one dataset."""
        if _is_json_lines(dataset):
            return read_dataset(
                dataset,
                names,
                default_adapters=default_adapters,
                convert=lambda lines: self._convert(dataset, lines),
                on_read=on_read)
        lines, problems = self._load(dataset)
        on_read(len(lines))
        return check_lines(
            dataset, [(number, _parse_cells(data)) for number, data in lines],
            names,
            default_adapters=default_adapters,
            problems=problems,
            unit='row')

    def choose(self, sizes: Sequence[Tuple[int, Optional[int]]]) -> List[int]:
        """Chooses samples as `swift infer` does.

        Args:
            sizes: How many samples each dataset has, and how many are asked of it.

        Returns:
            The numbers of samples, counted through all datasets.
        """
        import numpy as np

        from ..ms_swift import DATASET_MAPPING, HfDataset, load_dataset, meta_of_rows, sample_dataset
        args = self._arguments()
        asked: List[str] = []
        start = 0
        for place, (size, count) in enumerate(sizes):
            name = f'swift_patch_numbers_{place}'
            DATASET_MAPPING[name] = meta_of_rows(HfDataset.from_dict({_NUMBER: list(range(start, start + size))}))
            asked.append(name if count is None else f'{name}#{count}')
            start += size
        _, numbers = load_dataset(asked, split_dataset_ratio=1., shuffle=args.val_dataset_shuffle, **self._kwargs)
        numbers = sample_dataset(numbers, self.options.get('val_dataset_sample'), args.dataset_shuffle,
                                 np.random.RandomState(args.data_seed))
        chosen: List[int] = list(numbers[_NUMBER])
        return chosen

    def _arguments(self) -> Any:
        """Returns ms-swift's arguments about datasets. The first call registers the user's own datasets."""
        if self._args is not None:
            return self._args
        from swift.utils import disable_safe_ddp_context_use_barrier

        from ..ms_swift import DataArguments, registering_datasets

        # One process of several may be the only one that reads.
        self.enter_context(disable_safe_ddp_context_use_barrier())
        known = {field.name for field in dataclasses.fields(DataArguments)}
        try:
            _import_plugins(self.options)
            # ms-swift's own arguments, which are made later, refuse to register a dataset twice.
            self.enter_context(registering_datasets())
            args = DataArguments(**{key: value for key, value in self.options.items() if key in known})
        except Exception as e:  # assertions, OSError, ValueError, and whatever a plugin raises
            raise ValueError(f'ms-swift cannot use these arguments: {_reason(e)}') from e
        if not isinstance(args.columns, (dict, type(None))):
            raise ValueError(f'--columns: expected a JSON object, found {self.options["columns"]!r}.')
        args.use_hf, args.hub_token = self.options.get('use_hf') or None, self.options.get('hub_token')
        self._kwargs = {**args.get_dataset_kwargs(), 'remove_unused_columns': False}
        # As in `swift infer`, where a validation dataset is given.
        self._kwargs.pop('interleave_prob')
        self._args = args
        return args

    def _meta(self, dataset: str) -> 'Tuple[Any, DatasetMeta]':
        """Returns how ms-swift understands the name of a dataset, and what it knows of it."""
        from swift.utils import use_hf_hub

        from ..ms_swift import DATASET_MAPPING, DatasetSyntax
        syntax = DatasetSyntax.parse(dataset)
        use_hf = self._kwargs['use_hf'] or use_hf_hub() if syntax.use_hf is None else syntax.use_hf
        return syntax, DATASET_MAPPING.get(syntax.dataset) or syntax.get_dataset_meta(bool(use_hf))

    def _convert(self, dataset: str, lines: List[Line]) -> Tuple[List[Line], List[Problem]]:
        """Makes lines in ms-swift's own form of JSON lines that may be in another one."""
        if not lines or is_plain(lines) and not any(map(self.options.get, _READING_OPTIONS)):
            return lines, []
        from ..ms_swift import RowPreprocessor
        args = self._arguments()
        original = dict(lines)
        # They are ours, and stay as they are.
        rows = [{key: value for key, value in data.items() if key not in ('adapters', 'weights')} for _, data in lines]
        columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        with _as_value_error(dataset), _as_local():
            _, meta = self._meta(str(Path(dataset).expanduser()))
            raw = _table({**columns, _NUMBER: [number for number, _ in lines]})
            if args.columns:
                raw = RowPreprocessor.safe_rename_columns(raw, args.columns)
            kwargs = {key: self._kwargs[key] for key in ('num_proc', 'load_from_cache_file')}
            if self._kwargs.get('disable_auto_column_mapping') is False:  # ms-swift 4
                kwargs['enable_auto_mapping'] = True
            done, problems = _preprocess(meta.preprocess_func, raw, kwargs)
            converted = [_line_of_row(row) for row in done]
        kept = {*RowPreprocessor.standard_keys, _NUMBER}
        for number, data in converted:
            # A table has made all values of a column alike.
            line = original[number]
            data.update({key: line[key] for key in data.keys() & line.keys() - kept})
            data.update({key: line[key] for key in ('adapters', 'weights') if key in line})
        return converted, self._told(dataset, len(lines), problems)

    def _load(self, dataset: str) -> Tuple[List[Line], List[Problem]]:
        """Reads by ms-swift's loader."""
        from ..ms_swift import DATASET_MAPPING, load_dataset, registering_datasets
        self._arguments()
        problems: List[Problem] = []
        total = 0

        def numbered(preprocess: Callable[..., 'HfDataset']) -> Callable[..., 'HfDataset']:

            def wrapper(raw: 'HfDataset', **kwargs: Any) -> 'HfDataset':
                nonlocal total
                raw = raw.add_column(_NUMBER, list(range(total + 1, total + len(raw) + 1)))
                total += len(raw)
                kwargs.pop('strict')
                done, found = _preprocess(preprocess, raw, kwargs)
                problems.extend(found)
                return done

            return wrapper

        path = str(Path(dataset).expanduser()) if dataset.startswith('~') else dataset
        with _as_value_error(dataset), _as_local() if os.path.exists(path) else nullcontext():
            syntax, meta = self._meta(path)
            is_file = syntax.dataset_type == 'path'
            if is_file and meta.dataset_path is None and not path.endswith(_SUFFIXES):
                # ms-swift would look for a reader of this name on a hub.
                raise ValueError(f'expected JSON lines, or a file named {", ".join(_SUFFIXES)}')
            subsets = [
                dataclasses.replace(
                    subset, preprocess_func=subset.preprocess_func and numbered(subset.preprocess_func))
                for subset in meta.subsets
            ]
            meta = dataclasses.replace(meta, preprocess_func=numbered(meta.preprocess_func), subsets=subsets)
            if syntax.dataset not in DATASET_MAPPING:
                # What is registered under its own name is looked for where it was.
                meta = dataclasses.replace(
                    meta,
                    dataset_path=syntax.dataset if is_file else None,
                    ms_dataset_id=syntax.dataset,
                    hf_dataset_id=syntax.dataset)
            with registering_datasets():
                DATASET_MAPPING[syntax.dataset] = meta
                try:
                    _, loaded = load_dataset([path], split_dataset_ratio=1., **self._kwargs)
                except Exception:
                    # It can choose no samples of none.
                    if not total or len(problems) < total:
                        raise
                    loaded = []
            lines = [_line_of_row(row) for row in loaded]
        return lines, self._told(dataset, total, problems)

    def _told(self, dataset: str, total: int, problems: List[Problem]) -> List[Problem]:
        """Returns what is wrong where that is an error, and logs it otherwise."""
        if self.strict or not problems:
            return problems
        number, reason = problems[0]
        logger.warning(f'{dataset}: {len(problems)} of {total} samples are left out, for ms-swift cannot use them; the '
                       f'first is {number}: {reason}')
        return []


def _table(columns: Dict[str, List[Any]]) -> 'HfDataset':
    from ..ms_swift import HfDataset
    try:
        return HfDataset.from_dict(columns)
    except Exception:  # pyarrow's errors have several bases
        for key, values in columns.items():
            try:
                HfDataset.from_dict({key: values})
            except Exception as e:
                raise ValueError(f'ms-swift needs values of one type in each column, found others in {key!r}: '
                                 f'{_reason(e)}') from e
        raise


def _preprocess(preprocess: Callable[..., 'HfDataset'], raw: 'HfDataset',
                kwargs: Dict[str, Any]) -> 'Tuple[HfDataset, List[Problem]]':
    """Makes rows with messages of what was read, and tells what is wrong with those that ms-swift leaves out."""
    with _unlogged('swift'), _without_bars():
        done = preprocess(raw, strict=False, **kwargs)
        numbers = raw[_NUMBER]
        if _NUMBER in done.column_names:
            left: Set[int] = set(done[_NUMBER])
        elif not len(done):
            left = set()
        elif len(done) == len(raw):
            # A preprocessor of its own that makes rows of its own.
            left = set(numbers)
            done = done.add_column(_NUMBER, list(numbers))
        else:
            raise ValueError(f'{len(raw) - len(done)} of {len(raw)} rows are left out, and the preprocessor of this '
                             f'dataset does not tell which')
        problems: List[Problem] = []
        for place, number in enumerate(numbers):
            if number not in left:
                reason = 'ms-swift cannot use it'
                if len(problems) < _MAX_REASONS:
                    reason = f'{reason}: {_why_left_out(preprocess, raw.select([place]), kwargs)}'
                problems.append((number, reason))
        if 'dataset' in done.column_names:
            done = done.rename_column('dataset', _DATASET)
    return done, problems


def _why_left_out(preprocess: Callable[..., 'HfDataset'], row: 'HfDataset', kwargs: Dict[str, Any]) -> str:
    try:
        preprocess(row, **{**kwargs, 'strict': True, 'num_proc': 1})
    except Exception as e:  # assertions, KeyError, ValueError, whatever comes
        return _reason(e)
    return 'it finds no messages in it'


def _line_of_row(row: Dict[str, Any]) -> Line:
    """Makes of a row what a line would have had: a table has a value for everything in every row."""
    number = row.pop(_NUMBER)
    row.pop('dataset', None)
    values = {'dataset' if key == _DATASET else key: _json_value(value) for key, value in row.items()}
    data = {key: value for key, value in values.items() if value is not None}
    if isinstance(data.get('messages'), list):
        data['messages'] = [{
            key: _text(value) if key == 'content' else value
            for key, value in message.items() if value is not None or key == 'content'
        } for message in data['messages']]
    if isinstance(data.get('images'), list):
        data['images'] = [_image(image) for image in data['images']]
    return number, data


def _json_value(value: Any) -> Any:
    """Makes JSON again of what a table had for it: pyarrow takes strings for times, pandas empty cells for NaN."""
    if isinstance(value, dict):
        return {key: _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_json_value(inner) for inner in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(content: Any) -> Any:
    """Makes text again of what a table took for a number."""
    return str(content) if isinstance(content, (int, float)) and not isinstance(content, bool) else content


def _image(image: Any) -> Any:
    return image['path'] if isinstance(image, dict) and image.get('bytes') is None and 'path' in image else image


def _parse_cells(data: Dict[str, Any]) -> Dict[str, Any]:
    """Reads `adapters` and `weights` that are one cell of a table: JSON, or values separated by commas."""
    data = dict(data)
    for key, kind in (('adapters', str), ('weights', _number)):
        cell = data.get(key)
        if isinstance(cell, (int, float)) and not isinstance(cell, bool):
            # All of the column are numbers.
            data[key] = [kind(cell)]
        elif isinstance(cell, str) and cell.strip().startswith('['):
            try:
                data[key] = json.loads(cell)
            except ValueError:
                pass  # The string is told as what it is.
        elif isinstance(cell, str) and cell.strip():
            data[key] = [kind(value.strip()) for value in cell.split(',')]
        elif isinstance(cell, str):
            del data[key]
    return data


def _number(value: Union[str, float]) -> Any:
    try:
        return float(value)
    except ValueError:
        return value  # It is told as what it is.


def _import_plugins(options: Mapping[str, Any]) -> None:
    """Imports the user's modules, which may register datasets, as ms-swift's arguments do."""
    from swift.utils import import_external_file
    for key in ('custom_register_path', 'external_plugins'):
        paths = options.get(key) or []
        for path in [paths] if isinstance(paths, str) else paths:
            import_external_file(path)


def _reason(error: BaseException) -> str:
    """Returns what went wrong first, on one line."""
    # `datasets` works in another process, whose whole traceback is a cause, too.
    while error.__cause__ is not None and type(error.__cause__).__name__ != 'RemoteTraceback':
        error = error.__cause__
    return reason_of(error, 300)


@contextmanager
def _as_value_error(dataset: str) -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        raise ValueError(f'Cannot read the dataset {dataset}: {" ".join(str(e).split()):.300}') from e
    except Exception as e:  # of a hub, a network, pandas, pyarrow
        raise ValueError(f'Cannot read the dataset {dataset}: {_reason(e)}') from e


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keeps back what a library logs of what it cannot use, for that is told."""
    library = logging.getLogger(name)
    level = library.level
    library.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        library.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hides the bars of `datasets`, which last for a moment here, unless this package logs what it does (INFO)."""
    from datasets import utils  # type: ignore[import-untyped]  # it has no types
    if utils.are_progress_bars_disabled() or logger.isEnabledFor(logging.INFO):
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


@contextmanager
def _as_local() -> Iterator[None]:
    """Makes ms-swift read files themselves, quietly, and not what `datasets` has kept of them.

    It knows a file by its path and time alone, so that one that was copied over another with its time (by rsync, out
    of an image or an archive) would be answered by the other's rows. Nobody else's cache is written either.
    """
    from datasets import arrow_dataset, config
    kept = os.environ.get('MODELSCOPE_CACHE')
    with _without_bars(), _unlogged('datasets'), tempfile.TemporaryDirectory(prefix='swift_patch_') as folder, \
            _replaced(config, 'HF_DATASETS_CACHE', Path(folder)), \
            _replaced(arrow_dataset, 'get_temporary_cache_files_directory', lambda: folder):
        os.environ['MODELSCOPE_CACHE'] = folder
        try:
            yield
        finally:
            if kept is None:
                del os.environ['MODELSCOPE_CACHE']
            else:
                os.environ['MODELSCOPE_CACHE'] = kept


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
