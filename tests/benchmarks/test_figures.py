"""The tables and the picture, from a JSON like pytest-benchmark's."""
from figures import batches, draw, draw_batches, draw_library, library, samples, tables
from pathlib import Path

CONTENT = {
    'machine_info': {
        'cpu': {
            'brand_raw': 'A CPU',
            'count': 2
        },
        'packages': {
            'torch': '2.13.0'
        }
    },
    'benchmarks': [
        {
            'stats': {
                'median': 0.012
            },
            'extra_info': {
                'subject': 'switching',
                'case': 'another LoRA',
                'what': 'a switch',
                'divided_by': 'a loop',
                'ratio': 3.0,
                'bound': 2,
                'seconds': {
                    'set': 0.012,
                    'lookup': 0.004
                }
            }
        },
        *({
            'stats': {
                'median': 0.012
            },
            'extra_info': {
                'subject': 'merge',
                'case': case,
                'what': 'an update',
                'divided_by': 'a copy',
                'ratio': ratio,
                'bound': 2,
                'seconds': {}
            }
        } for case, ratio in (('1M fp32 linear', 3.0), ('1M fp32 linear compiled', 1.5), ('2M bf16 linear', 2.0))),
        {
            'stats': {
                'median': 0.012
            },
            'extra_info': {
                'subject': 'library merge',
                'case': '1M fp32 never seen',
                'what': 'a composition',
                'divided_by': 'a copy',
                'ratio': 30.0,
                'bound': float('inf'),
                'seconds': {}
            }
        },
        {
            'stats': {
                'median': 0.2
            },
            'extra_info': {
                'subject': 'samples',
                'case': 'swift_patch',
                'samples': [0.1, 0.2, 0.3]
            }
        },
        {
            'stats': {
                'median': 0.2
            },
            'extra_info': {
                'subject': 'upstream',
                'case': 'part',
                'samples': [0.3, 0.4]
            }
        },
        *(
            {
                'stats': {
                    'median': 9
                },
                'extra_info': {
                    'way': 'library',
                    'number': number,
                    'measured': {
                        'seconds': 0.15,
                        'reserve': 0.02 * number / 10,
                        'MiB': 6.2,
                        'MiB of all': 7.4,
                        'from the cache': 0.00036,
                        'from the page cache': 0.0013,
                        # Where files cannot be dropped.
                        'from the disk': disk
                    }
                }
            } for number, disk in ((1000, None), (10, 0.0018))),
        {
            'stats': {
                'median': 9
            },
            'extra_info': {
                'way': 'PEFT',
                'measured': {
                    '10': {
                        'seconds': 0.3,
                        'one more': 0.029,
                        'MiB': 5.2
                    },
                    '100': {
                        'seconds': 13.2,
                        'one more': 0.19,
                        'MiB': 30.7
                    }
                }
            }
        },
        {
            'stats': {
                'median': 0.2
            },
            'extra_info': {
                'subject': 'batches',
                'case': 256,
                'tokens': 32,
                # JSON has no other keys.
                'samples_per_second': {
                    'one by one': {
                        '1': 1.0,
                        '16': 1.0
                    },
                    'swift_patch': {
                        '1': 1.0,
                        '16': 9.5
                    }
                },
                'composing': {
                    '1': 0.002,
                    '16': 0.01
                }
            }
        }
    ]
}


def test_tables_name_the_machine_and_what_was_measured() -> None:
    assert tables(CONTENT) == '''On A CPU, 2 cores, with torch 2.13.0.

a switch, over a loop:

| case | ms | switching | at most |
| --- | ---: | ---: | ---: |
| another LoRA | 12 / 4 | 3 | 2 |

an update, over a copy:

| P | dtype | linear | linear compiled |
| --- | ---: | ---: | ---: |
| 1M | fp32 | 3 | 1.5 |
| 2M | bf16 | 2 |  |

a composition, over a copy:

| P | dtype | never seen |
| --- | ---: | ---: |
| 1M | fp32 | 30 |

| seconds of sample | 1 | 2 |
| --- | ---: | ---: |
| swift_patch | 0.1 | 0.2 |

| seconds of sample, `refill` alone | 1 | 2 |
| --- | ---: | ---: |
| part | 0.3 | 0.4 |

| LoRAs on disk | s to the first composition | s to reserve for all | MiB at first | MiB once all were used | \
ms, from the cache | ms, from the page cache | ms, from the disk |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 10 | 0.15 | 0.02 | 6.2 | 7.4 | 0.36 | 1.3 | 1.8 |
| 1,000 | 0.15 | 2 | 6.2 | 7.4 | 0.36 | 1.3 |  |

| LoRAs loaded by PEFT | s to the first composition | MiB | ms of another one |
| --- | ---: | ---: | ---: |
| 10 | 0.3 | 5.2 | 29 |
| 100 | 13 | 31 | 190 |

| samples/s, hidden 256, batches of | 1 | 16 |
| --- | ---: | ---: |
| one by one | 1.00 | 1.00 |
| swift_patch | 1.00 | 9.50 |

| composing over generating, hidden 256 | 1 | 16 |
| --- | ---: | ---: |
| swift_patch | 0.2% | 1.0% |'''


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    draw(samples(CONTENT), tmp_path / 'cost.png')
    draw_batches(batches(CONTENT), tmp_path / 'batches.png')
    draw_library(*library(CONTENT), tmp_path / 'library.png')
    for name in ('cost.png', 'batches.png', 'library.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
