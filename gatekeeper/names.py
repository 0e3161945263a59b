"""The one matcher of module names: does an exclude list, by the rules of the quantizer that wrote it, cover a module?

Each quantizer has its own rules, and a prefix test is none of them: `shared_expert` is not `shared_expert_gate`.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from math import comb
from typing import Literal, TypeAlias

from gatekeeper.errors import FactError

Test: TypeAlias = Callable[[str], bool]
Excluded: TypeAlias = bool | Literal["partly"]

WRAPPERS = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")
"""Prefixes of one and the same module: the class tree, the checkpoint and the quantizer each choose theirs."""

FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "index_qkv_proj": ("index_q_proj", "index_k_proj", "index_v_proj"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
}
"""Modules that engines fuse and checkpoints keep apart (`packed_modules_mapping` of vLLM and SGLang)."""
WHOLES: Mapping[str, tuple[str, ...]] = {
    part: tuple(whole for whole, parts in FUSED.items() if part in parts)
    for part in sorted({part for parts in FUSED.values() for part in parts})
}
"""The same, from a part to the modules that it may be fused into."""

MAX_PATTERN = 500
MAX_REPEATS = 4
"""Unbounded repeats of one pattern: matching a name of n characters costs up to n to that power."""
MAX_OPTIONAL = 8
MAX_WILD = 2_000
"""Patterns with wildcards in one list; published ones have up to some hundreds."""
MAX_STEPS = 5_000_000
"""Of matching all `re:` patterns of one list with one name of a hundred characters, at the worst."""

_WILD = re.compile(r"[*?\[]")
_BEGINNING = re.compile(rf"[^*?\[]{{1,{MAX_PATTERN - 1}}}\*")
_TRANSLATED = re.compile(r"\(\?>\.\*\?[\w.]+\)")
"""A star of a glob that `fnmatch.translate` made an expression of (Quark does, for vLLM): no cost, it is atomic."""
_NEW_END = re.compile(r"\\z$")
"""How Python 3.14 writes `\\Z`; older ones don't know it."""


def covers(method: str, patterns: Sequence[str], name: str) -> bool:
    """Say whether the list `patterns`, written by the quantizer `method`, covers the module `name`.

    `name` is tried with each wrapper prefix; a fused name is covered where it is listed or all its parts are, and a
    part where its fused name is listed. Raises `FactError` for a `re:` pattern that is broken or could take for ever.
    """
    return matcher(method, tuple(patterns))(name)


def excluded(test: Test, names: Iterable[str], exists: Test | None = None) -> Excluded:
    """Say whether a list covers all, none or some (`partly`) of a group of modules; an empty group is not covered.

    `test` is the list's `matcher`. Name the modules of the checkpoint: a list that names every expert's projections
    says nothing about `mlp.experts` (vllm-project/vllm#48226). A fused name that is not listed itself stands for its
    parts, of which those that don't `exists` have no say (MiniMax-M3 has no `index_v_proj` from layer 3 on,
    sgl-project/sglang#32904).
    """
    modules = [one for name in names for one in ((name,) if test(name) else unfused(name))]
    found = {test(one) for one in modules if exists is None or exists(one)}
    return "partly" if len(found) == 2 else found == {True}


def spellings(name: str) -> tuple[str, ...]:
    """The names that one module goes by, its own first: with and without each wrapper prefix."""
    bare = name
    for wrapper in WRAPPERS:
        if wrapper and name.startswith(wrapper):
            bare = name[len(wrapper) :]
            break
    return tuple(dict.fromkeys([name, *[wrapper + bare for wrapper in WRAPPERS]]))


def unfused(name: str) -> tuple[str, ...]:
    """The parts of a fused module's name; the name alone if it is not fused."""
    parent, dot, last = name.rpartition(".")
    return tuple(parent + dot + part for part in FUSED.get(last, (last,)))


@lru_cache(maxsize=256)
def matcher(method: str, patterns: tuple[str, ...]) -> Test:
    """Compile a list for many questions; see `covers`."""
    if not patterns:
        return lambda name: False
    _wild(patterns)
    rule = METHODS.get(canonical_method(method), _segments)(patterns)
    text = "\n".join(patterns)
    # Asked for thousands of parts: only where some fused name is in the list at all.
    wholes = {part: listed for part, names in WHOLES.items() if (listed := [n for n in names if n in text])}

    def one(name: str) -> bool:
        return any(map(rule, spellings(name)))

    def test(name: str) -> bool:
        if one(name):
            return True
        parent, dot, last = name.rpartition(".")
        if last in FUSED:
            return all(one(parent + dot + part) for part in FUSED[last])
        return last in wholes and any(one(parent + dot + whole) for whole in wholes[last])

    return test


def canonical_method(method: str) -> str:
    """`quant.method` as the tables have it: lower case, dashes, one name for all kinds of ModelOpt."""
    method = method.lower().replace("_", "-")
    return "modelopt" if method.startswith("modelopt") else method


def _compressed_tensors(patterns: Sequence[str]) -> Test:
    """`re:` is a prefix match (`re.match`), the rest are whole names or the class `Linear`; there are no globs.

    `match_name` and `_match_class` in compressed_tensors/utils/match.py (0.20.0), `should_ignore_layer` in vLLM's
    compressed_tensors/utils.py. SGLang's takes any substring, in either case of letters; the writer did not.
    """
    regex = _any_regex(patterns)
    plain = frozenset(p for p in patterns if not p.startswith("re:"))
    if "Linear" in plain:
        return lambda name: True
    return lambda name: name in plain or regex(name)


def _quark(patterns: Sequence[str]) -> Test:
    """`re:` is a prefix match, the rest are whole names or globs over the whole name, in which `*` crosses dots.

    Quark matches with fnmatch and never takes what is below a module along: `*.mlp.gate` leaves `*.mlp.gate.x`
    (`QConfig` in quark/torch/quantization/config/config.py and `model_transformation.py`, 0.13). `re:` is of the
    engines that read its lists: `should_ignore_layer` in vLLM's and SGLang's quark/utils.py, exact or `re.match`.
    """
    regex = _any_regex(patterns)
    plain, globs = _plain_and_globs(patterns)
    whole = _any_glob(globs)
    return lambda name: name in plain or regex(name) or whole(name)


def _modelopt(patterns: Sequence[str]) -> Test:
    """Globs in which `*` crosses dots, matched with the whole name or with one dotted part of it.

    ModelOpt writes names, `prefix*`, or `prefix` with `prefix.*`, and the first only where it takes no quantized module
    along (`_prefix_wildcard_summarize_exclude_modules` in modelopt/torch/export/quant_utils.py, 0.47); `layers.1*`
    therefore covers layer 10 too. vLLM reads with fnmatch; `is_layer_excluded` in SGLang's modelopt_quant.py with
    fullmatch, on the parts too, `language_model.` stripped. Both take more of older exports: vLLM any substring,
    SGLang a fused module of which one part is listed. What those leave out is plain in the headers.
    """
    plain, globs = _plain_and_globs(patterns)
    whole, part = _any_glob(globs), _any_glob([g for g in globs if "." not in g])

    def test(name: str) -> bool:
        parts = name.split(".")
        return name in plain or not plain.isdisjoint(parts) or whole(name) or any(map(part, parts))

    return test


def _segments(patterns: Sequence[str]) -> Test:
    """A run of dotted segments, each a name or a glob of one segment, found anywhere in the name.

    `_module_path_match` of SGLang's `is_layer_skipped` (PR 23467: `mlp.gate` is not `mlp.gate_up_proj`). transformers'
    `should_convert_module` (quantizers/quantizers_utils.py) takes an entry as a pattern that begins the name or as
    characters that end it, and vLLM's `is_layer_skipped` as a whole name; a run of segments is what lists mean.
    """
    regex = _any_regex(patterns)
    written = [p.strip(".") for p in patterns if not p.startswith("re:") and p.strip(".")]
    globs = [[_glob_regex(s) for s in p.split(".")] for p in written if _WILD.search(p)]
    # By their last segment: lists have hundreds of names, and few of them end in one that the module has.
    plain: dict[str, list[list[str]]] = {}
    for one in dict.fromkeys(p for p in written if not _WILD.search(p)):
        run = one.split(".")
        plain.setdefault(run[-1], []).append(run)

    def test(name: str) -> bool:
        segments = name.split(".")
        for end, last in enumerate(segments, 1):
            if last in plain and any(segments[max(0, end - len(run)) : end] == run for run in plain[last]):
                return True
        return regex(name) or any(
            all(g.match(s) for g, s in zip(glob_, segments[i:], strict=False))
            for glob_ in globs
            for i in range(len(segments) - len(glob_) + 1)
        )

    return test


METHODS: dict[str, Callable[[Sequence[str]], Test]] = {
    "compressed-tensors": _compressed_tensors,
    "quark": _quark,
    "modelopt": _modelopt,
    "fp8": _segments,
    "mxfp4": _segments,
}
"""How each quantizer reads its list; every other method's list is transformers' `modules_to_not_convert`."""


def finder(method: str, patterns: Iterable[str]) -> Callable[[str], str | None]:
    """For a table of schemes whose keys are patterns: the key of a module's row, None where it has none.

    A row of the module's own name counts before rows of patterns, those in their order (`match_targets` of
    compressed-tensors; `_exact_cfg` in Quark's model_transformation.py). Tables have a row for each expert, so names
    are looked up.
    """
    keys = tuple(dict.fromkeys(patterns))
    names = frozenset(keys)
    rest = [(key, matcher(method, (key,))) for key in _wild(keys)]

    def find(name: str) -> str | None:
        own = next((spelling for spelling in spellings(name) if spelling in names), None)
        return own if own is not None else next((key for key, test in rest if test(name)), None)

    return find


def glob(pattern: str) -> Test:
    """Compile the rules' `matches`: `*` stands for anything within one dotted segment, `**` for anything at all.

    Raises `ValueError` for a pattern that is too long or has too many stars.
    """
    if len(pattern) > MAX_PATTERN or len(re.findall(r"\*+", pattern)) > MAX_OPTIONAL:
        raise ValueError(f"`{pattern[:60]}` is too long or has more than {MAX_OPTIONAL} stars; use simpler globs")
    parts = re.split(r"(\*+)", pattern)
    text = "".join({0: "", 1: r"[^.]*"}.get(len(p), ".*") if p.strip("*") == "" else re.escape(p) for p in parts)
    compiled = re.compile(text, re.DOTALL)
    return lambda name: compiled.fullmatch(name) is not None


def _wild(patterns: Iterable[str]) -> list[str]:
    """The patterns with wildcards; raises `FactError` where they are too many for a list that a quantizer wrote."""
    found = [p for p in patterns if p.startswith("re:") or _WILD.search(p)]
    if len(found) > MAX_WILD:
        raise FactError(f"{len(found)} patterns with wildcards in one list are more than {MAX_WILD}; name the modules")
    return found


def _plain_and_globs(patterns: Sequence[str]) -> tuple[frozenset[str], list[str]]:
    written = [p for p in patterns if not p.startswith("re:")]
    return frozenset(p for p in written if not _WILD.search(p)), [p for p in written if _WILD.search(p)]


def _any_glob(globs: Sequence[str]) -> Test:
    """Whether one of some globs matches a whole text; as one expression, for lists have hundreds of them."""
    # Most are a beginning and a star, which needs no expression.
    beginnings = tuple(g[:-1] for g in globs if _BEGINNING.fullmatch(g))
    others = [_glob_regex(g).pattern for g in globs if not _BEGINNING.fullmatch(g)]
    if not others:
        return lambda text: text.startswith(beginnings)
    compiled = re.compile("|".join(others))
    return lambda text: text.startswith(beginnings) or compiled.match(text) is not None


@lru_cache(maxsize=4096)
def _glob_regex(pattern: str) -> re.Pattern[str]:
    if len(pattern) > MAX_PATTERN:
        raise FactError(f"pattern `{pattern[:60]}…` has {len(pattern)} characters, more than {MAX_PATTERN}")
    try:
        # fnmatch translates to atomic groups, so that many stars cost no backtracking.
        return re.compile(fnmatch.translate(pattern))
    except re.error as error:
        raise FactError(f"pattern `{pattern}` is no glob: {error}; correct the list") from None


def _any_regex(patterns: Sequence[str]) -> Test:
    """Whether one of the `re:` patterns matches the beginning of a text."""
    texts = [p.removeprefix("re:") for p in patterns if p.startswith("re:")]
    if sum(comb(100 + _repeats(text), 100) for text in texts if len(text) <= MAX_PATTERN) > MAX_STEPS:
        worst = max(texts, key=_repeats)
        _safe_regex(worst)  # has a better word for it, where it is bad by itself
        raise FactError(f"{len(texts)} patterns such as `re:{worst}` could take for ever together; write simpler ones")
    matches = [_safe_regex(text).match for text in texts]

    def test(text: str) -> bool:
        # Plain loops, here and in `matcher`: a checkpoint asks for thousands of names.
        for match in matches:  # noqa: SIM110
            if match(text):
                return True
        return False

    return test


def _repeats(text: str) -> int:
    return sum(map(_TRANSLATED.sub("x", text).count, "*+{"))


@lru_cache(maxsize=4096)
def _safe_regex(text: str) -> re.Pattern[str]:
    """Compile a pattern from a config.json, which anybody may have written; raises `FactError`."""
    if len(text) > MAX_PATTERN:
        raise FactError(f"pattern `re:{text[:60]}…` has {len(text)} characters, more than {MAX_PATTERN}; shorten it")
    problem = _costly(text)
    if problem:
        raise FactError(f"pattern `re:{text}` could take for ever: {problem}; write it without")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a syntax that Python may have one day
            return re.compile(_NEW_END.sub(r"\\Z", text))
    except (re.error, RecursionError, OverflowError) as error:
        raise FactError(f"pattern `re:{text}` is no regular expression: {error}; correct the list") from None


def _costly(text: str) -> str:
    """Say what makes a pattern's cost explode: a repeat of something that repeats or chooses, or many repeats."""
    if re.search(r"\(\?[a-zA-Z-]*x|\(\?#", text):  # `(a+) +` repeats a repeat where blanks don't count
        return "blanks or comments that don't count"
    plain = re.sub(r"\\.", "x", text, flags=re.DOTALL)
    plain = _TRANSLATED.sub("x", plain)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    plain = re.sub(r"\(\?(?:[:=!]|<[=!]|P<\w+>|[a-z]+\)?)", "(", plain)
    unbounded = optional = 0
    varied = [False]  # for each open group: does it repeat or choose within?
    closed_varied = False
    for position, character in enumerate(plain):
        repeats = character in "*+" or (character == "{" and re.match(r"\{\d*,?\d*\}", plain[position:]) is not None)
        after_quantifier = position > 0 and plain[position - 1] in "*+?}"
        if character == "(":
            varied.append(False)
        elif character == ")" and len(varied) > 1:
            inner = varied.pop()
            closed_varied = inner
            varied[-1] = varied[-1] or inner
        elif character == "|":
            varied[-1] = True
        elif character == "?" and not after_quantifier:
            optional += 1
            varied[-1] = True
        elif repeats and not after_quantifier:
            if position > 0 and plain[position - 1] == ")" and closed_varied:
                return "a repeat within a repeat, or of alternatives"
            unbounded += 1
            varied[-1] = True
    if unbounded > MAX_REPEATS or optional > MAX_OPTIONAL:
        return f"more than {MAX_REPEATS} repeats or {MAX_OPTIONAL} optional parts"
    return ""
