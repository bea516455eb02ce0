"""Edits of ms-swift's own modules, by the structure of their code.

Each method that the import replaces becomes a call of the function that takes its place; what `mends` wraps around a
method is put into it. Whatever an edit would add and finds already there, it leaves alone.
"""
import libcst as cst
import libcst.matchers as m
import textwrap
from libcst import FunctionDef, Module
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence
from yapf.yapflib.yapf_api import FormatCode

from ..patching import PATCHES, Patch

PACKAGE = 'weighted_adapter'
SOURCES = Path(__file__).parents[1] / PACKAGE
YAPF_STYLE = ('{based_on_style: pep8, column_limit: 120, blank_line_before_nested_class_or_def: true, '
              'split_before_expression_after_opening_paren: true, split_before_arithmetic_operator: true}')
# After which method a new one comes.
_PREDECESSOR = 'add_weighted_adapter'


class UnexpectedCode(ValueError):
    """A checkout does not look as expected, so that an edit has no place."""


def edited(path: str, source: str) -> str:
    """Returns a module of `swift/tuners` with all edits that it needs.

    Args:
        path: The path of the module in the checkout, for messages.
        source: What it holds.

    Raises:
        UnexpectedCode: a class, a method or a call is not where it is expected.
    """
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError as e:
        raise UnexpectedCode(f'{path} is expected to be Python, but cannot be parsed: {e}') from e
    for edit in EDITS[path]:
        module = edit(path, module)
    return module.code


def _delegate(patch: Patch) -> Callable[[str, Module], Module]:
    """Makes a method of ms-swift call the function that the import puts in its place."""
    source, function_name = patch.source.split(':')
    class_name, method_name = patch.target.split('.')
    # Read, not imported: where the installed ms-swift has the functions, the import gives those.
    function = _find(source, cst.parse_module((SOURCES / f'{source.split(".")[1]}.py').read_text()), function_name)
    parameters = _parameters(function)

    def edit(path: str, module: Module) -> Module:
        new = _method(method_name, function, source)
        class_def = _find(path, module, class_name)
        if not _has(class_def, method_name):
            return _replaced(module, class_def, _with_new(path, class_def, new))
        old = _find(path, class_def, method_name)
        found = _parameters(old)
        if found != parameters:
            raise UnexpectedCode(f'{path}: {patch.target} is expected to take {parameters}, found {found}.')
        return _replaced(module, old, old.with_changes(body=new.body))

    return edit


def _parameters(function: FunctionDef) -> List[str]:
    """Returns the names of all parameters as they are written, with the stars."""
    params = function.params
    starred = [('*', params.star_arg), ('**', params.star_kwarg)]
    return [
        *(parameter.name.value for parameter in (*params.posonly_params, *params.params, *params.kwonly_params)),
        *(f'{star}{parameter.name.value}' for star, parameter in starred if isinstance(parameter, cst.Param))
    ]


def _method(name: str, function: FunctionDef, source: str) -> FunctionDef:
    """Returns a method of the signature and the docstring of `function`, that calls it."""
    parameters = [
        # As ms-swift writes it.
        parameter.with_changes(annotation=None) if parameter.name.value == 'self' else parameter
        for parameter in function.params.params
    ]
    docstring = '\n'.join(f'        {line}' if line else '' for line in str(function.get_docstring()).splitlines())
    header = Module([]).code_for_node(
        function.with_changes(
            name=cst.Name(name),
            params=function.params.with_changes(params=parameters),
            body=cst.SimpleStatementSuite([cst.Pass()]),
            leading_lines=[]))
    header = header[:header.rindex(':') + 1].replace('\n', '\n    ')
    arguments = ', '.join(parameter.name.value for parameter in parameters)
    text = (f'class _:\n\n    {header}\n        """{docstring.lstrip()}\n        """\n'
            f'        from .{source} import {function.name.value}\n        {function.name.value}({arguments})\n')
    formatted, _ = FormatCode(text, style_config=YAPF_STYLE)
    class_def: Any = cst.parse_module(formatted).body[0]
    return cst.ensure_type(class_def.body.body[0], FunctionDef)


def _with_new(path: str, class_def: Any, method: FunctionDef) -> Any:
    predecessor = _find(path, class_def, _PREDECESSOR)
    method = method.with_changes(leading_lines=[cst.EmptyLine(indent=False)])
    body: List[Any] = []
    for statement in class_def.body.body:
        body += [statement, method] if statement is predecessor else [statement]
    return class_def.with_changes(body=class_def.body.with_changes(body=body))


def _inserted(target: str, text: str) -> Callable[[str, Module], Module]:
    """Puts statements at the start of a method, or at the end of a function of the module.

    Those of one `if` go into the `if` of the same condition that a method begins with.
    """
    # Parsed in a function, so that comments before the first statement belong to it.
    wrapper: Any = cst.parse_module('def _():\n    pass\n' + textwrap.indent(text, '    ')).body[0]
    new = list(wrapper.body.body)[1:]

    def edit(path: str, module: Module) -> Module:
        holder: Any = module
        *class_names, name = target.split('.')
        for class_name in class_names:
            holder = _find(path, holder, class_name)
        function = _find(path, holder, name)
        if all(_code(statement) in _code(function) for statement in _leaves(new)):
            return module
        body = list(function.body.body)
        if not class_names:
            if m.findall(body[-1], m.Return()):
                raise UnexpectedCode(f'{path}: {name} is expected to end without returning, found a return there.')
            body += new
        else:
            first = 1 if function.get_docstring() is not None else 0
            begun = body[first]
            if isinstance(new[0], cst.If) and isinstance(begun, cst.If) and _code(begun.test) == _code(new[0].test):
                inner = [*new[0].body.body, *begun.body.body]
                body[first] = begun.with_changes(body=begun.body.with_changes(body=inner))
            else:
                body[first:first] = new
        return _replaced(module, function, function.with_changes(body=function.body.with_changes(body=body)))

    return edit


def _completed_creation(path: str, module: Module) -> Module:
    """Gives a new LoRA layer what the installed PEFT demands, unless the checkout gives it the config itself."""
    with_config = m.Call(args=[m.ZeroOrMore(), m.Arg(keyword=m.Name('config')), m.ZeroOrMore()])
    for function in m.findall(module, m.FunctionDef()):
        name = cst.ensure_type(function, FunctionDef).name.value
        if (name.startswith('dispatch') or name == '_create_new_module') and m.findall(function, with_config):
            return module
    return _inserted(
        'LoraModel._create_new_module', f'from .{PACKAGE}.compat import layer_arguments\n'
        'kwargs = {**layer_arguments(_Embedding.__init__, lora_config), **kwargs}\n')(path, module)


def _completed_update(path: str, module: Module) -> Module:
    """Gives `update_layer` of a LoRA layer what the installed PEFT demands."""
    class_def = _find(path, module, 'LoraModel')
    method = _find(path, class_def, '_create_and_replace')
    calls: Sequence[Any] = m.findall(method, m.Call(func=m.Attribute(m.Name('target'), m.Name('update_layer'))))
    if len(calls) != 1:
        raise UnexpectedCode(f'{path}: LoraModel._create_and_replace is expected to call target.update_layer once, '
                             f'found {len(calls)} calls.')
    [call] = calls
    if len(call.args) < 2:
        raise UnexpectedCode(
            f'{path}: target.update_layer is expected to be given the name and the rank at least, found '
            f'{len(call.args)} arguments.')
    more: Any = cst.parse_expression('f(**layer_arguments(target.update_layer, lora_config))')
    more = more.args[0]
    if any('layer_arguments(' in _code(argument) or m.matches(argument, m.Arg(keyword=m.Name('config')))
           for argument in call.args):
        return module
    last = call.args[-1]
    is_multiline = isinstance(last.comma, cst.Comma)
    between = call.args[-2].comma
    arguments = [
        *call.args[:-1],
        last.with_changes(comma=between),
        more.with_changes(comma=last.comma if is_multiline else cst.MaybeSentinel.DEFAULT)
    ]
    module = _replaced(module, call, call.with_changes(args=arguments))
    return _inserted('LoraModel._create_and_replace', f'from .{PACKAGE}.compat import layer_arguments\n')(path, module)


def _find(path: str, holder: Any, name: str) -> Any:
    """Returns the class or the function of that name in a module or a class."""
    found = [statement for statement in _statements(holder) if _is_named(statement, name)]
    if len(found) != 1:
        where = f' in class {holder.name.value}' if isinstance(holder, cst.ClassDef) else ''
        raise UnexpectedCode(f'{path}: {name}{where} is expected to be defined once, found {len(found)} times. Is this '
                             'a release of ms-swift that swift_patch supports?')
    return found[0]


def _has(holder: Any, name: str) -> bool:
    return any(_is_named(statement, name) for statement in _statements(holder))


def _is_named(statement: cst.CSTNode, name: str) -> bool:
    return isinstance(statement, (FunctionDef, cst.ClassDef)) and statement.name.value == name


def _statements(holder: Any) -> Sequence[cst.CSTNode]:
    return holder.body if isinstance(holder, Module) else holder.body.body


def _replaced(module: Module, old: cst.CSTNode, new: cst.CSTNode) -> Module:
    return cst.ensure_type(module.deep_replace(old, new), Module)


def _leaves(statements: Sequence[Any]) -> List[Any]:
    """Returns simple statements, those of an `if` instead of it."""
    leaves = [leaf for item in statements for leaf in (item.body.body if isinstance(item, cst.If) else [item])]
    return [leaf.with_changes(leading_lines=[]) for leaf in leaves]


def _code(node: cst.CSTNode) -> str:
    return Module([]).code_for_node(node).strip()


def _edits() -> Dict[str, List[Callable[[str, Module], Module]]]:
    found: Dict[str, List[Callable[[str, Module], Module]]] = {}
    for patch in PATCHES:
        if patch.module.startswith('swift.') and not patch.is_mend:
            found.setdefault(patch.module.replace('.', '/') + '.py', []).append(_delegate(patch))
    peft_lines = [
        f'LoraModel.{patch.target.split(".")[1]} = {patch.source.split(":")[1]}' for patch in PATCHES
        if patch.module.startswith('peft.')
    ]
    names = ', '.join(patch.source.split(':')[1] for patch in PATCHES if patch.module.startswith('peft.'))
    found['swift/tuners/peft.py'] = [
        _inserted(
            'hot_patch_peft_module', f'\n# Fused adapters that are refilled in place\n'
            f'from .{PACKAGE}.weighted import {names}\n' + '\n'.join(peft_lines) + '\n')
    ]
    found['swift/tuners/base.py'].append(
        _inserted(
            'SwiftModel.load_state_dict', 'if adapter_name is not None:\n'
            f'    from .{PACKAGE}.compat import load_embeddings\n'
            '    state_dict = load_embeddings(self.base_model, state_dict, adapter_name)\n'))
    found['swift/tuners/lora_layers.py'] = [
        _completed_creation,
        _completed_update,
    ]
    return found


# By path in the checkout, what is changed there.
EDITS = _edits()
