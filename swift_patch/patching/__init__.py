"""What is replaced in ms-swift and PEFT, for which releases, and how it is put in force and taken back.

Nothing here imports ms-swift or PEFT, but `fixes`, which is imported after them.
"""
from .apply import apply, in_force, is_applied, needless, revert, reverted, why_not_applied
from .table import PATCHES, Patch

__all__ = ['PATCHES', 'Patch', 'apply', 'in_force', 'is_applied', 'needless', 'revert', 'reverted', 'why_not_applied']
