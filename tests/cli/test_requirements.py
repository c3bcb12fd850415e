"""Requirements as package metadata spells them, and versions as packages spell them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.cli.doctor_probes import CHECKOUT, of_project
from sparkrelay.cli.requirements import Package, Requirement, compare, meets, parse

numbers = st.lists(st.integers(0, 30), min_size=1, max_size=4)


def spelled(version: list[int]) -> str:
    return ".".join(map(str, version))


@given(numbers, numbers)
def test_versions_are_ordered_as_lists_of_numbers(left: list[int], right: list[int]) -> None:
    padded_left, padded_right = ([*each, *[0] * (4 - len(each))] for each in (left, right))
    order = compare(spelled(left), spelled(right))
    assert (order < 0) == (padded_left < padded_right) and (order == 0) == (padded_left == padded_right)


@pytest.mark.parametrize(
    ("version", "limits", "fits"),
    [
        ("3.1.6", ">=3.1.6,<4", True),
        ("4.0", ">=3.1.6,<4", False),
        ("3.1", ">=3.1.6,<4", False),
        ("2.13.0+cpu", "<3,>=2.13", True),
        ("1.0", "==1.0.0", True),
        ("1.1", "!=1.1", False),
        ("1.1", ">1.0,<=1.1", True),
        ("7", "", True),
    ],
)
def test_limits_hold_together(version: str, limits: str, fits: bool) -> None:
    assert meets(version, limits) is fits
    assert Package(Requirement("a", limits, ""), version).fits is fits


def test_metadata_is_understood_with_and_without_an_extra() -> None:
    lines = [
        "grpcio<2,>=1.85.1",
        'jinja2<4,>=3.1.6; extra == "gateway"',
        "rich",
        "x[y] (>=1) ; extra=='z'",
        "???",
    ]
    assert parse(lines) == [
        Requirement("grpcio", "<2,>=1.85.1", ""),
        Requirement("jinja2", "<4,>=3.1.6", "gateway"),
        Requirement("rich", "", ""),
        Requirement("x", "(>=1)", "z"),
    ]


def test_a_missing_package_fits_nothing() -> None:
    assert not Package(Requirement("a", "", ""), None).fits


def test_this_checkout_names_its_extras() -> None:
    extras = {each.extra for each in of_project(CHECKOUT / "pyproject.toml")}
    assert {"", "gateway", "verifier", "drafter"} <= extras
