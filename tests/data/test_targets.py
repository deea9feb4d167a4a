from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_nrl.data.batch import Batch
from lightning_nrl.data.targets import AllFailures, And, Confusion, Label, Not, Or, Target, Where
from lightning_nrl.errors import ConfigurationError

LABEL = torch.tensor([3, 3, 5, 3, 0])
PREDICTION = torch.tensor([5, 3, 3, 0, 0])
OCCLUDED = torch.tensor([True, False, False, True, True])


def batch(n: int = 5) -> Batch:
    raw = (torch.zeros(n, 2), LABEL[:n], {"occluded": OCCLUDED[:n]})
    return Batch(args=(raw[0],), target=raw[1], position=torch.arange(n), raw=raw)


def chosen(target: Target) -> list[int]:
    return target.select(batch(), LABEL, PREDICTION).nonzero().flatten().tolist()


def occluded(raw: tuple[Tensor, Tensor, dict[str, Tensor]]) -> Tensor:
    return raw[2]["occluded"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target.all(), [0, 1, 2, 3, 4]),
        (Target.label(3), [0, 1, 3]),
        (Target.confusion(3, 5), [0]),
        (Target.where(occluded), [0, 3, 4]),
        (Target.label(3) & Target.where(occluded), [0, 3]),
        (Target.confusion(3, 5) | Target.label(0), [0, 4]),
        (~Target.label(3), [2, 4]),
        (Target.where(occluded) & ~(Target.label(0) | Target.confusion(3, 5)), [3]),
    ],
    ids=str,
)
def test_select_chooses_the_samples_that_the_words_say(target: Target, expected: list[int]) -> None:
    assert chosen(target) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target.all(), [0, 1, 2, 3, 4]),
        (Target.label(3), [0, 1, 3]),
        (Target.where(occluded), [0, 3, 4]),
        # The class of a confusion, whatever its samples are taken for.
        (Target.confusion(3, 5), [0, 1, 3]),
        (Target.confusion(3, 5) & Target.where(occluded), [0, 3]),
        (Target.confusion(3, 5) | Target.label(0), [0, 1, 3, 4]),
        # Of every class something may fail otherwise than by this confusion.
        (~Target.confusion(3, 5), [0, 1, 2, 3, 4]),
        (~~Target.confusion(3, 5), [0, 1, 3]),
        (~Target.label(3), [2, 4]),
        (~(Target.label(3) | Target.confusion(5, 3)), [2, 4]),
        (~(Target.label(3) & ~Target.where(occluded)), [0, 2, 3, 4]),
    ],
    ids=str,
)
def test_covers_are_the_samples_that_would_be_chosen_if_they_failed(target: Target, expected: list[int]) -> None:
    assert target.covers(batch(), LABEL, PREDICTION).nonzero().flatten().tolist() == expected


def test_select_gives_one_bool_a_sample_on_the_cpu() -> None:
    mask = (Target.label(3) | Target.where(occluded)).select(batch(), LABEL, PREDICTION)
    assert mask.dtype == torch.bool
    assert mask.shape == (5,)
    assert mask.device.type == "cpu"


def test_targets_are_values() -> None:
    assert Target.label(3) | Target.confusion(3, 5) == Or(Label(3), Confusion(3, 5))
    assert ~Target.all() & Target.where(occluded) == And(Not(AllFailures()), Where(occluded))
    assert len({Target.label(3), Label(3), Label(4)}) == 2
    assert pickle.loads(pickle.dumps(Target.where(occluded) | Target.label(1))) == Where(occluded) | Label(1)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target.all(), "all failures"),
        (Target.label(3) | Target.confusion(3, 5), "label 3 or confusion 3 -> 5"),
        (Label(1) | Label(2) | Label(3), "label 1 or label 2 or label 3"),
        (Label(1) & (Label(2) & Label(3)), "label 1 and (label 2 and label 3)"),
        ((Label(1) | Label(2)) & Where(occluded), "(label 1 or label 2) and where occluded"),
        (Label(1) | (Label(2) & Where(occluded)), "label 1 or (label 2 and where occluded)"),
        (~(Label(1) | Label(2)), "not (label 1 or label 2)"),
        (~Label(1), "not label 1"),
        (Target.where(occluded, name="partly occluded"), "where partly occluded"),
        (Target.where("os.path:exists"), "where os.path:exists"),
        (Target.where(partial(occluded)), "where partial"),
    ],
)
def test_str_reads_as_words(target: Target, words: str) -> None:
    assert str(target) == words


def test_str_of_a_lambda_tells_its_line() -> None:
    first = occluded_line()
    assert str(Target.where(lambda raw: raw)) == f"where lambda of line {first + 1}"


def occluded_line() -> int:
    import inspect

    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


@pytest.mark.parametrize(
    "give",
    [
        lambda raw: OCCLUDED,
        lambda raw: OCCLUDED.numpy(),
        lambda raw: OCCLUDED.tolist(),
        lambda raw: tuple(OCCLUDED.tolist()),
        lambda raw: list(OCCLUDED.numpy()),
    ],
)
def test_where_takes_a_tensor_an_array_or_a_list(give: Callable) -> None:
    assert chosen(Target.where(give)) == [0, 3, 4]


def test_where_by_address_finds_the_function() -> None:
    assert chosen(Target.where(f"{__name__}:occluded")) == [0, 3, 4]


def test_where_by_address_reaches_into_a_class() -> None:
    assert Where("lightning_nrl.data.targets:Target.all").predicate == "lightning_nrl.data.targets:Target.all"


def test_an_empty_batch_chooses_nothing() -> None:
    empty = torch.tensor([], dtype=torch.int64)
    assert Target.where(lambda raw: []).select(batch(0), empty, empty).tolist() == []


@pytest.mark.parametrize(
    ("give", "found"),
    [
        (lambda raw: OCCLUDED[:3], r"torch.bool \[3\]"),
        (lambda raw: OCCLUDED.long(), r"torch.int64 \[5\]"),
        (lambda raw: OCCLUDED[:, None], r"torch.bool \[5, 1\]"),
        (lambda raw: OCCLUDED.numpy().astype(np.float32), r"float32 \[5\]"),
        (lambda raw: [1, 0, 0, 1, 1], "list of length 5"),
        (lambda raw: [], "list of length 0"),
        (lambda raw: True, "bool"),
        (lambda raw: None, "NoneType"),
        (lambda raw: "yes, yes", "str of length 8"),
    ],
)
def test_a_predicate_that_returns_something_else_is_refused(give: Callable, found: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s)where hidden.*returned ({found}) for a batch of 5.*HINT"):
        chosen(Target.where(give, name="hidden"))


def test_an_exception_in_a_predicate_is_named_and_kept() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)where hidden.*KeyError: 'hidden'.*HINT") as caught:
        chosen(Target.where(lambda raw: raw[2]["hidden"], name="hidden"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_wrong_address_is_found_on_construction() -> None:
    with pytest.raises(ConfigurationError, match=r"`predicate='no.such.module:f'` was not found[\s\S]*HINT"):
        Target.where("no.such.module:f")


def test_a_predicate_that_cannot_be_called_is_found_on_construction() -> None:
    with pytest.raises(ConfigurationError, match="of type Tensor cannot be called"):
        Target.where(OCCLUDED)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [-1, 2.0, "3", None, True, np.True_])
def test_a_label_that_is_no_class_is_refused(label: object) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)`label=.*is no class.*HINT"):
        Target.label(label)  # type: ignore[arg-type]


@pytest.mark.parametrize(("true", "predicted"), [(-1, 2), (2, -1), (1.5, 2), (0, "1")])
def test_a_confusion_of_no_classes_is_refused(true: object, predicted: object) -> None:
    with pytest.raises(ConfigurationError, match="is no class"):
        Target.confusion(true, predicted)  # type: ignore[arg-type]


def test_a_confusion_of_a_class_with_itself_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)confusion 3 -> 3 is no failure.*Target.label\(3\)"):
        Target.confusion(3, 3)


@pytest.mark.parametrize("label", [np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_become_int(label: object) -> None:
    target = Target.label(label)  # type: ignore[arg-type]
    assert target == Label(3)
    assert type(target.label) is int


@pytest.mark.parametrize("target", [Target.label(3), Target.confusion(3, 5), Target.all() & Target.label(3)])
def test_classes_in_a_task_without_classes_are_refused(target: Target) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)asks for classes.*Target.where"):
        target.select(batch(), None, None)


def test_attributes_need_no_classes() -> None:
    mask = (Target.all() & ~Target.where(occluded)).select(batch(), None, None)
    assert mask.tolist() == [False, True, True, False, False]


def test_and_or_as_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match=r"(?s)neither true nor false.*HINT"):
        Target.label(3) or Target.label(5)


def test_combining_with_something_else_is_refused() -> None:
    with pytest.raises(TypeError):
        Target.label(3) & 5  # type: ignore[operator]
    with pytest.raises(TypeError):
        Target.label(3) | 5  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="Or was given 5"):
        Or(Target.label(3), 5)  # type: ignore[arg-type]


LEAVES = st.one_of(
    st.just(Target.all()),
    st.integers(0, 5).map(Target.label),
    st.tuples(st.integers(0, 5), st.integers(0, 5))
    .filter(lambda pair: pair[0] != pair[1])
    .map(lambda p: Confusion(*p)),
    st.just(Target.where(occluded)),
)
TREES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.builds(And, inner, inner), st.builds(Or, inner, inner), st.builds(Not, inner))
)


@given(TREES, TREES)
def test_combinations_obey_de_morgan(a: Target, b: Target) -> None:
    assert chosen(~(a & b)) == chosen(~a | ~b)
    assert chosen(~(a | b)) == chosen(~a & ~b)
    assert chosen(~~a) == chosen(a)


def test_a_cli_builds_a_target_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--target", type=Target | None)
    given_yaml = """{class_path: lightning_nrl.data.Or, init_args: {
        left: {class_path: lightning_nrl.data.Label, init_args: {label: 3}},
        right: {class_path: lightning_nrl.data.Where, init_args: {predicate: 'os.path:exists'}}}}"""
    config = parser.parse_args([f"--target={given_yaml}"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert instantiate(config).target == Or(Label(3), Where("os.path:exists"))
    assert "predicate: os.path:exists" in parser.dump(config)
